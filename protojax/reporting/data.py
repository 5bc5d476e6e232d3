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
    [K,2] (first two principal axes), and for 16 live prototypes, from most to least used, the 6 nearest images. Where
    the images have labels: for each of those prototypes the commonest class of all images that chose it (sample_names)
    and its share of them (sample_purity), and for each class its number of training images, mean cosine to the nearest
    prototype, and number of live prototypes in which it is the commonest (class_counts, class_coverage,
    class_prototypes, each [C]).

    images(indices) -> uint8 [n,h,w,3] of the training split. None when the probe has no codebook.
    """
    if probe.codebook is None:
        return None
    prototypes = np.asarray(probe.codebook.prototypes, np.float32)
    bank = probe.bank("bank")
    features = unit_rows(bank.image).astype(np.float32) if reading == "unit" else bank.image
    center = probe.info.get("center")
    used = audit.usage(prototypes, features, center=center)
    shares = used.shares
    alive = max(1, int(audit.live_mask(shares).sum()))
    chosen = _spread(np.argsort(-shares, kind="stable")[:alive], SAMPLE_PROTOTYPES)
    rows = features if center is None else features - np.asarray(center, features.dtype)
    nearest = np.argsort(-(unit_rows(rows) @ prototypes[chosen].T), axis=0, kind="stable")[:SAMPLE_IMAGES].T
    pictures = images(bank.positions[nearest.reshape(-1)])
    path = workdir / "report_data.npz"
    classes: dict[str, Any] = class_arrays(probe, used, chosen)
    np.savez_compressed(
        path,
        prototypes=prototypes,
        usage=shares,
        similarity=similarity(prototypes),
        projection=projection(prototypes),
        sample_prototypes=chosen,
        sample_images=pictures.reshape(*nearest.shape, *pictures.shape[1:]),
        **classes,
    )
    return path


def class_arrays(probe: Probe, used: audit.Usage, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """What the labels say about prototypes (`write_report_data`); {} without labels. The first label key is taken."""
    labels = probe.bank("bank").labels
    if not labels:
        return {}
    key = next(iter(labels))
    names, count = probe.specs["bank"].classes[key], len(used.shares)
    fine, live = np.asarray(labels[key]), np.flatnonzero(audit.live_mask(used.shares))
    directed = used.nearest >= 0
    # Only prototypes that were chosen have a row: K x C would be large where both are.
    chosen_by, place = np.unique(used.nearest[directed], return_inverse=True)
    table = np.zeros((len(chosen_by), len(names)), np.int64)
    np.add.at(table, (place, fine[directed]), 1)
    commonest, purity = np.full(count, -1), np.zeros(count)
    commonest[chosen_by] = table.argmax(axis=1)
    purity[chosen_by] = table.max(axis=1) / np.maximum(table.sum(axis=1), 1)
    counts = np.bincount(fine, minlength=len(names))
    cosines = np.bincount(fine, weights=used.cosines, minlength=len(names))
    return {
        "sample_names": np.asarray([names[i] if i >= 0 else "" for i in commonest[chosen]]),
        "sample_purity": purity[chosen],
        "class_counts": counts,
        "class_coverage": cosines / np.maximum(counts, 1),
        "class_prototypes": np.bincount(commonest[live], minlength=len(names)),
    }


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
