"""Unique prototypes by greedy cover, against a plain loop and on planted groups."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from protojax.ops import unique
from protojax.ops.unique import nearest_cosine, unique_count, unique_groups


def slow_groups(rows, epsilon):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    leaders, groups = [], []
    for k, row in enumerate(rows):
        near = [r for r in leaders if 1.0 - rows[r] @ row < epsilon]
        groups.append(near[0] if near else k)
        if not near:
            leaders.append(k)
    return np.asarray(groups)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 2.5])
def test_groups_equal_the_definition_across_blocks(monkeypatch, epsilon):
    monkeypatch.setattr(unique, "_BLOCK", 16)
    rows = np.random.default_rng(0).normal(size=(101, 4)) * np.random.default_rng(1).uniform(1e-3, 1e3, (101, 1))
    groups = unique_groups(rows, epsilon)
    np.testing.assert_array_equal(groups, slow_groups(rows, epsilon))
    np.testing.assert_array_equal(groups[groups], groups)
    assert unique_count(rows, epsilon) == len(set(groups.tolist()))


def test_planted_duplicates_and_scale():
    rows = np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    planted = jnp.asarray(np.concatenate([rows, 3.0 * rows[:40], 1e-20 * rows[:2]]))
    assert unique_count(planted, 0.025) == 300
    np.testing.assert_array_equal(unique_groups(planted, 0.025)[300:340], np.arange(40))
    assert unique_count(np.ones((5, 3)), 1e-6) == 1


def test_threshold_is_strict():
    orthogonal = np.eye(3)
    assert unique_count(orthogonal, 1.0) == 3
    assert unique_count(orthogonal, 1.0 + 1e-9) == 1


def test_count_depends_on_order():
    middle_first = np.asarray([[1.0, 0.0], [1.0, 0.4], [1.0, -0.4]])
    epsilon = 1.0 - np.cos(np.arctan(0.4)) + 1e-6
    assert unique_count(middle_first, epsilon) == 1
    assert unique_count(middle_first[[1, 0, 2]], epsilon) == 2


def test_nearest_cosine(monkeypatch):
    monkeypatch.setattr(unique, "_BLOCK", 8)
    rows = np.random.default_rng(0).normal(size=(53, 4))
    norm = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    table = norm @ norm.T - 4.0 * np.eye(53)
    np.testing.assert_allclose(nearest_cosine(rows), table.max(axis=1), atol=1e-12)
    assert nearest_cosine(rows[:1])[0] == -np.inf


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], ValueError, "finite and non-zero.*1 of 2 rows.*first: row 1"),
        ([[1.0, np.nan]], ValueError, "finite and non-zero"),
        ([[np.inf, 1.0]], ValueError, "finite and non-zero"),
        (np.zeros((0, 3)), ValueError, "K = 0"),
        ([1.0, 2.0], ValueError, r"\[K,D\], got shape"),
        ([[1, 2]], TypeError, "got int64"),
        (np.ones((2, 2), np.float16), TypeError, "got float16"),
    ],
)
def test_rows_without_a_direction_are_refused(rows, error, message):
    for function in (lambda r: unique_groups(r, 0.1), nearest_cosine):
        with pytest.raises(error, match=message):
            function(rows if isinstance(rows, np.ndarray) else np.asarray(rows))


def test_negative_epsilon_is_refused():
    with pytest.raises(ValueError, match="epsilon must be 0 or more"):
        unique_groups(np.eye(2), -0.1)


@pytest.mark.slow
def test_codebook_of_the_paper_is_counted_within_its_time():
    """65,536 random unit vectors in 256 dimensions: all unique even at 0.5, the largest cosine about 0.38."""
    rows = np.random.default_rng(0).normal(size=(65_536, 256)).astype(np.float32)
    assert unique_count(rows, 0.5) == 65_536
    assert 0.34 < nearest_cosine(rows).max() < 0.42
