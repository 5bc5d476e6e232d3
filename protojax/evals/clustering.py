"""How well an assignment of rows to prototypes (or clusters) matches classes. All symmetric under renaming."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def contingency(labels: np.ndarray, assignment: np.ndarray) -> np.ndarray:
    """Counts float64 [classes present, clusters present]. Raises ValueError unless both are vectors [N], N > 0."""
    labels, assignment = np.asarray(labels), np.asarray(assignment)
    if labels.ndim != 1 or labels.shape != assignment.shape or not labels.size:
        raise ValueError(
            f"labels and assignment must be non-empty vectors of one length, got {labels.shape} and {assignment.shape}."
        )
    classes, row = np.unique(labels, return_inverse=True)
    clusters, column = np.unique(assignment, return_inverse=True)
    counts = np.bincount(row * len(clusters) + column, minlength=len(classes) * len(clusters))
    return counts.reshape(len(classes), len(clusters)).astype(np.float64)


def normalised_mutual_information(labels: np.ndarray, assignment: np.ndarray) -> float:
    """I(labels; assignment) / mean of the two entropies, in [0, 1]; 1 when both have one value only."""
    joint = contingency(labels, assignment)
    joint /= joint.sum()
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    entropies = -float(rows @ np.log(rows)) - float(columns @ np.log(columns))
    if len(rows) == len(columns) == 1:
        return 1.0
    filled = joint > 0
    information = float(np.sum(joint[filled] * (np.log(joint[filled]) - np.log(np.outer(rows, columns)[filled]))))
    return max(0.0, min(1.0, 2.0 * information / entropies))


def adjusted_rand_index(labels: np.ndarray, assignment: np.ndarray) -> float:
    """Rand index minus its expectation under random assignment, over its maximum minus that (Hubert & Arabie 1985).

    1 for the same partition, about 0 by chance, may be negative.
    """
    counts = contingency(labels, assignment)

    def pairs(n: np.ndarray) -> float:
        return float(np.sum(n * (n - 1.0)) / 2.0)

    together, rows, columns = pairs(counts), pairs(counts.sum(axis=1)), pairs(counts.sum(axis=0))
    total = pairs(counts.sum(keepdims=True))
    expected = rows * columns / total if total else 0.0
    largest = (rows + columns) / 2.0
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def hungarian_accuracy(labels: np.ndarray, assignment: np.ndarray) -> float:
    """Largest share of rows that a one-to-one matching of clusters to classes gets right."""
    counts = contingency(labels, assignment)
    row, column = linear_sum_assignment(counts, maximize=True)
    return float(counts[row, column].sum()) / float(counts.sum())


def purity(labels: np.ndarray, assignment: np.ndarray) -> float:
    """Share of rows of the largest class of their cluster; 1 when every row is its own cluster, so read it with K."""
    counts = contingency(labels, assignment)
    return float(counts.max(axis=0).sum()) / float(counts.sum())


def clustering_scores(labels: np.ndarray, assignment: np.ndarray) -> dict[str, float]:
    """{'nmi', 'ari', 'hungarian', 'purity'} of an assignment int [N] against labels int [N]."""
    return {
        "nmi": normalised_mutual_information(labels, assignment),
        "ari": adjusted_rand_index(labels, assignment),
        "hungarian": hungarian_accuracy(labels, assignment),
        "purity": purity(labels, assignment),
    }
