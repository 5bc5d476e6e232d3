"""A trained encoder as a teacher: images with the label distributions that it believes (`protojax teach`).

The belief of the teacher about image i is the vote of its k nearest neighbours among the training images,

    t_ic = sum_{j in kNN(i), y_j = c} exp(cos(i, j) / T) / sum_{j in kNN(i)} exp(cos(i, j) / T),

the distribution behind `protojax eval`'s k-NN accuracy. A training image does not vote for itself: its own
label would make every target one-hot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from protojax import evaluating
from protojax.config import Data
from protojax.evals.knn import check_ks, check_labels, votes_of
from protojax.evals.neighbours import Neighbours, nearest_rows
from protojax.protocol import Protocol


def beliefs(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray | None,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Targets [Q,C] of `queries` [Q,F] by the votes of `bank` [M,F] with `labels` [M]; rows sum to one.

    queries None: of the bank's own rows, each without itself (the row, not its duplicates). Raises ValueError for a
    temperature that is not positive, labels outside 0..C-1, and k larger than the bank (less one row for its own).
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    labels = check_labels(labels, len(bank), num_classes, "labels of the bank")
    own = queries is None
    check_ks((k,), len(bank) - own, clamp=False)
    found = nearest_rows(bank if queries is None else queries, bank, k + own)
    if own:
        itself = found.indices == np.arange(len(bank))[:, None]
        # Behind more than k duplicates a row may not be among its own neighbours: then the last one goes.
        itself[:, -1] |= ~itself.any(axis=1)
        found = Neighbours(*(a[~itself].reshape(len(bank), k) for a in found))
    votes = votes_of(found, labels, k, temperature, num_classes)
    return votes / votes.sum(axis=1, keepdims=True)


def arrays(
    workdir: Path | str,
    protocol: Protocol,
    data: Data | None = None,
    *,
    label: str = "fine",
    k: int = 20,
    temperature: float = 0.07,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """What the soft-label sources `images` and `table` read: images uint8 [N,H,W,3] and the teacher's features float32
    [N,F], targets float32 [N,C], split [N], categories [C], and labels [N], the true ones, for comparison.

    The run's (or `data`'s) training split becomes 'train' and, a share of val_fraction drawn by `seed`, 'val'; its test
    split 'test'. Raises ValueError as `evaluating.open_run` and `beliefs` do, and for a label that the data lack.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction must be in (0, 1), got {val_fraction}.")
    opened, bank, test = evaluating.open_splits(workdir, protocol, data)
    for records in (bank, test):
        if label not in records.labels:
            raise ValueError(f"{records.name} has no labels {label!r}; it has {sorted(records.labels) or 'none'}.")
    classes = bank.classes[label]
    if tuple(test.classes[label]) != tuple(classes):
        raise ValueError(f"{bank.name} and {test.name} name other classes {label!r}: one teacher needs one list.")
    probe = evaluating.make_probe(opened, bank, test, {})
    seen, unseen = probe.bank("bank"), probe.bank("test")
    options: dict[str, Any] = {"num_classes": len(classes), "k": k, "temperature": temperature}
    known = seen.labels[label]
    targets = np.concatenate(
        [
            beliefs(seen.backbone, known, None, **options),
            beliefs(seen.backbone, known, unseen.backbone, **options),
        ]
    )
    split = np.full(len(targets), "train", dtype="<U5")
    chosen = np.random.default_rng(seed).permutation(len(known))[: round(val_fraction * len(known))]
    split[chosen], split[len(known) :] = "val", "test"
    pictures = [records.take(part.positions)["image"] for records, part in ((bank, seen), (test, unseen))]
    if pictures[0].shape[1:] != pictures[1].shape[1:]:
        raise ValueError(f"images of {bank.name} and {test.name} differ in size: {[p.shape[1:] for p in pictures]}.")
    return {
        "images": np.concatenate(pictures),
        "features": np.concatenate([seen.backbone, unseen.backbone]),
        "targets": targets.astype(np.float32),
        "split": split,
        "categories": np.array(classes, np.str_),
        "labels": np.concatenate([known, unseen.labels[label]]),
    }


def write(out: Path, content: dict[str, np.ndarray]) -> str:
    """The .npz file, by the first process; returns one line about it."""
    entropy = -np.sum(content["targets"] * np.log(np.maximum(content["targets"], 1e-30)), axis=1)
    right = np.mean(content["targets"].argmax(axis=1) == content["labels"])
    if jax.process_index() == 0:
        with out.open("wb") as file:
            np.savez(file, **content)  # type: ignore[arg-type]
    counts = {s: int(np.sum(content["split"] == s)) for s in ("train", "val", "test")}
    return (
        f"{out}: {counts} images, {content['targets'].shape[1]} categories, mean entropy {entropy.mean():.3f} nats, "
        f"largest belief on the true class {100 * right:.1f} %"
    )
