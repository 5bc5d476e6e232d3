"""The audit counts planted duplicates, dead prototypes and usage exactly, and its controls are what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from protojax.evals.attainable import attainable
from protojax.evals.audit import audit, live_mask, perplexity, random_unique, unique_counts, usage


def directions(seed: int, count: int, dim: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def orthogonal(count: int, dim: int) -> np.ndarray:
    return np.eye(count, dim, dtype=np.float32)


@pytest.mark.parametrize("copies", [1, 4])
def test_planted_duplicates_are_counted_exactly(copies):
    """24 orthogonal directions, each repeated at other norms and in any order, are 24 unique prototypes."""
    rng = np.random.default_rng(0)
    rows = np.repeat(orthogonal(24, 32), copies, axis=0) * rng.uniform(0.1, 10, (24 * copies, 1)).astype(np.float32)
    result = audit(rows[rng.permutation(len(rows))])
    assert result["unique"] == {"0.025": 24, "0.1": 24, "0.25": 24, "0.5": 24}
    assert (result["count"], result["dim"]) == (24 * copies, 32)
    assert result["nearest_cosine"]["0.5"] == pytest.approx(1.0 if copies > 1 else 0.0, abs=1e-6)


def test_epsilon_is_a_strict_cosine_distance():
    angle = np.arccos(1 - 0.2)
    pair = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    assert unique_counts(pair, (0.199, 0.201)) == {"0.199": 2, "0.201": 1}


def test_usage_equals_enumeration():
    prototypes, features, center = directions(0, 30, 8), directions(1, 500, 8) + 0.3, np.full(8, 0.2, np.float32)
    used = usage(prototypes, features, center=center, block=64)
    rows = features.astype(np.float64) - center[None, :]
    cosine = (rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ prototypes.astype(np.float64).T
    np.testing.assert_array_equal(used.nearest, cosine.argmax(axis=1))
    np.testing.assert_allclose(used.shares, np.bincount(cosine.argmax(axis=1), minlength=30) / 500, rtol=1e-15)
    assert used.coverage == pytest.approx(cosine.max(axis=1).mean(), abs=1e-7)
    assert used.undirected == 0


def test_usage_ignores_norms_so_no_scale_makes_a_prototype_alive():
    prototypes, features = directions(0, 12, 6), directions(1, 200, 6)
    longer = prototypes * np.linspace(0.01, 100, 12, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(usage(prototypes, features).nearest, usage(longer, features).nearest)


def test_duplicates_share_no_usage_the_first_takes_it_all():
    prototypes = np.repeat(directions(0, 10, 6), 3, axis=0)
    shares = usage(prototypes, directions(1, 300, 6)).shares
    assert shares.sum() == pytest.approx(1.0)
    assert not shares.reshape(10, 3)[:, 1:].any()


def test_live_is_strictly_above_a_tenth_of_the_fair_share():
    np.testing.assert_array_equal(live_mask(np.array([0.025, 0.026, 0.0, 0.949])), [False, True, False, True])


def test_perplexity_of_known_shares():
    assert perplexity(np.full(16, 1 / 16)) == pytest.approx(16.0)
    assert perplexity(np.array([0.0, 3.0, 0.0])) == pytest.approx(1.0)
    assert perplexity(np.zeros(5)) == 0.0


def test_dead_and_duplicate_prototypes_are_told_apart():
    """40 prototypes: 8 live directions, 16 copies of them, 16 that no feature is near. Unique alone says 24 of 40; only
    the 8 that features choose are live and unique."""
    axes = orthogonal(24, 24)
    prototypes = np.concatenate([axes[:8], axes[:8], axes[:8], axes[8:]])
    features = np.repeat(axes[:8], 50, axis=0) + 0.05 * directions(0, 400, 24)
    result = audit(prototypes, features)
    assert result["unique"]["0.5"] == 24
    assert result["live"] == 8
    assert result["live_unique"] == dict.fromkeys(("0.025", "0.1", "0.25", "0.5"), 8)
    assert result["perplexity"] == pytest.approx(8.0)
    assert result["rows"] == 400


def test_live_unique_counts_among_live_alone():
    """Three close live prototypes and a dead one between them: the dead one cannot stand for the live."""
    angles = np.deg2rad([20.0, 0.0, 40.0, 170.0])
    prototypes = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    features = prototypes[[1, 2]].repeat(10, axis=0)
    result = audit(prototypes, features, epsilons=(0.1,))
    assert result["live"] == 2
    assert result["unique"] == {"0.1": 2}  # 20 degrees covers 0 and 40
    assert result["live_unique"] == {"0.1": 2}  # 0 and 40 degrees are 40 apart


def test_collapsed_codebook_is_one():
    result = audit(np.ones((64, 8), np.float32), directions(0, 100, 8))
    assert set(result["unique"].values()) == {1}
    assert (result["live"], set(result["live_unique"].values())) == (1, {1})
    assert result["perplexity"] == pytest.approx(1.0)


def test_random_control_is_unique_where_random_directions_must_be():
    """In 256 dimensions the cosine of two random directions is below 0.5 with overwhelming probability (Hoeffding:
    2,000 pairs of 64 rows, exp(-256/8) each); in 2 dimensions 64 directions cannot be 0.5 apart."""
    assert random_unique(64, 256) == dict.fromkeys(("0.025", "0.1", "0.25", "0.5"), 64)
    assert random_unique(64, 2)["0.5"] <= 6
    assert random_unique(64, 2, seed=1) == random_unique(64, 2, seed=1)


def test_untrained_codebook_in_a_cone_is_unique_but_dead():
    """The catch of the metric: random prototypes are all unique; features in a narrow cone use a handful."""
    result = audit(directions(0, 256, 128), 1.0 + 0.05 * directions(1, 500, 128))
    assert result["unique"]["0.5"] == 256 == result["control"]["0.5"]
    assert result["live"] < 10
    assert result["live_unique"]["0.025"] == result["live"]


def test_centred_part_removes_a_common_direction():
    """Prototypes and features around one direction: all alike before, as spread as without it afterwards."""
    rng = np.random.default_rng(0)
    around = 0.02 * rng.standard_normal((32, 16)).astype(np.float32)
    common = np.zeros((1, 16), np.float32)
    common[0, 0] = 1.0
    prototypes = common + around
    features = common + np.repeat(around, 5, axis=0)
    result = audit(prototypes, features)
    assert result["unique"]["0.025"] == 1
    assert result["centred"]["unique"]["0.025"] == 32
    assert result["centred"]["live_unique"]["0.025"] == 32
    assert result["centred"]["perplexity"] == pytest.approx(32.0)
    assert result["centred"]["coverage"] == pytest.approx(1.0, abs=1e-4)


def test_the_estimators_centre_moves_features_and_not_prototypes():
    prototypes, features, center = directions(0, 20, 8), directions(1, 300, 8), np.linspace(-1, 1, 8)
    moved = audit(prototypes, (features + center[None, :]).astype(np.float32), center=center)
    plain = audit(prototypes, features)
    assert moved["unique"] == plain["unique"]
    assert (moved["live"], moved["live_unique"]) == (plain["live"], plain["live_unique"])
    assert moved["coverage"] == pytest.approx(plain["coverage"], abs=1e-6)


def test_total_collapse_has_no_direction_left():
    """Every feature and every prototype is one vector: nothing is live once the mean is gone, and nothing fails."""
    one = directions(0, 1, 8)
    result = audit(np.repeat(one, 6, axis=0), np.repeat(one, 50, axis=0))
    assert result["live"] == 1
    centred = result["centred"]
    assert (set(centred["unique"].values()), centred["live"], centred["perplexity"]) == ({1}, 0, 0.0)
    json.dumps(result, allow_nan=False)


def test_features_equal_to_the_centre_count_for_no_prototype():
    features = np.concatenate([np.ones((30, 4)), orthogonal(4, 4)[:1].repeat(10, axis=0)]).astype(np.float32)
    used = usage(orthogonal(4, 4), features, center=np.ones(4))
    assert used.undirected == 30
    assert (used.nearest == -1).sum() == 30
    assert used.shares.sum() == pytest.approx(10 / 40)


def test_permuting_prototypes_and_rows_permutes_usage():
    prototypes, features = directions(0, 15, 8), directions(1, 200, 8)
    order, rows = np.random.default_rng(2).permutation(15), np.random.default_rng(3).permutation(200)
    np.testing.assert_array_equal(
        usage(prototypes[order], features[rows]).shares, usage(prototypes, features).shares[order]
    )


def test_without_features_only_the_prototypes_are_judged():
    result = audit(directions(0, 12, 6))
    assert all(result[k] is None for k in ("live", "live_unique", "perplexity", "coverage", "centred", "rows"))
    assert audit(directions(0, 1, 6))["nearest_cosine"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 4), np.float32),), r"3 of 3 rows are zero \(first: row 0\)"),
        ((np.full((3, 4), np.nan, np.float32),), "prototypes: 3 of 3 rows hold NaN"),
        ((np.ones((3, 4), np.float32), np.ones((5, 6), np.float32)), "features have width 6, prototypes 4"),
        ((np.ones((3, 4), np.float32), np.ones((0, 4), np.float32)), "features: expected a non-empty matrix"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        audit(*arguments)


def test_a_centre_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"center: expected one value a column \(\(4,\)\)"):
        audit(np.eye(4, dtype=np.float32), np.ones((5, 4), np.float32), center=np.ones(3))


def test_counts_at_each_epsilon_equal_counts_alone():
    """Larger epsilons answer for smaller ones only where they may."""
    rows = np.concatenate([directions(0, 20, 4), directions(1, 3, 4).repeat(2, axis=0)])
    epsilons = (0.025, 0.0, 0.5, 1e-4)
    alone = {name: count for e in epsilons for name, count in unique_counts(rows, (e,)).items()}
    assert unique_counts(rows, epsilons) == alone
    assert list(alone) == ["0.025", "0", "0.5", "0.0001"]


def test_attainable_counts_are_those_of_the_features_directions():
    """Three directions, twenty rows each: however many centres are asked for, three can be told apart and live."""
    rows = np.repeat(np.eye(5)[:3], 20, axis=0) * np.random.default_rng(0).uniform(0.5, 2.0, (60, 1))
    found = attainable(rows, 10)
    assert found["features"] == {e: 3 for e in ("0.025", "0.1", "0.25", "0.5")}
    assert found["kmeans"]["unique"]["0.5"] == found["kmeans"]["live_unique"]["0.5"] == found["kmeans"]["live"] == 3
    assert found["kmeans"]["count"] == 10
    assert found["kmeans"]["coverage"] == pytest.approx(1.0)
    few = attainable(rows[:2], 10)  # fewer rows than prototypes
    assert (few["kmeans"]["count"], few["kmeans"]["live"]) == (2, 1)
