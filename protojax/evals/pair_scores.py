"""Scores of aligned pairs beside retrieval: is this sentence true of this image, and is known content still there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from protojax.evals.retrieval_pairs import TIE, prefix_units


def pair_cosines(image: np.ndarray, text: np.ndarray, width: int) -> np.ndarray:
    """Cosine of every pair's first `width` numbers, float64 [M], on a grid of 1e-6 so that what is equal ties."""
    units = [prefix_units(rows, width).astype(np.float64) for rows in (image, text)]
    return np.round(np.einsum("md,md->m", *units) / TIE) * TIE


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The threshold t for which 'true where score > t' is right most often on scores [M] with truth bool [M].

    Candidates lie half-way between neighbouring distinct scores, and at -inf and inf (everything true, everything
    false: what a constant score is left with). Of equally good ones the lowest counts. Raises ValueError for other
    shapes, no rows, or scores that are not finite."""
    scores, truth = _checked(scores, truth)
    values, number = np.unique(scores, return_inverse=True)
    true, false = (np.bincount(number, weights=side, minlength=len(values)) for side in (truth, ~truth))
    # With the first i distinct scores below the threshold: their false pairs and the others' true pairs are right.
    right = np.concatenate([[0.0], np.cumsum(false)]) + truth.sum() - np.concatenate([[0.0], np.cumsum(true)])
    cuts = np.concatenate([[-np.inf], 0.5 * (values[1:] + values[:-1]), [np.inf]])
    return float(cuts[int(np.argmax(right))])


def area_under_curve(scores: np.ndarray, truth: np.ndarray) -> float:
    """Probability that a true pair scores above a false one, ties counted half (Mann and Whitney): 0.5 for scores
    that know nothing. Raises ValueError as `best_threshold`, and unless both kinds are there."""
    scores, truth = _checked(scores, truth)
    true = int(truth.sum())
    if true in (0, len(truth)):
        raise ValueError(f"expected true and false pairs, got {true} true ones of {len(truth)}")
    above = float(np.sum(rankdata(scores)[truth])) - true * (true + 1) / 2
    return above / (true * (len(truth) - true))


def matching(
    choosing: tuple[np.ndarray, np.ndarray, np.ndarray],
    scored: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    widths: Sequence[int],
) -> dict[str, Any]:
    """Is the text true of the image? (image [M,D], text [M,D], truth [M]) of the pairs that choose the threshold, and
    of those that are scored: {'accuracy': {str(d)}, 'auc': {str(d)}, 'threshold': {str(d)}, 'majority': accuracy of
    always saying the more frequent answer, 'auc_error': sampling error of the AUC of scores that know nothing, sqrt((t
    + f + 1) / (12 t f)) of t true and f false pairs, 'pairs': M}."""
    found: dict[str, dict[str, float]] = {"accuracy": {}, "auc": {}, "threshold": {}}
    truth = np.asarray(scored[2], bool)
    for width in widths:
        threshold = best_threshold(pair_cosines(*choosing[:2], width), choosing[2])
        scores = pair_cosines(*scored[:2], width)
        found["accuracy"][str(width)] = float(np.mean((scores > threshold) == truth))
        found["auc"][str(width)] = area_under_curve(scores, truth)
        found["threshold"][str(width)] = float(np.clip(threshold, -2.0, 2.0))  # JSON has no infinity; |cosine| <= 1
    share, size = float(np.mean(truth)), len(truth)
    error = float(np.sqrt((size + 1) / (12.0 * share * (1.0 - share) * size**2)))
    return {**found, "majority": max(share, 1.0 - share), "auc_error": error, "pairs": size}


def factor_score(
    train: np.ndarray, train_factors: np.ndarray, test: np.ndarray, test_factors: np.ndarray
) -> dict[str, float]:
    """How much of known factors u [.,F] embeddings [.,D] hold: R^2 = 1 - sum |u - (x W + b)|^2 / sum |u - mean u|^2 on
    test, with W, b the least squares of train and mean u of train. {'r2': all factors together, 'r2_least': the worst
    factor's, 'factors': F}: 1 for known exactly, 0 for nothing known (below 0: the fit is noise).

    Raises ValueError for rows that are not in step."""
    for rows, factors in ((train, train_factors), (test, test_factors)):
        if len(rows) != len(factors):
            raise ValueError(f"{len(rows)} embeddings but {len(factors)} rows of factors: they are out of step")
    mean, centre = (a.mean(axis=0, dtype=np.float64) for a in (train, train_factors))
    # Directions below float32's resolution are rounding noise of an embedding that is constant there.
    weights = np.linalg.lstsq(train.astype(np.float64) - mean, train_factors - centre, rcond=1e-6)[0]
    error = np.square(test_factors - centre - (test.astype(np.float64) - mean) @ weights).sum(axis=0)
    whole = np.square(test_factors - centre).sum(axis=0)
    return {
        "r2": 1.0 - float(error.sum()) / float(whole.sum()),
        "r2_least": float(np.min(1.0 - error / whole)),
        "factors": int(test_factors.shape[1]),
    }


def _checked(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = np.asarray(scores, np.float64), np.asarray(truth, bool)
    if scores.ndim != 1 or scores.shape != truth.shape or not len(scores):
        raise ValueError(f"scores and truth must be one number a pair, got {scores.shape} and {truth.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite; one is NaN or infinite")
    return scores, truth
