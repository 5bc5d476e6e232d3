"""Nearest rows by cosine, exactly: the one place that compares features with a bank.

A cosine is computed in float64 from rows normalised in float64 and then rounded to a multiple of 2^-24, half a float32
step at 1. Rounding makes ties well defined: the two or three last bits of a float64 matrix product depend on how it is
blocked, the rounded value does not, so equal rows tie, and a tie goes to the lowest bank index. Results therefore
depend neither on `block` nor on the number of devices or threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

GRID = 2.0**24  # cosines are multiples of 1/GRID
_MAX_BANK = 2**27  # GRID * rows, and a quotient by rows, must stay exact in float64


class Neighbours(NamedTuple):
    """indices int64 [Q,k] into the bank and cosines float64 [Q,k], nearest first, ties by lowest index."""

    indices: np.ndarray
    cosines: np.ndarray


def check_rows(rows: np.ndarray, name: str) -> np.ndarray:
    """`rows` as a 2-D floating array [N,F], N, F > 0. Raises ValueError when it is not one or holds NaN or infinity."""
    rows = np.asarray(rows)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"{name}: expected a non-empty matrix [rows, width], got shape {rows.shape}.")
    if rows.dtype not in (np.float32, np.float64):
        rows = rows.astype(np.float32)  # integers, float16, and the bfloat16 of ml_dtypes
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(rows)} rows hold NaN or infinity (first: row {int(np.argmax(bad))}); "
            "the model has diverged or the file is damaged."
        )
    return rows


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """rows / ||rows||, float64 [N,F]. A zero row stays zero: its cosine to everything is 0."""
    rows = np.asarray(rows, np.float64)
    # Scaling by the largest entry first keeps the squares of tiny and huge rows in range.
    scale = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(scale > 0, scale, 1.0)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1.0)


def check_pair(queries: np.ndarray, bank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as `check_rows` gives them. Raises ValueError when their widths differ."""
    queries, bank = check_rows(queries, "queries"), check_rows(bank, "bank")
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries have width {queries.shape[1]}, the bank has width {bank.shape[1]}; they must agree.")
    return queries, bank


def all_cosines(queries: np.ndarray, bank: np.ndarray, *, entries: int = 2**23) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of queries, their cosines float64 [rows,M] to the whole bank, multiples of 1/GRID), block by block.

    For evaluations that rank everything. A block holds at most `entries` cosines (64 MiB), or one row. Errors as
    `nearest_rows`.
    """
    queries, bank = check_pair(queries, bank)
    scaled = unit_rows(bank).T
    block = max(1, entries // len(bank))
    for start in range(0, len(queries), block):
        cosines = (unit_rows(queries[start : start + block]) * GRID) @ scaled
        np.rint(cosines, out=cosines)
        cosines /= GRID
        yield slice(start, start + len(cosines)), cosines


def nearest_rows(
    queries: np.ndarray, bank: np.ndarray, k: int, *, block: int = 1024, bank_block: int = 8192
) -> Neighbours:
    """The k bank rows of largest cosine for each query.

    queries [Q,F], bank [M,F]; `block` queries meet `bank_block` bank rows at a time, so memory is
    8 * block * (bank_block + k) bytes whatever Q and M. Raises ValueError for another width, k outside 1..M, or
    rows that are not finite.
    """
    queries, bank = check_pair(queries, bank)
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} neighbours were asked of a bank of {len(bank)} rows; k must be in 1..{len(bank)}.")
    if len(bank) > _MAX_BANK:
        raise ValueError(f"the bank has {len(bank)} rows; at most {_MAX_BANK} keep ties exact.")
    index = np.empty((len(queries), k), np.int64)
    cosine = np.empty((len(queries), k), np.float64)
    # One float64 ranks by (cosine, lowest index): round(cosine * GRID) * M + (M - 1 - index), an exact integer.
    scaled_bank = unit_rows(bank) if len(bank) <= bank_block else None  # small banks are normalised once
    for start in range(0, len(queries), block):
        rows = unit_rows(queries[start : start + block]) * GRID
        best = np.empty((len(rows), 0))
        for low in range(0, len(bank), bank_block):
            chunk = unit_rows(bank[low : low + bank_block]) if scaled_bank is None else scaled_bank
            rank = rows @ chunk.T
            np.rint(rank, out=rank)
            rank *= len(bank)
            rank += (len(bank) - 1.0 - low - np.arange(len(chunk)))[None, :]
            best = np.concatenate([best, _largest(rank, k)], axis=1)
            best = _largest(best, k)
        best = -np.sort(-best, axis=1)
        grid = np.floor(best / len(bank))
        index[start : start + block] = (len(bank) - 1 - (best - grid * len(bank))).astype(np.int64)
        cosine[start : start + block] = grid / GRID
    return Neighbours(index, cosine)


def _largest(rank: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row in any order (all when there are no more than k)."""
    if rank.shape[1] <= k:
        return rank
    if k == 1:
        return rank.max(axis=1, keepdims=True)
    return np.partition(rank, rank.shape[1] - k, axis=1)[:, -k:]
