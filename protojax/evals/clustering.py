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


def _pairs(counts: np.ndarray) -> float:
    """How many pairs of rows lie in one cell: sum of n (n - 1) / 2."""
    return float(np.sum(counts * (counts - 1.0)) / 2.0)


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
    together, rows, columns = _pairs(counts), _pairs(counts.sum(axis=1)), _pairs(counts.sum(axis=0))
    total = _pairs(counts.sum(keepdims=True))
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


def pair_precision(labels: np.ndarray, assignment: np.ndarray) -> float:
    """Share of the pairs of rows of one cluster that are of one class; 1 when no cluster has two rows.

    Unlike purity it gives nothing for clusters of one row, and it is what a loss that draws the rows of a cluster
    together gets right."""
    counts = contingency(labels, assignment)
    together = _pairs(counts.sum(axis=0))
    return _pairs(counts) / together if together else 1.0


def clustering_scores(labels: np.ndarray, assignment: np.ndarray) -> dict[str, float]:
    """{'nmi', 'ari', 'hungarian', 'purity', 'pair_precision'} of an assignment int [N] against labels int [N]."""
    return {
        "nmi": normalised_mutual_information(labels, assignment),
        "ari": adjusted_rand_index(labels, assignment),
        "hungarian": hungarian_accuracy(labels, assignment),
        "purity": purity(labels, assignment),
        "pair_precision": pair_precision(labels, assignment),
    }
