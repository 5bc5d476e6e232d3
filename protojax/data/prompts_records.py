"""Frozen features as records: a batch holds row numbers and labels; the features themselves stay on the device. Where
a tower runs in the step, it holds pictures too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from protojax.data.prompts_cache import FeatureCache
from protojax.data.records import Content, Records, image_shapes, make_records


class Table(NamedTuple):
    """All splits one below the other: features [N,D]; first: where each split begins."""

    features: np.ndarray
    first: dict[str, int]


def feature_table(cache: FeatureCache, splits: Sequence[str]) -> Table:
    """The features of several splits as one array, in their order; a split that is named twice is stored once."""
    first, at = {}, 0
    for name in dict.fromkeys(splits):
        first[name] = at
        at += len(cache.split(name).label)
    return Table(np.concatenate([cache.split(name).image for name in first]), first)


def feature_records(cache: FeatureCache, split: str, first: int, pictured: np.ndarray | None = None) -> Records:
    """One split as records: content 'row' int32, the number of the feature in the table; label key 'label'.

    pictured: where the cache has a tower, the numbers by which `cache.pictures` knows these rows; content then has
    'image' uint8 [S,S,3] too."""
    label = cache.split(split).label
    shapes = {"row": jax.ShapeDtypeStruct((), np.int32)}
    shown = None
    if pictured is not None and cache.tower is not None:
        shapes |= image_shapes(cache.tower.side, cache.tower.side)
        shown = cache.pictures

    def read(rows: np.ndarray) -> tuple[Content, np.ndarray]:
        content = {"row": (rows + first).astype(np.int32)}
        if shown is not None and pictured is not None:
            content["image"] = shown(split, pictured[rows])
        return content, np.ones(len(rows), bool)

    return make_records(
        f"{cache.name}/{split}", len(label), shapes, read, {"label": label.astype(np.int64)},
        {"label": cache.class_names},
    )  # fmt: skip
