"""Retrieval: how high the right rows of a gallery stand, with ties counted at their expectation.

A constant encoder gives every row the same score. Whoever breaks ties by position then reports luck; here a number is
the mean over all orders of the tied rows, computed in closed form, so that a constant encoder is exactly at chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from protojax.evals.knn import check_labels
from protojax.evals.neighbours import all_cosines, check_pair

DEFAULT_RECALLS = (1, 5, 10)


class Best(NamedTuple):
    """Of each query's best positive: above [Q] rows with a larger score, tied [Q] rows with an equal score (itself
    included), positives [Q] of these that are positive; int64. A query without a positive has positives = 0."""

    above: np.ndarray
    tied: np.ndarray
    positives: np.ndarray


class Retrieval(NamedTuple):
    """recall: k -> float64 [Q], the probability of a positive among the first k. average_precision, rank float64 [Q]:
    expectations. without: queries that have no positive; they are NaN above and in no mean."""

    recall: dict[int, np.ndarray]
    average_precision: np.ndarray
    rank: np.ndarray
    without: int

    def means(self) -> dict[str, object]:
        """{'recall': {str(k): mean}, 'map', 'mean_rank', 'median_rank', 'mrr', 'queries', 'without'}.

        Means are None when no query has a positive. mrr: mean of 1 / expected rank."""
        seen = ~np.isnan(self.rank)
        some = bool(seen.any())
        return {
            "recall": {str(k): float(v[seen].mean()) if some else None for k, v in self.recall.items()},
            "map": float(self.average_precision[seen].mean()) if some else None,
            "mean_rank": float(self.rank[seen].mean()) if some else None,
            "median_rank": float(np.median(self.rank[seen])) if some else None,
            "mrr": float((1.0 / self.rank[seen]).mean()) if some else None,
            "queries": int(seen.sum()),
            "without": self.without,
        }


def best_positive(scores: np.ndarray, positive: np.ndarray, tolerance: float = 0.0) -> Best:
    """Where each query's best positive stands.

    scores [Q,M] (larger is better; -inf takes a row out of the gallery), positive bool [Q,M]. Scores that lead to the
    best positive's in steps of at most `tolerance` count as equal to it. (A window around each query's own positive
    makes a equal to b and b to c but not a to c: queries that all score the gallery alike are then not at chance.)
    Raises ValueError for other shapes or NaN.
    """
    scores, positive = _checked(scores, positive)
    best = np.where(positive, scores, -np.inf).max(axis=1, keepdims=True)
    has = np.isfinite(best)
    low, high = (best, best) if tolerance == 0.0 else _block(scores, best, tolerance)
    tied = (scores >= low) & (scores <= high) & has
    return Best(((scores > high) & has).sum(axis=1), tied.sum(axis=1), (tied & positive).sum(axis=1))


def _block(scores: np.ndarray, best: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest score [Q,1] of the run of scores, sorted, around `best` whose steps are <= tolerance."""
    ordered = np.sort(scores, axis=1)
    with np.errstate(invalid="ignore"):  # -inf - -inf: between rows that are not in the gallery
        apart = np.diff(ordered, axis=1) > tolerance
    ends = _runs(np.concatenate([np.ones((len(scores), 1), bool), apart], axis=1))
    at = np.minimum((ordered < best).sum(axis=1, keepdims=True), scores.shape[1] - 1)
    low, high = (np.take_along_axis(ordered, np.take_along_axis(end, at, axis=1), axis=1) for end in ends)
    return low, high


def _runs(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last place int [Q,M] of the run that each place is in; new bool [Q,M]: where a run begins."""
    queries, rows = new.shape
    place = np.broadcast_to(np.arange(rows), new.shape)
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    ends = np.concatenate([new[:, 1:], np.ones((queries, 1), bool)], axis=1)
    return first, np.minimum.accumulate(np.where(ends, place, rows)[:, ::-1], axis=1)[:, ::-1]


def expected_recall(best: Best, k: int) -> np.ndarray:
    """Probability float64 [Q] that a random order of the tied rows puts a positive among the first k.

    With g rows above, e tied and e+ of them positive: 0 if k <= g, else 1 - C(e - e+, k - g) / C(e, k - g). A constant
    score with n positives among M rows gives 1 - C(M - n, k) / C(M, k): k / M for one. NaN without a positive. Raises
    ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k: expected a positive number of retrieved rows, got {k}.")
    others = best.tied - best.positives
    free = np.clip(k - best.above, 0, best.tied)
    # ln of C(others, free) / C(tied, free) = others! (tied - free)! / ((others - free)! tied!)
    fits = free <= others
    logs = gammaln(others + 1.0) + gammaln(best.tied - free + 1.0)
    logs -= gammaln(np.where(fits, others - free, 0) + 1.0) + gammaln(best.tied + 1.0)
    missed = np.where(fits, np.where(best.positives == 1, 1.0 - free / np.maximum(best.tied, 1), np.exp(logs)), 0.0)
    return np.where(best.positives > 0, np.where(free > 0, 1.0 - missed, 0.0), np.nan)


def expected_rank(best: Best) -> np.ndarray:
    """Expected rank float64 [Q] of the first positive, from 1: 1 + g + (e - e+) / (e+ + 1). NaN without a positive."""
    rank = 1.0 + best.above + (best.tied - best.positives) / (best.positives + 1.0)
    return np.where(best.positives > 0, rank, np.nan)


def expected_average_precision(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Average precision float64 [Q], the mean over all orders of equally scored rows (McSherry and Najork 2008, eq. 6).

    In a block of t equal rows with r positives, a rows and p positives before it, place i = 1..t holds a positive with
    probability r/t, and then the expected precision is (p + 1 + (i - 1)(r - 1)/(t - 1)) / (a + i). Summed over places
    and divided by the number of positives. Arguments as `best_positive`; rows of score -inf take no place.
    """
    scores, positive = _checked(scores, positive)
    queries, rows = scores.shape
    order = np.argsort(-scores, axis=1, kind="stable")
    scores = np.take_along_axis(scores, order, axis=1)
    positive = np.take_along_axis(positive, order, axis=1).astype(np.float64)
    inside = np.isfinite(scores)
    positive *= inside
    place = np.broadcast_to(np.arange(rows), scores.shape)
    new = np.concatenate([np.ones((queries, 1), bool), np.diff(scores, axis=1) != 0], axis=1) if rows else inside
    first, end = _runs(new)  # of this row's block
    total = np.concatenate([np.zeros((queries, 1)), positive.cumsum(axis=1)], axis=1)
    before = np.take_along_axis(total, first, axis=1)
    block = np.take_along_axis(total, end + 1, axis=1) - before
    size = (end - first + 1).astype(np.float64)
    with_it = before + 1.0 + (place - first) * (block - 1.0) / np.maximum(size - 1.0, 1.0)
    share = np.where(inside, block / size * with_it / (place + 1.0), 0.0).sum(axis=1)
    count = total[:, -1]
    return np.where(count > 0, share / np.maximum(count, 1.0), np.nan)


def retrieve(
    queries: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    *,
    num_classes: int,
    ks: Sequence[int] = DEFAULT_RECALLS,
    own: np.ndarray | None = None,
) -> Retrieval:
    """Rows of the gallery by cosine; those with the query's label are positive.

    queries [Q,F] with labels int [Q], gallery [M,F] with labels int [M]. own int [Q]: the gallery row that is the query
    itself and is left out (-1: none), for a gallery that holds the queries. Cosines are compared on the grid of
    `neighbours`, so equal rows tie and blocks change nothing. A zero row has cosine 0 to everything.

    A query whose class is not in the gallery has nothing to find: it is counted in `without` and in no mean. Raises
    ValueError for labels outside 0..num_classes-1, k outside 1..M, another width, or rows that are not finite.
    """
    queries, gallery = check_pair(queries, gallery)
    query_labels = check_labels(query_labels, len(queries), num_classes, "query_labels")
    gallery_labels = check_labels(gallery_labels, len(gallery), num_classes, "gallery_labels")
    if not len(ks) or min(ks) < 1 or max(ks) > len(gallery):
        raise ValueError(f"ks: expected numbers of retrieved rows in 1..{len(gallery)}, got {tuple(ks)}.")
    if own is not None:
        own = np.asarray(own)
        if own.shape != (len(queries),) or not np.issubdtype(own.dtype, np.integer) or own.max() >= len(gallery):
            raise ValueError(
                f"own: expected {len(queries)} row numbers of the gallery or -1, got {own.dtype} {own.shape}."
            )
    recall = {int(k): np.empty(len(queries)) for k in sorted(set(ks))}
    precision, rank = np.empty(len(queries)), np.empty(len(queries))
    for rows, cosines in all_cosines(queries, gallery):
        positive = query_labels[rows, None] == gallery_labels[None, :]
        if own is not None:
            itself = np.flatnonzero(own[rows] >= 0)
            cosines[itself, own[rows][itself]] = -np.inf
        best = best_positive(cosines, positive)
        for k, values in recall.items():
            values[rows] = expected_recall(best, k)
        precision[rows] = expected_average_precision(cosines, positive)
        rank[rows] = expected_rank(best)
    return Retrieval(recall, precision, rank, int(np.isnan(rank).sum()))


def _checked(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive, bool)
    if scores.ndim != 2 or scores.shape != positive.shape:
        raise ValueError(
            f"scores and positive: expected one shape [queries, rows], got {scores.shape} and {positive.shape}."
        )
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise ValueError("scores: expected finite numbers or -inf (not in the gallery), got NaN or +inf.")
    return scores, positive
