"""Long tails: making one out of any labelled set, and naming its head, medium and tail."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from protojax.data import seeding
from protojax.data.records import by_class

GroupRule = Literal["inat", "terciles"]


def exponential_longtail(
    labels: np.ndarray, imbalance_factor: float, seed: int, max_per_class: int | None = None
) -> np.ndarray:
    """Indices, int64 and ascending, of a subset whose class sizes fall off exponentially.

    The class at rank r of the C classes that occur keeps

        n_r = min(available, floor(n_max * IF^(-r/(C-1))))

    examples, n_max = `max_per_class` or the size of the largest class, IF = `imbalance_factor` = n_0 / n_{C-1}. Ranks
    are a seeded permutation of the classes, the examples kept a seeded choice within each class; a larger IF keeps a
    subset of what a smaller one keeps (same seed). The profile of CIFAR-10/100-LT: Cao et al., NeurIPS 2019
    (arXiv:1906.07413), where ranks are the class ids instead.

    Raises ValueError for IF < 1, or when a class would be left without an example.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size:
        raise ValueError(f"labels must be a non-empty vector, got shape {labels.shape}")
    if not imbalance_factor >= 1.0 or math.isinf(imbalance_factor):
        raise ValueError(f"imbalance_factor must be a finite number >= 1 (1 keeps the balance), got {imbalance_factor}")
    classes, available = np.unique(labels, return_counts=True)
    largest = int(np.max(available)) if max_per_class is None else int(max_per_class)
    # floor(x + eps): n_max * IF^-1 is a whole number whose float64 product may fall just short of it.
    sizes = [
        math.floor(largest * imbalance_factor ** (-rank / max(len(classes) - 1, 1)) + 1e-9)
        for rank in range(len(classes))
    ]
    if sizes[-1] < 1:
        raise ValueError(
            f"imbalance_factor {imbalance_factor} leaves the rarest class without an example: "
            f"with {largest} examples in the largest class it can be at most {largest}"
        )
    ranked = classes[seeding.permutation(len(classes), seed, seeding.CLASS_ORDER)]
    members = by_class(labels, seeding.permutation(labels.size, seed, seeding.WITHIN_CLASS))
    return np.sort(np.concatenate([members[int(c)][:n] for c, n in zip(ranked, sizes, strict=True)]))


def groups(counts: np.ndarray, rule: GroupRule) -> dict[str, np.ndarray]:
    """Class ids (int64, ascending) of 'head', 'medium' and 'tail' by training counts [C]; each class is in one group.

    rule 'inat': more than 100, 20 to 100, fewer than 20 training examples. rule 'terciles': classes sorted by count
    (largest first, ties by class id) and cut into thirds, the larger groups first; for sets without classes above
    100. A group may be empty. Raises ValueError for an unknown rule.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1:
        raise ValueError(f"counts must be one number a class, got shape {counts.shape}")
    if rule == "inat":
        parts = [counts > 100, (counts >= 20) & (counts <= 100), counts < 20]
        ids = [np.flatnonzero(part) for part in parts]
    elif rule == "terciles":
        descending = np.lexsort((np.arange(counts.size), -counts.astype(np.int64)))
        ids = [np.sort(part) for part in np.array_split(descending, 3)]
    else:
        raise ValueError(f"the rule for head/medium/tail must be 'inat' or 'terciles', got {rule!r}")
    return {key: part.astype(np.int64) for key, part in zip(("head", "medium", "tail"), ids, strict=True)}
