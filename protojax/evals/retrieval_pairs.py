"""Retrieval between two modalities, both directions, every prefix width, with chance beside each number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from protojax.evals.retrieval import Best, best_positive, expected_rank, expected_recall

RECALLS = (1, 5, 10)
TIE = 1e-6  # embeddings are float32: strict comparison would order what is equal by their rounding


def prefix_units(embeddings: np.ndarray, width: int) -> np.ndarray:
    """The first `width` numbers of every row, renormalised; float32. A zero prefix stays zero."""
    rows = np.asarray(embeddings, np.float32)[:, :width]
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def one_direction(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_id: np.ndarray,
    gallery_id: np.ndarray,
    *,
    ks: Sequence[int] = RECALLS,
    block: int = 1024,
) -> dict[str, Any]:
    """Unit queries [Q,D] against a unit gallery [G,D]; gallery rows with the query's id are positive.

    {'recall': {str(k): R@k}, 'chance': {str(k): R@k of equal scores}, 'median_rank', 'mean_rank', 'mrr', 'gallery': G,
    'queries': those that have a positive}. Ties (scores joined by steps of at most 1e-6) count at their expectation
    over all orders, so that a constant side gives chance exactly: 1 - C(G - n, k) / C(G, k) for n positives, k / G for
    one. k above G is taken as G. Raises ValueError for other shapes, rows that are not finite, or when no query has a
    positive.
    """
    if query_id.shape != queries.shape[:1] or gallery_id.shape != gallery.shape[:1]:
        raise ValueError(f"ids must be one a row, got {query_id.shape} and {gallery_id.shape}")
    return _direction(queries, gallery, lambda rows: query_id[rows, None] == gallery_id[None, :], ks, block)


def _direction(
    queries: np.ndarray,
    gallery: np.ndarray,
    positives: Callable[[slice], np.ndarray],
    ks: Sequence[int],
    block: int = 1024,
) -> dict[str, Any]:
    """`one_direction` with positives(rows) -> bool [rows,G]: which of the gallery belong to these queries."""
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries and gallery must be rows of one width, got {queries.shape} and {gallery.shape}")
    if not (np.isfinite(queries).all() and np.isfinite(gallery).all()):
        raise ValueError("embeddings must be finite; a row holds NaN or infinity")
    size = len(gallery)
    # float64: products of equal rows differ by 3e-7 in float32, whatever else stands in the block, and what ties would
    # depend on it.
    columns = gallery.astype(np.float64).T
    ranks: list[np.ndarray] = []
    found: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    chance: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for first in range(0, len(queries), block):
        rows = slice(first, first + block)
        positive = positives(rows)
        best = best_positive(queries[rows].astype(np.float64) @ columns, positive, TIE)
        count = positive.sum(axis=1)
        level = Best(np.zeros_like(count), np.full_like(count, size), count)
        ranks.append(expected_rank(best))
        for k in ks:
            found[k].append(expected_recall(best, min(k, size)))
            chance[k].append(expected_recall(level, min(k, size)))
    rank = np.concatenate(ranks)
    seen = ~np.isnan(rank)
    if not seen.any():
        raise ValueError("no query has a positive in the gallery: are the ids of both sides in step?")
    mean = lambda parts: float(np.concatenate(parts)[seen].mean())  # noqa: E731
    return {
        "recall": {str(k): mean(found[k]) for k in ks},
        "chance": {str(k): mean(chance[k]) for k in ks},
        "median_rank": float(np.median(rank[seen])),
        "mean_rank": float(rank[seen].mean()),
        "mrr": float((1.0 / rank[seen]).mean()),
        "gallery": size,
        "queries": int(seen.sum()),
    }


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first row of every distinct id, number of every row's id)."""
    _, first, number = np.unique(np.asarray(ids), return_index=True, return_inverse=True)
    return first, number


def _linked(table: csr_array, rows: slice) -> np.ndarray:
    return table[rows].toarray()


def pair_retrieval(
    image: np.ndarray,
    text: np.ndarray,
    caption_id: np.ndarray,
    image_id: np.ndarray | None = None,
    *,
    widths: Sequence[int],
    ks: Sequence[int] = RECALLS,
) -> dict[str, Any]:
    """Both directions at every prefix width of image and text embeddings [M,D] of the same pairs.

    caption_id [M]: pairs of equal id share a caption, which stands once in the gallery of texts and has all their
    images as positives. image_id [M]: where an image stands in several pairs, one a caption, the gallery of images
    holds it once and all its captions are its positives (None: every row an image).
    {'i2t': {str(d): as `one_direction`}, 't2i': the same, 'r1', 'r5', 'r10': {str(d): mean of both directions},
    'chance': {str(k): mean of both}, 'retention': {str(d): r1(d) / r1(D)}, 'retention_r10'}.
    """
    first_image, own_image = _distinct(np.arange(len(image)) if image_id is None else image_id)
    first_text, own_text = _distinct(caption_id)
    links = csr_array((np.ones(len(image), bool), (own_image, own_text)), (len(first_image), len(first_text)))
    out: dict[str, Any] = {"i2t": {}, "t2i": {}}
    for width in widths:
        images, texts = prefix_units(image[first_image], width), prefix_units(text[first_text], width)
        for name, queries, gallery, table in (("i2t", images, texts, links), ("t2i", texts, images, links.T.tocsr())):
            out[name][str(width)] = _direction(queries, gallery, partial(_linked, table), ks)
    both = lambda d, what, k: 0.5 * (out["i2t"][d][what][k] + out["t2i"][d][what][k])  # noqa: E731
    names = [str(width) for width in widths]
    for k in ks:
        out[f"r{k}"] = {d: both(d, "recall", str(k)) for d in names}
    full = str(max(widths))
    out["chance"] = {str(k): both(full, "chance", str(k)) for k in ks}
    for name, k in (("retention", 1), ("retention_r10", 10)):
        if k in ks:
            whole = out[f"r{k}"][full]
            out[name] = {d: out[f"r{k}"][d] / whole if whole > 0 else None for d in names}
    return out


def zero_shot(
    image: np.ndarray, labels: np.ndarray, class_text: np.ndarray, *, widths: Sequence[int]
) -> dict[str, Any]:
    """Classification of images [M,D] by the nearest class text [C,D] (ties at expectation): {'accuracy': {str(d): share
    of labels [M] that come first}, 'top5': ..., 'chance': 1/C, 'classes': C}."""
    count = len(class_text)
    found: dict[str, dict[str, float]] = {"accuracy": {}, "top5": {}}
    for width in widths:
        images, texts = prefix_units(image, width), prefix_units(class_text, width)
        result = one_direction(images, texts, np.asarray(labels), np.arange(count), ks=(1, min(5, count)))
        found["accuracy"][str(width)] = result["recall"]["1"]
        found["top5"][str(width)] = result["recall"][str(min(5, count))]
    return {**found, "chance": 1.0 / count, "classes": count}
