"""Weighted k-nearest-neighbour classification on frozen features, and accuracy by groups of classes.

Votes of query i for class c (Wu et al. 2018; Caron et al. 2021): sum over its k nearest bank rows j of class c of
exp(cos(i, j) / T). Exact, blocked, independent of the number of devices; ties go to the lowest bank index among
neighbours and to the lowest class id among classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from protojax.evals.neighbours import Neighbours, nearest_rows

DEFAULT_KS = (10, 20, 100, 200)


def check_labels(labels: np.ndarray, rows: int, num_classes: int, name: str) -> np.ndarray:
    """`labels` as int64 [rows] in 0..num_classes-1, or ValueError."""
    labels = np.asarray(labels)
    if labels.shape != (rows,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name}: expected {rows} integer labels, got shape {labels.shape} of {labels.dtype}.")
    if rows and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(
            f"{name}: labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}; "
            "drop unlabelled rows or correct num_classes."
        )
    return labels.astype(np.int64)


def check_ks(ks: Sequence[int], bank_rows: int, clamp: bool) -> dict[int, int]:
    """k -> neighbours used, ascending. Raises ValueError for k < 1, and for k > bank_rows unless `clamp`."""
    if not len(ks) or min(ks) < 1:
        raise ValueError(f"ks: expected positive numbers of neighbours, got {tuple(ks)}.")
    large = [int(k) for k in ks if k > bank_rows]
    if large and not clamp:
        raise ValueError(
            f"k = {large} is larger than the bank of {bank_rows} rows; use smaller ks or clamp=True (k then means "
            "every row of the bank)."
        )
    return {int(k): min(int(k), bank_rows) for k in sorted(set(ks))}


def votes_of(
    neighbours: Neighbours, bank_labels: np.ndarray, k: int, temperature: float, num_classes: int
) -> np.ndarray:
    """Votes of the k nearest for each class, float64 [Q,C].

    Weights are exp((cos - cos_nearest) / T): the same shares as exp(cos / T) and no overflow at small T. A class's
    votes are added nearest first, so classes with equal neighbours tie exactly.
    """
    weights = np.exp((neighbours.cosines[:, :k] - neighbours.cosines[:, :1]) / temperature)
    classes = bank_labels[neighbours.indices[:, :k]]
    rows = np.arange(len(classes))[:, None]
    votes = np.bincount((rows * num_classes + classes).ravel(), weights.ravel(), minlength=len(classes) * num_classes)
    return votes.reshape(len(classes), num_classes)


def knn_predict(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    *,
    num_classes: int,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = 0.07,
    clamp: bool = False,
    block: int = 1024,
) -> dict[int, np.ndarray]:
    """Predicted class of each query for each k.

    bank [M,F] with bank_labels [M], queries [Q,F] -> {k: int64 [Q]}. clamp: let k > M mean M. Raises ValueError for
    labels outside 0..num_classes-1, k larger than the bank, a temperature that is not positive, or rows that are
    not finite matrices of one width.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    bank_labels = check_labels(bank_labels, len(bank), num_classes, "bank_labels")
    used = check_ks(ks, len(bank), clamp)
    predicted: dict[int, list[np.ndarray]] = {k: [] for k in used}
    for start in range(0, len(queries), block):  # votes are [block, C]: bounded whatever Q
        neighbours = nearest_rows(queries[start : start + block], bank, max(used.values()), block=block)
        for k, count in used.items():
            predicted[k].append(votes_of(neighbours, bank_labels, count, temperature, num_classes).argmax(axis=1))
    return {k: np.concatenate(parts) if parts else np.zeros(0, np.int64) for k, parts in predicted.items()}


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    num_classes: int,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = 0.07,
    clamp: bool = False,
    block: int = 1024,
) -> tuple[dict[int, float], dict[int, np.ndarray]]:
    """({k: share of queries classified correctly}, {k: correct bool [Q]}); arguments and errors of `knn_predict`."""
    query_labels = check_labels(query_labels, len(queries), num_classes, "query_labels")
    if not len(queries):
        raise ValueError("queries: expected at least one row to classify, got none.")
    predicted = knn_predict(
        bank, bank_labels, queries, num_classes=num_classes, ks=ks, temperature=temperature, clamp=clamp, block=block
    )
    correct = {k: p == query_labels for k, p in predicted.items()}
    return {k: float(c.mean()) for k, c in correct.items()}, correct


def accuracy_by_group(
    correct: np.ndarray, labels: np.ndarray, groups: Mapping[str, Sequence[int] | np.ndarray]
) -> dict[str, Any]:
    """Accuracy of groups of classes, for example head, medium and tail.

    correct bool [Q], labels int [Q], groups: name -> class ids. Returns {name: share of the group's *queries* that
    are correct, ..., 'macro': {name: mean over its *classes* of their accuracy}, 'micro': over all queries, 'balanced':
    mean over all classes that have a query}. A group without queries is None. Raises ValueError when a class is in
    two groups or lengths differ.
    """
    correct, labels = np.asarray(correct, bool), np.asarray(labels)
    if correct.shape != labels.shape or correct.ndim != 1:
        raise ValueError(f"correct and labels must be vectors of one length, got {correct.shape} and {labels.shape}.")
    members = {name: np.asarray(ids, np.int64).ravel() for name, ids in groups.items()}
    ids, times = np.unique(np.concatenate([np.zeros(0, np.int64), *members.values()]), return_counts=True)
    if (times > 1).any():
        raise ValueError(f"classes {ids[times > 1].tolist()} are in more than one of the groups {sorted(groups)}.")
    classes, which = np.unique(labels, return_inverse=True)
    total = np.bincount(which, minlength=len(classes))
    hits = np.bincount(which, correct, minlength=len(classes))
    per_class = hits / np.maximum(total, 1)

    def micro(mask: np.ndarray) -> float | None:
        return float(hits[mask].sum() / total[mask].sum()) if mask.any() else None

    def macro(mask: np.ndarray) -> float | None:
        return float(per_class[mask].mean()) if mask.any() else None

    masks = {name: np.isin(classes, member) for name, member in members.items()}
    everything = np.ones(len(classes), bool)
    return {
        **{name: micro(mask) for name, mask in masks.items()},
        "macro": {name: macro(mask) for name, mask in masks.items()},
        "micro": micro(everything),
        "balanced": macro(everything),
    }
