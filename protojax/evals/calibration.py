"""Calibration: is a prediction of 80% right 80% of the time?

Labels are class numbers int [M], or target distributions [M,C] (soft labels): what a prediction is held against is then
the target mass of the predicted class, which for class numbers is 1 where the prediction is right and 0 elsewhere.
Predicted class: the largest probability, ties to the lowest class.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from protojax.evals.knn import check_labels

Binning = Literal["width", "mass"]
SUM_TOLERANCE = 0.02  # bfloat16 has 8 bits: a sum of rounded probabilities is off by up to 2^-8, and logits add theirs
SMALLEST = 1e-12  # a probability below this counts as this in the log-likelihood, which stays finite


def check_probabilities(probabilities: np.ndarray, name: str = "probabilities") -> np.ndarray:
    """`probabilities` as float64 [M,C]: non-negative and finite, rows of sum 1 (to 0.02, the rounding of bfloat16).

    float16, bfloat16, float32 and float64 are taken; rows are not renormalised. Raises ValueError.
    """
    given = np.asarray(probabilities)
    if given.ndim != 2 or 0 in given.shape:
        raise ValueError(f"{name}: expected a non-empty matrix [rows, classes], got shape {given.shape}.")
    rows = given.astype(np.float64)
    if not np.isfinite(rows).all():
        bad = ~np.isfinite(rows).all(axis=1)
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(rows)} rows hold NaN or infinity (first: row {int(np.argmax(bad))})."
        )
    off = np.abs(rows.sum(axis=1) - 1.0)
    if np.min(rows) < 0 or off.max() > SUM_TOLERANCE:
        worst = int(np.argmax(np.where(rows.min(axis=1) < 0, np.inf, off)))
        raise ValueError(
            f"{name}: expected rows >= 0 that add up to 1, but row {worst} has smallest entry "
            f"{float(np.min(rows[worst])):.4g} and sum {float(np.sum(rows[worst])):.4g}; are these logits? Apply "
            "softmax first."
        )
    return rows


def ece(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15, *, binning: Binning = "width") -> float:
    """Expected calibration error of the predicted class: sum_b n_b / M |accuracy_b - confidence_b|, in 0..1.

    probabilities [M,C], labels int [M] or targets [M,C]. confidence: the largest probability; accuracy_b: mean target
    mass of the predicted class in the bin. binning: 'width', bins (i/n, (i+1)/n] (Guo et al. 2017), or 'mass', bins of
    equal numbers of rows by confidence. Raises ValueError as `reliability`.
    """
    return _gap(reliability(probabilities, labels, bins, binning=binning))


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 15, *, binning: Binning = "width"
) -> dict[str, list[Any]]:
    """The reliability diagram of the predicted class, bin by bin.

    Returns {'lower', 'upper': the bin's limits (of 'mass': its smallest and largest confidence), 'count': rows,
    'confidence', 'accuracy': means over its rows, None when it has none}. Arguments as `ece`. With 'mass' the first
    M mod bins bins have one row more, and rows of equal confidence share their mean accuracy, so that the order of
    rows does not matter.

    Raises ValueError for rows that are no distribution, labels outside 0..C-1, targets of another shape, bins < 1 or
    an unknown binning.
    """
    rows, targets = _checked(probabilities, labels)
    predicted = rows.argmax(axis=1)
    picked = np.arange(len(rows)), predicted
    return _binned(rows[picked], targets[picked], bins, binning)


def classwise_ece(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 15, *, binning: Binning = "width"
) -> float:
    """Mean over classes c of the calibration error of column c against the target mass of class c (Kull et al. 2019).

    Arguments and errors as `ece`. A class without a row still counts: predicting it is then always wrong.
    """
    rows, targets = _checked(probabilities, labels)
    return float(np.mean([_gap(_binned(r, t, bins, binning)) for r, t in zip(rows.T, targets.T, strict=True)]))


def calibration_scores(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict[str, float]:
    """{'ece', 'ece_mass', 'ece_classwise', 'largest_gap', 'nll', 'brier', 'confidence', 'accuracy'} of one prediction.

    ece_mass: with bins of equal mass. largest_gap: over the bins of `ece` that hold rows. nll: mean cross-entropy in
    nats, probabilities below 1e-12 counted as 1e-12. brier: mean squared distance of a row to its target (0..2).
    """
    rows, targets = _checked(probabilities, labels)
    table = reliability(rows, targets, bins)
    filled = [(a, c) for a, c, n in zip(table["accuracy"], table["confidence"], table["count"], strict=True) if n]
    picked = np.arange(len(rows)), rows.argmax(axis=1)
    return {
        "ece": _gap(table),
        "ece_mass": ece(rows, targets, bins, binning="mass"),
        "ece_classwise": classwise_ece(rows, targets, bins),
        "largest_gap": max(abs(a - c) for a, c in filled),
        "nll": float(-(targets * np.log(np.maximum(rows, SMALLEST))).sum(axis=1).mean()),
        "brier": float(np.square(rows - targets).sum(axis=1).mean()),
        "confidence": float(rows[picked].mean()),
        "accuracy": float(targets[picked].mean()),
    }


def fit_temperature(logits: np.ndarray, labels: np.ndarray, *, lowest: float = 0.01, highest: float = 100.0) -> float:
    """The T > 0 whose softmax(logits / T) has the largest likelihood (Guo et al. 2017); fit it on validation rows.

    logits [M,C], labels int [M] or targets [M,C]. The negative log-likelihood is convex in 1/T, so the minimum between
    the two limits is the only one; a limit is returned where it lies outside (separable rows: `lowest`). Raises
    ValueError for logits that are not a finite matrix, or labels as `ece`.
    """
    logits = np.asarray(logits).astype(np.float64)
    if logits.ndim != 2 or 0 in logits.shape or not np.isfinite(logits).all():
        raise ValueError(f"logits: expected a finite non-empty matrix [rows, classes], got shape {logits.shape}.")
    targets = _targets(labels, *logits.shape)

    def loss(inverse: float) -> float:
        return float(-(targets * log_softmax(inverse * logits, axis=1)).sum(axis=1).mean())

    bounds = 1.0 / highest, 1.0 / lowest
    inverse = float(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
    return 1.0 / min((inverse, *bounds), key=loss)


# --------------------------------------------------------------------------------------------------- helpers
def _checked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = check_probabilities(probabilities)
    return rows, _targets(labels, *rows.shape)


def _targets(labels: np.ndarray, rows: int, classes: int) -> np.ndarray:
    """Target distributions float64 [M,C] of class numbers [M], or of targets [M,C]."""
    labels = np.asarray(labels)
    if labels.ndim == 2:
        if labels.shape != (rows, classes):
            raise ValueError(f"targets: expected shape {(rows, classes)} as the predictions, got {labels.shape}.")
        return check_probabilities(labels, "targets")
    return np.eye(classes)[check_labels(labels, rows, classes, "labels")]


def _binned(confidence: np.ndarray, hit: np.ndarray, bins: int, binning: str) -> dict[str, list[Any]]:
    """The table of `reliability` for confidences [M] and target masses [M]."""
    if isinstance(bins, bool) or not isinstance(bins, int | np.integer) or bins < 1:
        raise ValueError(f"bins: expected a whole number >= 1, got {bins!r}.")
    if binning == "width":
        edges = np.linspace(0.0, 1.0, bins + 1)
        which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
        lower, upper = edges[:-1], edges[1:]
    elif binning == "mass":
        _, tied = np.unique(confidence, return_inverse=True)
        hit = (np.bincount(tied, hit) / np.bincount(tied))[tied]
        order = np.argsort(confidence, kind="stable")
        parts = np.array_split(order, min(bins, len(order)))
        which = np.empty(len(order), np.int64)
        for i, part in enumerate(parts):
            which[part] = i
        bins = len(parts)
        lower, upper = (np.array([confidence[part[end]] for part in parts]) for end in (0, -1))
    else:
        raise ValueError(f"binning must be 'width' or 'mass', got {binning!r}.")
    count = np.bincount(which, minlength=bins)
    sums = [np.bincount(which, values, minlength=bins) for values in (confidence, hit)]
    means = [[float(s / n) if n else None for s, n in zip(total, count, strict=True)] for total in sums]
    return {
        "lower": lower.tolist(),
        "upper": upper.tolist(),
        "count": count.tolist(),
        "confidence": means[0],
        "accuracy": means[1],
    }


def _gap(table: dict[str, list[Any]]) -> float:
    rows = zip(table["count"], table["accuracy"], table["confidence"], strict=True)
    return float(sum(n * abs(a - c) for n, a, c in rows if n) / sum(table["count"]))
