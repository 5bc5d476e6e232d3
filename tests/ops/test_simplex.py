"""Closed forms on the simplex equal numerical searches."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from protojax.ops import simplex

# The page of the spec: C = 8.
TABLE = {0.25: (0.157, 2.075), 0.5: (0.196, 2.059), 0.72: (0.236, 2.033), 1: (0.294, 1.980), 1.2: (0.340, 1.925),
         1.5: (0.415, 1.817), 2: (0.548, 1.568), 3: (0.779, 0.957), 4: (0.911, 0.472), 6: (0.989, 0.084)}  # fmt: skip


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


@pytest.mark.parametrize(("ratio", "expected"), TABLE.items())
def test_the_published_table(ratio, expected):
    assert simplex.largest_probability(8, ratio) == pytest.approx(expected[0], abs=6e-4)
    assert simplex.least_entropy(8, ratio) == pytest.approx(expected[1], abs=6e-4)


@pytest.mark.parametrize(("categories", "ratio"), [(2, 0.5), (3, 1.0), (8, 0.25), (8, 1.5), (8, 4.0), (20, 2.0)])
def test_a_search_over_the_ball_finds_nothing_beyond(categories, ratio):
    """max of p_1 and min of H over |u| <= 1, from many starts, agree with the closed forms to 1e-6."""
    rng = np.random.default_rng(0)

    def unit(x):
        return ratio * x / max(np.linalg.norm(x), 1e-12)

    def entropy(x):
        p = softmax(unit(x))
        return float(-(p * np.log(np.maximum(p, 1e-300))).sum())

    starts = [*np.eye(categories)[:2], *rng.standard_normal((6, categories))]
    top = max(-minimize(lambda x: -softmax(unit(x))[0], s, tol=1e-12).fun for s in starts)
    least = min(minimize(entropy, s, tol=1e-12).fun for s in starts)
    assert top == pytest.approx(simplex.largest_probability(categories, ratio), abs=1e-6)
    assert least == pytest.approx(simplex.least_entropy(categories, ratio), abs=1e-6)


def test_the_inverse_and_the_limits():
    for categories in (2, 8):
        for ratio in (0.3, 2.0):
            assert simplex.ratio_for(categories, simplex.largest_probability(categories, ratio)) == pytest.approx(ratio)
        assert simplex.largest_probability(categories, 0.0) == pytest.approx(1 / categories)
        assert simplex.least_entropy(categories, 0.0) == pytest.approx(math.log(categories))
        assert simplex.least_entropy(categories, 500.0) == pytest.approx(0.0, abs=1e-12)


def test_mistakes():
    with pytest.raises(ValueError, match="at least 2 categories, got 1"):
        simplex.largest_probability(1, 1.0)
    with pytest.raises(ValueError, match=r"number in \(1/8, 1\), got 0.1"):
        simplex.ratio_for(8, 0.1)
    with pytest.raises(ValueError, match="a number >= 0, got -1"):
        simplex.largest_probability(8, -1)
