"""Few-shot classification: a handful of labelled rows a class, drawn several times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from protojax.evals.knn import check_labels
from protojax.evals.linear import logistic_weights
from protojax.evals.neighbours import all_cosines, check_pair, unit_rows

SHOTS = (1, 5, 10)
SEEDS = (0, 1, 2, 3, 4)
Classifier = Literal["centroid", "logistic"]


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows int64, ascending: `shots` of each class, or all that a smaller class has.

    A class's rows are in an order seeded by (seed, class), of which the first `shots` are taken: five shots contain the
    one shot of the same seed, and a class's rows do not depend on the other classes.
    """
    chosen = []
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        chosen.append(rows[np.random.default_rng((seed, int(c))).permutation(len(rows))[:shots]])
    return np.sort(np.concatenate([np.zeros(0, np.int64), *chosen]))


def centroid_predict(bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Class int64 [Q] whose centroid, the mean of its unit rows, has the largest cosine; ties to the lowest class.

    bank [M,F] with labels int [M], queries [Q,F]. A class without a row is never predicted. With one row a class this
    is the nearest neighbour.
    """
    present, which = np.unique(bank_labels, return_inverse=True)
    sums = np.zeros((len(present), bank.shape[1]))
    np.add.at(sums, which, unit_rows(bank))
    if present[-1] >= num_classes:
        raise ValueError(f"bank_labels: labels must be in 0..{num_classes - 1}, got {int(present[-1])}.")
    return np.concatenate([present[cosines.argmax(axis=1)] for _, cosines in all_cosines(queries, sums)])


def few_shot_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    num_classes: int,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    classifier: Classifier = "centroid",
    decay: float = 1e-3,
) -> dict[str, Any]:
    """Accuracy on queries from a few rows of the bank a class.

    Returns {str(shots): {'mean', 'std' (over seeds, N - 1; None for one), 'runs': [a seed's accuracy], 'rows': used,
    'short': classes with fewer rows than asked}}. classifier: 'centroid' (`centroid_predict`) or 'logistic'
    (`linear.logistic_weights` on unit rows with `decay`). A class that the bank lacks cannot be predicted: its queries
    count as wrong.

    Raises ValueError for labels outside 0..num_classes-1, shots < 1, no seed, another width, or rows not finite.
    """
    bank, queries = check_pair(bank, queries)
    bank_labels = check_labels(bank_labels, len(bank), num_classes, "bank_labels")
    query_labels = check_labels(query_labels, len(queries), num_classes, "query_labels")
    if not len(shots) or min(shots) < 1 or not len(seeds):
        raise ValueError(f"expected positive shots and at least one seed, got {tuple(shots)} and {tuple(seeds)}.")
    if classifier not in ("centroid", "logistic"):
        raise ValueError(f"classifier must be 'centroid' or 'logistic', got {classifier!r}.")
    sizes = np.unique(bank_labels, return_counts=True)[1]
    unit_queries = unit_rows(queries)
    result: dict[str, Any] = {}
    for count in sorted(set(shots)):
        runs = []
        for seed in seeds:
            rows = draw_shots(bank_labels, count, seed)
            if classifier == "centroid":
                predicted = centroid_predict(bank[rows], bank_labels[rows], queries, num_classes=num_classes)
            else:
                weights, biases = logistic_weights(unit_rows(bank[rows]), bank_labels[rows], decay, num_classes)
                predicted = (unit_queries @ weights + biases[None, :]).argmax(axis=1)
            runs.append(float((predicted == query_labels).mean()))
        result[str(int(count))] = {
            "mean": float(np.mean(runs)),
            "std": float(np.std(runs, ddof=1)) if len(runs) > 1 else None,
            "runs": runs,
            "rows": int(np.minimum(sizes, count).sum()),
            "short": int((sizes < count).sum()),
        }
    return result
