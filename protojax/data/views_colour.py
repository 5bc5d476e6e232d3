"""Colour jitter, grey and solarise as elementwise maths on levels in [0, 1], channels at axis 2: `[B,H,3,W]`.

Brightness, contrast and saturation are one operation, a blend `clip(f x + (1 - f) d)` with d = 0, the mean grey of the
image, or the grey of the pixel. Random order without evaluating 24 orders, nor the hue rotation four times: three
blend slots, the hue rotation, and the same three slots again; each image uses three of the six (f = 1 is the
identity) according to where the hue stands in its order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import Array

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's mode 'L'
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class JitterParameters(NamedTuple):
    """One draw of ColorJitter per image. An operation that is None is not computed at all.

    brightness, contrast, saturation: float32 `[B]` factors, 1 = unchanged. hue: float32 `[B]` rotation in turns, 0 =
    unchanged. order: int32 `[B,4]`, order[b, s] is the operation that image b undergoes at place s (0 brightness,
    1 contrast, 2 saturation, 3 hue).
    """

    brightness: Array | None
    contrast: Array | None
    saturation: Array | None
    hue: Array | None
    order: Array


def grey(images: Array) -> Array:
    """Luma `[B,H,1,W]` = 0.299 R + 0.587 G + 0.114 B (ITU-R 601; Pillow also rounds it to a byte)."""
    red, green, blue = (images[:, :, channel : channel + 1] for channel in range(3))
    return GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue


def grey_where(images: Array, chosen: Array) -> Array:
    """The chosen images (bool `[B]`) with every channel replaced by their luma."""
    return jnp.where(_per_image(chosen), grey(images), images)


def rotate_hue(images: Array, turns: Array) -> Array:
    """Adds `turns` `[B]` to the hue of HSV, value and saturation kept.

    With V = max, C = max - min and hue h in sixths of a turn, channel n in (5, 3, 1) becomes
    V - C clip(min(k, 4 - k), 0, 1), k = (n + h + 6 turns) mod 6. Pillow also rounds H, S and V to bytes."""
    red, green, blue = (images[:, :, channel : channel + 1] for channel in range(3))
    value = jnp.max(images, axis=2, keepdims=True)
    chroma = value - jnp.min(images, axis=2, keepdims=True)
    inverse = 1.0 / jnp.where(chroma > 0.0, chroma, 1.0)
    # The sector is chosen by comparing channels, never by `value == red`: h is continuous across sectors, so a last-bit
    # difference between two recomputations of a pixel (a fusing compiler makes them) stays a last-bit difference.
    sixths = jnp.where(
        (red >= green) & (red >= blue),
        (green - blue) * inverse,
        jnp.where(green >= blue, (blue - red) * inverse + 2.0, (red - green) * inverse + 4.0),
    )
    k = sixths + 6.0 * _per_image(turns) + jnp.asarray([5.0, 3.0, 1.0], jnp.float32)[None, None, :, None]
    k = k - 6.0 * jnp.floor(k / 6.0)
    return value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def jitter(images: Array, parameters: JitterParameters) -> Array:
    """ColorJitter in each image's own order: `[B,H,3,W]` in [0, 1] -> the same.

    Semantics of torchvision on Pillow images without the rounding to bytes after each operation; contrast blends with
    the mean grey unrounded (Pillow rounds it to a level)."""
    places = _places(parameters.order)
    slots = [_slot(parameters, places, slot) for slot in range(3)]
    # A barrier after each stage: otherwise XLA fuses the whole chain into its consumers and computes it once for each
    # channel and each reduction, several times over.
    stage = jax.lax.optimization_barrier
    if parameters.hue is None:
        for slot in slots:
            images = stage(_blend(images, slot))
        return images
    for index, slot in enumerate(slots):
        images = stage(_blend(images, _slot_where(slot, index < places[HUE])))
    images = stage(rotate_hue(images, parameters.hue))
    for index, slot in enumerate(slots):
        images = stage(_blend(images, _slot_where(slot, index >= places[HUE])))
    return images


def solarise(images: Array, chosen: Array, threshold: float) -> Array:
    """Inverts levels at or above `threshold` (of 255) in the chosen images (bool `[B]`).

    Pillow compares bytes, so a real level counts as reaching the threshold when it rounds to it: 1/2 is subtracted.
    At 128 the map is then continuous."""
    above = images >= (threshold - 0.5) / 255.0
    return jnp.where(_per_image(chosen) & above, 1.0 - images, images)


class _Slot(NamedTuple):
    """Coefficients `[B]` of x <- clip(keep x + pixel_grey g(x) + mean_grey mean(g(x))); None: the term is absent."""

    keep: Array
    pixel_grey: Array | None
    mean_grey: Array | None


def _per_image(values: Array) -> Array:
    return values[:, None, None, None]


def _places(order: Array) -> list[Array]:
    """For each operation, its place `[B]` in the order: the inverse permutation."""
    slots = jnp.arange(4, dtype=jnp.int32)[None, :]
    return [jnp.sum(jnp.where(order == op, slots, 0), axis=1, dtype=jnp.int32) for op in range(4)]


def _slot(parameters: JitterParameters, places: list[Array], slot: int) -> _Slot:
    """The blend that stands at `slot` of three once the hue is left out of the order."""
    keep = jnp.ones(parameters.order.shape[:1], jnp.float32)
    towards: dict[int, Array] = {}
    factors = {BRIGHTNESS: parameters.brightness, CONTRAST: parameters.contrast, SATURATION: parameters.saturation}
    for op, factor in factors.items():
        if factor is None:
            continue
        here = places[op] - (places[op] > places[HUE]).astype(jnp.int32) == slot
        keep = jnp.where(here, factor, keep)
        towards[op] = jnp.where(here, 1.0 - factor, 0.0)
    return _Slot(keep, towards.get(SATURATION), towards.get(CONTRAST))


def _slot_where(slot: _Slot, condition: Array) -> _Slot:
    """`slot` where the condition `[B]` holds, the identity elsewhere."""

    def masked(coefficient: Array | None) -> Array | None:
        return None if coefficient is None else jnp.where(condition, coefficient, 0.0)

    return _Slot(jnp.where(condition, slot.keep, 1.0), masked(slot.pixel_grey), masked(slot.mean_grey))


def _blend(images: Array, slot: _Slot) -> Array:
    blended = _per_image(slot.keep) * images
    if slot.pixel_grey is not None or slot.mean_grey is not None:
        luma = grey(images)
        if slot.pixel_grey is not None:
            blended = blended + _per_image(slot.pixel_grey) * luma
        if slot.mean_grey is not None:
            blended = blended + _per_image(slot.mean_grey) * jnp.mean(luma, axis=(1, 3), keepdims=True)
    return jnp.clip(blended, 0.0, 1.0)
