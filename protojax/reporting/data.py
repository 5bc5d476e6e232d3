"""report_data.npz: what the report draws beside the numbers of metrics.jsonl, from the last evaluation's probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster import hierarchy

from protojax.api import Probe
from protojax.evals import audit
from protojax.evals.neighbours import unit_rows

SIMILARITY_ROWS, SAMPLE_PROTOTYPES, SAMPLE_IMAGES = 256, 16, 6


def write_report_data(
    workdir: Path, probe: Probe, images: Callable[[np.ndarray], np.ndarray], reading: str = "raw"
) -> Path | None:
    """Write prototypes [K,D], usage [K], similarity [n,n] (n <= 256 prototypes, similar ones side by side), projection
    [K,2] (first two principal axes), and for 16 live prototypes, from most to least used, the 6 nearest images.

    images(indices) -> uint8 [n,h,w,3] of the training split. None when the probe has no codebook.
    """
    if probe.codebook is None:
        return None
    prototypes = np.asarray(probe.codebook.prototypes, np.float32)
    bank = probe.bank("bank")
    features = unit_rows(bank.image).astype(np.float32) if reading == "unit" else bank.image
    center = probe.info.get("center")
    shares = np.asarray(audit.usage(prototypes, features, center=center).shares)
    alive = max(1, int(audit.live_mask(shares).sum()))
    chosen = _spread(np.argsort(-shares, kind="stable")[:alive], SAMPLE_PROTOTYPES)
    rows = features if center is None else features - np.asarray(center, features.dtype)
    nearest = np.argsort(-(unit_rows(rows) @ prototypes[chosen].T), axis=0, kind="stable")[:SAMPLE_IMAGES].T
    pictures = images(bank.positions[nearest.reshape(-1)])
    path = workdir / "report_data.npz"
    np.savez_compressed(
        path,
        prototypes=prototypes,
        usage=shares,
        similarity=similarity(prototypes),
        projection=projection(prototypes),
        sample_prototypes=chosen,
        sample_images=pictures.reshape(*nearest.shape, *pictures.shape[1:]),
    )
    return path


def similarity(prototypes: np.ndarray, limit: int = SIMILARITY_ROWS) -> np.ndarray:
    """Cosines [n,n] of n <= limit prototypes (evenly spaced in index), ordered by average-linkage clustering."""
    rows = prototypes[_spread(np.arange(len(prototypes)), limit)]
    rows = unit_rows(rows)
    cosines = np.clip(rows @ rows.T, -1.0, 1.0)
    if len(rows) < 3:
        return cosines.astype(np.float32)
    distance = (1.0 - cosines)[np.triu_indices(len(rows), 1)]
    order = hierarchy.leaves_list(hierarchy.linkage(np.maximum(distance, 0.0), "average"))
    return cosines[np.ix_(order, order)].astype(np.float32)


def projection(prototypes: np.ndarray) -> np.ndarray:
    """[K,2]: coordinates on the first two principal axes of the prototypes."""
    centred = prototypes - prototypes.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    flat: Any = centred @ axes[:2].T
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))).astype(np.float32)


def _spread(items: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` of the items, evenly spaced, first and last among them."""
    if len(items) <= limit:
        return items
    return items[np.unique(np.linspace(0, len(items) - 1, limit).round().astype(int))]
