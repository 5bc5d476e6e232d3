"""Few-shot learning and base-to-new, as papers on prompt learning measure them: what is taken from a feature cache.

Two options of every `data.source` of mixtures of prompts:

    shots    training images a class, drawn from the seed (1, 2, 4, 8 and 16 in papers); 0: all. 16 shots contain the 8.
    unseen   share of the classes, the last ones, of which nothing is trained on; tested among themselves.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from protojax.data.prompts_cache import FeatureCache, Features, with_base
from protojax.evals.few_shot import draw_shots


class Unseen(NamedTuple):
    """Classes that training never sees: base [C',D], test images with labels 0..C'-1, names."""

    base: np.ndarray
    test: Features
    class_names: tuple[str, ...]


class Opened(NamedTuple):
    """A cache after the protocol; train_rows: which rows of the file's training split it kept; unseen or None."""

    cache: FeatureCache
    train_rows: np.ndarray
    unseen: Unseen | None


def with_protocol(source: Callable[..., FeatureCache], train: str = "train", test: str = "test") -> Callable[
    ..., Opened]:  # fmt: skip
    """The source with the options `shots` and `unseen` on its splits `train` and `test`."""

    def opened(*, shots: int = 0, unseen: float = 0.0, **options: Any) -> Opened:
        cache = source(**options)
        base = options.get("base", inspect.signature(source).parameters["base"].default)
        return protocol(cache, shots, unseen, base=base, seed=options.get("seed", 0), train=train, test=test)

    opened.passes_to = source  # type: ignore[attr-defined]
    return opened


def protocol(cache: FeatureCache, shots: int = 0, unseen: float = 0.0, *, base: str = "text", seed: int = 0,
             train: str = "train", test: str = "test") -> Opened:  # fmt: skip
    """Apply both options. base: how the cache's base was made (`prompts_cache.with_base`).

    Raises ValueError for shots < 0, a share outside [0, 1), a share that leaves one side without a class, and a base
    that was made from images which the protocol takes away.
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
        raise ValueError(f"data.source, shots: expected a whole number >= 0 (0: all images), got {shots!r}.")
    if not 0 <= unseen < 1:
        raise ValueError(f"data.source, unseen: expected a share of the classes in [0, 1), got {unseen!r}.")
    found, rows, hidden = cache, np.arange(len(cache.split(train).label)), None
    if unseen:
        if base != "text":
            raise ValueError(
                f"data.source, unseen = {unseen}: unseen classes need a text base; base={base!r} is made from images, "
                "theirs among them. Use base='text', or unseen=0."
            )
        kept = math.ceil((1.0 - unseen) * len(cache.class_names))
        if not 0 < kept < len(cache.class_names):
            raise ValueError(f"data.source, unseen = {unseen} of {len(cache.class_names)} classes leaves one side "
                             "without a class.")  # fmt: skip
        found, hidden = _first_classes(cache, kept), _last_classes(cache, kept, test)
        rows = np.flatnonzero(cache.split(train).label < kept)
    if shots:
        if base == "text_shifted":
            raise ValueError(f"data.source, shots = {shots}: base='text_shifted' knows the mean of all images; use "
                             "base='text' or base='class_mean'.")  # fmt: skip
        features = found.split(train)
        chosen = draw_shots(features.label, shots, seed)
        found = found._replace(splits={**found.splits, train: _rows_of(features, chosen)})
        found = found if base == "text" else with_base(found, base, train=train, seed=seed)
        rows = rows[chosen]
    return Opened(found, rows, hidden)


def _first_classes(cache: FeatureCache, kept: int) -> FeatureCache:
    splits = {name: _rows_of(f, f.label < kept) for name, f in cache.splits.items()}
    return cache._replace(
        splits=splits,
        base=None if cache.base is None else cache.base[:kept],
        class_names=cache.class_names[:kept],
        levels={name: values[:kept] for name, values in cache.levels.items()},
        descriptions=cache.descriptions[:kept],
        mode_names=cache.mode_names[:kept],
    )


def _last_classes(cache: FeatureCache, kept: int, test: str) -> Unseen:
    assert cache.base is not None
    features = cache.split(test)
    found = _rows_of(features, features.label >= kept)
    return Unseen(cache.base[kept:], found._replace(label=found.label - np.int32(kept)), cache.class_names[kept:])


def _rows_of(features: Features, rows: np.ndarray) -> Features:
    mode = None if features.mode is None else features.mode[rows]
    return Features(features.image[rows], features.label[rows], mode)
