"""k-means with a seed: the control that prototypes are held against as clusters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from protojax.evals.neighbours import check_rows


class Clusters(NamedTuple):
    """centres float64 [C,F], assignment int64 [M], inertia: sum of squared distances of rows to their centre, steps:
    Lloyd steps of the start that was kept."""

    centres: np.ndarray
    assignment: np.ndarray
    inertia: float
    steps: int


def kmeans(
    rows: np.ndarray,
    clusters: int,
    *,
    seed: int = 0,
    restarts: int = 3,
    iterations: int = 100,
    start: np.ndarray | None = None,
) -> Clusters:
    """Lloyd's algorithm in float64 from k-means++ (Arthur and Vassilvitskii 2007); the start of least inertia is kept.

    rows [M,F]. Ties go to the lowest cluster; a cluster that loses all rows moves to the row that is farthest from its
    centre (the next farthest for the next). Ends when no assignment changes, or after `iterations`. start [C,F]: begin
    there, once. Raises ValueError for clusters outside 1..M, a start of another shape, or rows that are not finite.
    """
    rows = check_rows(rows, "rows").astype(np.float64)
    if not 1 <= clusters <= len(rows):
        raise ValueError(f"clusters: expected a number in 1..{len(rows)}, the rows, got {clusters}.")
    if restarts < 1 or iterations < 1:
        raise ValueError(f"expected restarts >= 1 and iterations >= 1, got {restarts} and {iterations}.")
    if start is not None:
        start = np.asarray(start, np.float64)
        if start.shape != (clusters, rows.shape[1]):
            raise ValueError(f"start: expected shape {(clusters, rows.shape[1])}, got {start.shape}.")
        return _lloyd(rows, start, iterations)
    generator = np.random.default_rng(seed)
    found = [_lloyd(rows, plus_plus(rows, clusters, generator), iterations) for _ in range(restarts)]
    return min(found, key=lambda c: c.inertia)


def plus_plus(rows: np.ndarray, clusters: int, generator: np.random.Generator) -> np.ndarray:
    """Starting centres float64 [C,F]: rows drawn with probability proportional to the squared distance to those drawn
    before; uniformly where every row is a centre already."""
    chosen = [int(generator.integers(len(rows)))]
    distance = np.square(rows - rows[chosen[0]][None, :]).sum(axis=1)
    for _ in range(clusters - 1):
        total = distance.sum()
        shares = distance / total if total > 0 else None
        chosen.append(int(generator.choice(len(rows), p=shares)))
        distance = np.minimum(distance, np.square(rows - rows[chosen[-1]][None, :]).sum(axis=1))
    return rows[chosen].copy()


def _lloyd(rows: np.ndarray, centres: np.ndarray, iterations: int) -> Clusters:
    squares = np.square(rows).sum(axis=1)
    assignment, distance = _assign(rows, squares, centres)
    steps = 0
    while steps < iterations:
        steps += 1
        centres = _means(rows, assignment, distance, centres)
        before = assignment
        assignment, distance = _assign(rows, squares, centres)
        if (assignment == before).all():
            break
    return Clusters(centres, assignment, float(distance.sum()), steps)


def _means(rows: np.ndarray, assignment: np.ndarray, distance: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Mean row of each cluster; empty ones take the rows that are farthest from their centres."""
    count = np.bincount(assignment, minlength=len(centres))
    empty = np.flatnonzero(count == 0)
    order = np.argsort(assignment, kind="stable")
    filled = np.flatnonzero(count)
    means = centres.copy()
    begins = np.concatenate([[0], np.cumsum(count[filled])[:-1]])
    means[filled] = np.add.reduceat(rows[order], begins, axis=0) / count[filled][:, None]
    means[empty] = rows[np.argsort(-distance, kind="stable")[: len(empty)]]
    return means


def _assign(
    rows: np.ndarray, squares: np.ndarray, centres: np.ndarray, block: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """(nearest centre int64 [M], squared distance to it [M])."""
    sizes = np.square(centres).sum(axis=1)
    nearest, distance = np.empty(len(rows), np.int64), np.empty(len(rows))
    for begin in range(0, len(rows), block):
        part = slice(begin, begin + block)
        gaps = sizes[None, :] - 2.0 * (rows[part] @ centres.T)
        nearest[part] = gaps.argmin(axis=1)
        distance[part] = np.maximum(gaps.min(axis=1) + squares[part], 0.0)
    return nearest, distance
