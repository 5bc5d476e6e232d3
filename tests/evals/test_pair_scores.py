"""Matching with hard negatives and known factors: what is chance, what is perfect, and what is brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from protojax.evals.pair_scores import area_under_curve, best_threshold, factor_score, matching, pair_cosines

D, M = 6, 40


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, M) / 4.0, rng.random(M) < 0.5  # many scores tie
    chosen = np.mean((scores > best_threshold(scores, truth)) == truth)
    tried = [np.mean((scores > t) == truth) for t in [-1.0, *np.arange(0.125, 2.0, 0.125)]]
    assert chosen == max(tried)


def test_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 5, M).astype(float), rng.random(M) < 0.4
    wins = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(scores[truth], scores[~truth])]
    assert area_under_curve(scores, truth) == pytest.approx(np.mean(wins), rel=1e-12)
    assert area_under_curve(-scores, truth) == pytest.approx(1.0 - np.mean(wins), rel=1e-12)


def test_a_constant_side_is_left_with_the_majority_and_an_area_of_one_half():
    constant, image, truth = np.ones((M, D), np.float32), draw(0, M, D), np.arange(M) < 24
    found = matching((constant, constant, truth), (constant, constant, truth), widths=(D, 2))
    assert found["majority"] == 0.6
    assert found["accuracy"] == {"6": 0.6, "2": 0.6}
    assert found["auc"] == {"6": 0.5, "2": 0.5}
    assert found["pairs"] == M
    # A text that belongs to the image when it is true, and to its opposite when it is not: nothing is mistaken.
    text = np.where(truth[:, None], image, -image)
    told = matching((image, text, truth), (image, text, truth), widths=(D,))
    assert told["accuracy"]["6"] == told["auc"]["6"] == 1.0
    np.testing.assert_allclose(pair_cosines(image, 3.0 * image, 2), 1.0, atol=1e-6)


def test_the_error_of_the_area_is_that_of_scores_that_know_nothing():
    truth, rng = np.arange(M) < 24, np.random.default_rng(0)
    areas = [area_under_curve(rng.permutation(M).astype(float), truth) for _ in range(400)]
    pairs = (draw(0, M, D), draw(1, M, D), truth)
    said = matching(pairs, pairs, widths=(D,))
    # The standard deviation of 400 draws is known to 1 / sqrt(2 x 400) of itself.
    assert np.std(areas) == pytest.approx(said["auc_error"], rel=4 / np.sqrt(800))


def test_factors_that_are_there_and_factors_that_are_not():
    known = draw(0, 300, 4)
    there = (known @ draw(1, 4, 10) + 3.0).astype(np.float32)
    fit, held = slice(0, 200), slice(200, 300)
    found = factor_score(there[fit], known[fit], there[held], known[held])
    assert found["r2"] == pytest.approx(1.0, abs=1e-8)
    assert found["r2_least"] == pytest.approx(1.0, abs=1e-8)
    assert found["factors"] == 4
    # One factor of four is missing: its own score is nothing, the others' stay.
    less = (known[:, :3] @ draw(2, 3, 10)).astype(np.float32)
    part = factor_score(less[fit], known[fit], less[held], known[held])
    errors = 2.0 / np.sqrt(100)  # of an R^2 of one factor that is 0, on 100 rows: sqrt(2 / 100), and the fit's own
    assert part["r2"] == pytest.approx(0.75, abs=errors)
    assert abs(part["r2_least"]) < errors
    constant = np.ones((300, 10), np.float32)
    assert factor_score(constant[fit], known[fit], constant[held], known[held])["r2"] == pytest.approx(0.0, abs=1e-12)


def test_what_is_refused():
    scores = np.arange(4.0)
    with pytest.raises(ValueError, match=r"one number a pair, got \(4,\) and \(3,\)"):
        best_threshold(scores, np.ones(3, bool))
    with pytest.raises(ValueError, match="one is NaN or infinite"):
        area_under_curve(scores * np.nan, np.ones(4, bool))
    with pytest.raises(ValueError, match="true and false pairs, got 4 true ones of 4"):
        area_under_curve(scores, np.ones(4, bool))
    with pytest.raises(ValueError, match="3 embeddings but 4 rows of factors"):
        factor_score(draw(0, 3, 2), draw(1, 4, 1), draw(0, 3, 2), draw(1, 3, 1))
