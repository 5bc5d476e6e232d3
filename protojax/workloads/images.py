"""Images as every workload on images reads them: records, batches and views by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from ml_collections import config_dict

from protojax.api import Source
from protojax.config import Config
from protojax.data import longtail, registry, sampler, views
from protojax.data.records import Records, class_counts, subset
from protojax.data.workers import read_by_workers
from protojax.workloads.base import filled

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def multicrop(
    global_size: int = 224,
    global_scale: tuple[float, ...] = (0.2, 1.0),
    local_size: int = 96,
    local_scale: tuple[float, ...] = (0.05, 0.2),
    local_count: int = 6,
    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1),
    jitter_probability: float = 0.8,
    grey_probability: float = 0.2,
    blur_probability: tuple[float, ...] = (1.0, 0.1),
    local_blur_probability: float = 0.5,
    blur_sigma: tuple[float, ...] = (0.1, 2.0),
    solarise_probability: tuple[float, ...] = (0.0, 0.2),
    flip: float = 0.5,
) -> tuple[views.ViewSpec, views.ViewSpec | None]:
    """Two global and `local_count` local views with every knob free; the defaults are CARP's."""
    shared: dict[str, Any] = {
        "jitter": tuple(jitter), "jitter_probability": jitter_probability, "grey_probability": grey_probability,
        "flip": flip, "blur_sigma": _pair(blur_sigma),
    }  # fmt: skip
    large = views.ViewSpec(
        global_size, 2, _pair(global_scale), blur_probability=tuple(blur_probability),
        solarise_probability=tuple(solarise_probability), **shared,
    )  # fmt: skip
    if local_count == 0:
        return large, None
    small = views.ViewSpec(
        local_size, local_count, _pair(local_scale), blur_probability=local_blur_probability, **shared
    )
    return large, small


def _pair(values: tuple[float, ...]) -> tuple[float, float]:
    """(low, high) of a config's tuple; ViewSpec checks the order. Raises ValueError for another length."""
    if len(values) != 2:
        raise ValueError(f"views: expected a range (low, high), got {values!r}.")
    return values[0], values[1]


VIEWS: dict[str, Callable[..., tuple[views.ViewSpec, views.ViewSpec | None]]] = {
    "carp": views.CARP_VIEWS,
    "dino": views.DINO_VIEWS,
    "multicrop": multicrop,
}


def fill_source(data: ml_collections.ConfigDict) -> None:
    """Every option of the reader of images at its default."""
    data.source = filled({data.source.name: registry._opener(data.source.name)[0]}, data.source)
    if data.source.name == "image_folder" or data.source.name.startswith("tfds:"):
        data.source = ml_collections.ConfigDict({"packed": config_dict.placeholder(str), **data.source})
    if data.source.name in registry._NEEDS_ROOT:  # a user's files may come in one piece: docs/data.md
        data.source = ml_collections.ConfigDict({"holdout_fraction": 0.0, "holdout_seed": 0, **data.source})


def records(config: Config, split: str) -> Records:
    """One split of the configured data set; the training split resampled where config.data.longtail says so."""
    data = config.data
    options = {k: v for k, v in data.source.options.items() if v is not None}
    found = registry.open_records(data.source.name, split, root=data.root, **options)
    tail = data.longtail
    if split == data.train_split and tail.factor > 1:
        label = config.evals.labels[0] if config.evals.labels else "fine"
        if label not in found.labels:
            raise ValueError(f"config.data.longtail needs labels {label!r}; {found.name} has {sorted(found.labels)}.")
        keep = longtail.exponential_longtail(found.labels[label], tail.factor, tail.seed, tail.max_per_class)
        found = subset(found, keep)
    return found


def sources(config: Config) -> dict[str, Source]:
    """'train': endless, shuffled each epoch; 'bank' and 'test': one ordered pass, padded and masked."""
    train, test = records(config, config.data.train_split), records(config, config.data.test_split)
    counts = class_counts(train)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    size = config.evals.batch_size

    def ordered(split: Records) -> Source:
        return sampler.make_source(split, batch_size=size, shuffle=False, remainder="pad", counts=counts, **process)

    return {
        "train": read_by_workers(
            sampler.make_source(
                train, batch_size=config.data.batch_size, seed=config.seed, shuffle=True, remainder="wrap", **process
            ),
            config.system.workers,
        ),
        "bank": ordered(train),
        "test": ordered(test),
    }


def images(config: Config) -> Callable[[Any], Any]:
    """indices -> uint8 images of the training split, for the report's pictures."""
    found = records(config, config.data.train_split)
    return lambda indices: found.take(indices)["image"]
