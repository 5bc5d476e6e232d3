"""Classifying one source with rows of another: the classes that both name, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from protojax.api import FeatureBank


class Shared(NamedTuple):
    """names: classes that both sources have, in the order of the first. first, second int64: their numbers there."""

    names: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray


def shared_classes(first: Sequence[str], second: Sequence[str]) -> Shared:
    """Classes of equal name (exactly, but for spaces around it). Raises ValueError for repeated names or none alike."""
    names = [[str(n).strip() for n in given] for given in (first, second)]
    for given in names:
        twice = sorted({n for n in given if given.count(n) > 1})
        if twice:
            raise ValueError(f"transfer: class names must differ within a source, but {twice[0]!r} occurs twice.")
    places = {n: i for i, n in enumerate(names[1])}
    both = [(n, i, places[n]) for i, n in enumerate(names[0]) if n in places]
    if not both:
        raise ValueError(
            f"transfer: the sources name no class alike: {names[0][:3]}... and {names[1][:3]}...; rename the classes "
            "of one, or evaluate within one source."
        )
    return Shared(tuple(n for n, _, _ in both), *(np.array([b[i] for b in both], np.int64) for i in (1, 2)))


def restrict(bank: FeatureBank, label: str, classes: np.ndarray) -> FeatureBank:
    """The rows of `classes` alone, `labels[label]` renumbered 0, 1, ... in their order; other labels are left out.

    Raises ValueError when no row is left.
    """
    number = np.full(int(max(bank.labels[label].max(initial=-1), classes.max(initial=-1))) + 1, -1, np.int64)
    number[classes] = np.arange(len(classes))
    labels = number[bank.labels[label]]
    keep = labels >= 0
    if not keep.any():
        raise ValueError(f"transfer: none of the {len(keep)} rows is of a class that both sources have.")
    return FeatureBank(
        backbone=bank.backbone[keep],
        image=bank.image[keep],
        labels={label: labels[keep]},
        positions=bank.positions[keep],
        extra={k: v[keep] for k, v in bank.extra.items()},
    )
