"""The feature source 'towers': pictures under frozen CLIP or SigLIP towers, the image tower in the step itself.

Texts, class means, the plus-plus start and every evaluation come from one pass over all pictures when a run begins, as
`protojax embed` makes it (`towers.bank`). The step reads the batch's pictures: without views it sees the features of
that pass, with views those of random crops, which no cache can hold.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax.numpy as jnp
import numpy as np

from protojax.api import Array, Key
from protojax.data import views as view_lib
from protojax.data import views_geometry as geometry
from protojax.data.prompts_cache import BASES, FeatureCache, Tower, check_cache, with_base
from protojax.schedules import check_choice

if TYPE_CHECKING:
    from protojax.towers.bank import Plan

VIEWS = ("none", "crops")


def open_towers(
    *,
    root: str | Path | None,
    seed: int,
    weights: str = "",
    base: str = "text",
    label: str = "fine",
    splits: tuple[str, ...] = (),
    test_share: float = 0.0,
    templates: str = "photo",
    classes: str = "",
    dtype: str = "float32",
    encode_batch: int = 64,
    drop_empty_classes: bool = False,
    views: str = "none",
    crop_scale: tuple[float, ...] = (0.08, 1.0),
) -> FeatureCache:
    """Pictures below `root` (data.root: a folder, a table, or SOURCE:key=value) by the towers in the folder `weights`.

    label, splits, test_share, templates, classes ('': none), dtype, drop_empty_classes: as `towers.bank.open_plan`.
    encode_batch: pictures at once in the one pass. views: what the step sees of a picture: 'none', all that the
    preprocessing left of it; 'crops', a random crop of crop_scale of its area (width / height from 3/4 to 4/3),
    resized, half of them mirrored. Raises ValueError for bad options before a picture is encoded.
    """
    if not weights or not root:
        raise ValueError(
            "data source 'towers' needs data.source.weights, a folder of CLIP or SigLIP, and data.root, a folder of "
            f"pictures, a table or a source (docs/pretrained.md); got weights={weights!r}, root={root!r}"
        )
    check_choice("data.source, views", views, VIEWS)
    check_choice("data.source, base", base, BASES)
    if templates == "none" and base.startswith("text"):
        raise ValueError(f"data.source, base={base!r}: templates='none' leaves no texts; use base='class_mean'.")
    crop = None
    if views == "crops":
        scale = cast("tuple[float, float]", tuple(crop_scale))
        crop = view_lib.ViewSpec(1, 1, scale, jitter_probability=0.0, grey_probability=0.0)
    given = {"label": label, "splits": tuple(splits), "test_share": test_share, "templates": templates,
             "classes": classes or None, "dtype": dtype, "batch_size": encode_batch,
             "drop_empty_classes": drop_empty_classes}  # fmt: skip
    plan, cache = _one_pass(weights, str(root), tuple(given.items()))
    towers, side = plan.towers, plan.towers.config.vision.image_size
    sized = None if crop is None else dataclasses.replace(crop, size=side)

    def features(variables: Any, key: Key, images: Array) -> Array:
        pixels = images if sized is None else random_crops(key, sized, images)
        return towers.features("image", variables, {"pixels": pixels})

    tower = Tower(towers.variables["image"], side, features)
    return with_base(cache._replace(tower=tower), base, seed=seed)


def random_crops(key: Key, spec: view_lib.ViewSpec, images: Array) -> Array:
    """One crop of each image, uint8 [B,H,W,3] -> levels 0..255, float32 [B,S,S,3]."""
    count, height, width, _ = images.shape
    (drawn,) = view_lib.sample_parameters(key, spec, count, height, width)
    planar = jnp.swapaxes(images, 2, 3).astype(jnp.float32)
    found = geometry.crop_resize(planar, drawn.box, drawn.flip, spec.size, spec.interpolation, jnp.dtype(jnp.float32))
    return jnp.swapaxes(found, 2, 3)


@functools.lru_cache(maxsize=1)
def _one_pass(weights: str, data: str, given: tuple[tuple[str, Any], ...]) -> tuple[Plan, FeatureCache]:
    """What was opened, and the checked cache of all splits; the last is kept: training, report and loading ask."""
    from protojax.towers import bank

    plan = bank.open_plan(weights, data=data, **dict(given))
    found, encoded = bank.fill(plan)
    plan.towers.release()  # the step has them among its constants
    rows_of = {name: one.rows for name, one in encoded.items()}

    def pictures(split: str, rows: np.ndarray) -> np.ndarray:
        records = plan.pictures.splits[split]
        content, good = records.read(rows_of[split][rows])
        if not good.all():
            raise ValueError(f"{records.name}: {int((~good).sum())} pictures could be read when the run began and "
                             f"cannot now: {records.problems()[-1:]}")  # fmt: skip
        return content["image"]

    return plan, check_cache(found._replace(pictures=pictures), drop_empty_classes=dict(given)["drop_empty_classes"])
