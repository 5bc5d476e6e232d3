"""How many prototypes are distinct (Definition 2.1 of arXiv 2510.20108), on the host, never K x K in memory."""

from __future__ import annotations

from typing import Any

import numpy as np

_BLOCK = 1024


def _unit_rows(prototypes: Any) -> np.ndarray:
    rows = np.asarray(prototypes)
    if rows.ndim != 2:
        raise ValueError(f"prototypes must be [K,D], got shape {rows.shape}")
    if rows.dtype.kind in "iub" or rows.dtype == np.float16 or rows.dtype.kind == "c":
        raise TypeError(f"prototypes must be bfloat16, float32 or float64, got {rows.dtype}")
    if rows.shape[0] == 0:
        raise ValueError("prototypes must hold at least one row, got K = 0")
    wide = rows.astype(np.float64)
    # Scaled by the largest entry, so that the squares of tiny or huge rows neither vanish nor overflow.
    largest = np.max(np.abs(wide), axis=1, keepdims=True, initial=0.0)
    bad = np.flatnonzero(~np.isfinite(largest[:, 0]) | (largest[:, 0] == 0.0))
    if bad.size:
        raise ValueError(
            f"prototypes must be finite and non-zero to have a direction, but {bad.size} of {rows.shape[0]} rows are "
            f"not (first: row {bad[0]}): drop them, or look for a collapsed or diverged run"
        )
    wide /= largest
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return wide.astype(np.float64 if rows.dtype == np.float64 else np.float32)


def unique_groups(prototypes: Any, epsilon: float) -> np.ndarray:
    """The representative's index for every prototype, int64 [K]; a representative has its own index.

    Greedy cover in index order: row k joins the first representative r < k with cosine distance 1 - cos(k, r) <
    epsilon (strict), else it becomes one. The groups depend on the order of the rows, and their number need not be that
    of a smallest cover.

    prototypes: [K,D], any norm. Raises ValueError for a zero or non-finite row, K = 0 or a negative epsilon.
    Cosines are accumulated in float32 (float64 for float64 rows); memory is block x representatives."""
    rows = _unit_rows(prototypes)
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon must be 0 or more (a cosine distance), got {epsilon}")
    count, width = rows.shape
    groups = np.empty(count, np.int64)
    leaders = np.empty((min(count, 4 * _BLOCK), width), rows.dtype)
    indices: list[int] = []
    for start in range(0, count, _BLOCK):
        part = rows[start : start + _BLOCK]
        group = _first_near(part, leaders[: len(indices)], epsilon, np.asarray(indices, np.int64))
        near = 1.0 - part @ part.T < epsilon
        for i in np.flatnonzero(group < 0):
            if group[i] >= 0:
                continue
            # A new representative takes every later row of the block that no earlier one took.
            group[i] = start + i
            later = near[i, i + 1 :] & (group[i + 1 :] < 0)
            group[i + 1 :][later] = start + i
            if len(indices) == leaders.shape[0]:
                grown = np.empty((min(count, 2 * leaders.shape[0]), width), rows.dtype)
                grown[: len(indices)] = leaders
                leaders = grown
            leaders[len(indices)] = part[i]
            indices.append(start + int(i))
        groups[start : start + _BLOCK] = group
    return groups


def _first_near(part: np.ndarray, leaders: np.ndarray, epsilon: float, indices: np.ndarray) -> np.ndarray:
    """Index of the first leader within epsilon of each row of `part`, -1 where there is none."""
    group = np.full(part.shape[0], -1, np.int64)
    for start in range(0, leaders.shape[0], 4 * _BLOCK):
        open_rows = np.flatnonzero(group < 0)
        if open_rows.size == 0:
            break
        cosine = part[open_rows] @ leaders[start : start + 4 * _BLOCK].T
        hit_rows = np.flatnonzero(1.0 - np.max(cosine, axis=1) < epsilon)
        first = np.argmax(1.0 - cosine[hit_rows] < epsilon, axis=1)
        group[open_rows[hit_rows]] = indices[start + first]
    return group


def unique_count(prototypes: Any, epsilon: float) -> int:
    """Number of groups of `unique_groups`: M of Definition 2.1."""
    return int(np.unique(unique_groups(prototypes, epsilon)).size)


def nearest_cosine(prototypes: Any) -> np.ndarray:
    """Largest cosine of each prototype to another one, float32 or float64 [K] (-inf when K = 1); blockwise."""
    rows = _unit_rows(prototypes)
    count = rows.shape[0]
    best = np.full(count, -np.inf, rows.dtype)
    size = 2 * _BLOCK
    for start in range(0, count, size):
        part = rows[start : start + size]
        for other in range(start, count, size):  # cosines are symmetric: half the blocks serve both sides
            cosine = part @ rows[other : other + size].T
            if other == start:
                np.fill_diagonal(cosine, -np.inf)
            np.maximum(best[start : start + size], cosine.max(axis=1), out=best[start : start + size])
            np.maximum(best[other : other + size], cosine.max(axis=0), out=best[other : other + size])
    return best
