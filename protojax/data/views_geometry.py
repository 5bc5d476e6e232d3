"""Crop, flip, resize and blur as one weight matrix per axis.

Images here are `[B,H,3,W]` (channels between rows and columns): both axis products are then plain batched matrix
products of contiguous operands, `columns: [B,H*3,W] x [B,W,S]` and `rows: [B,S,H] x [B,H,3*S]`, with no transpose in
between; a vmapped depthwise convolution is an order of magnitude slower.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from protojax.api import Array

TRIES = 10
FILTER_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
CUBIC_A = -0.5  # Pillow's bicubic (Catmull-Rom); OpenCV and torch tensors use -0.75


def boxes_from_uniforms(
    draws: Array, height: int | Array, width: int | Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> Array:
    """Crop boxes of RandomResizedCrop: int32 `[..., 4]` = (top, left, height, width), in pixels.

    A try draws area = H0 W0 U(scale) and aspect = exp(U(log ratio)), and rounds width = sqrt(area * aspect) and
    height = sqrt(area / aspect) half to even; the first of 10 tries that fits the image wins and gets a uniform
    integer offset. If none fits: the largest central crop whose aspect is inside `ratio`. All ten tries are evaluated
    at once, so there is no data-dependent loop.

    draws: float32 `[..., 22]` uniform in [0, 1): ten areas, ten aspects, top, left. height, width: pixels, one number
    or int32 with the leading axes of `draws`. scale: range of the area as a
    fraction of the image. ratio: range of width / height. Source: torchvision `RandomResizedCrop.get_params`.
    """
    pixels: Any = float(height * width) if isinstance(height, int) else _f32(height * width)[..., None]
    area = (draws[..., :TRIES] * (scale[1] - scale[0]) + scale[0]) * pixels
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = jnp.exp(draws[..., TRIES : 2 * TRIES] * (high - low) + low)
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    limits = [v if isinstance(v, int) else v[..., None] for v in (height, width)]
    fits = (widths > 0) & (widths <= limits[1]) & (heights > 0) & (heights <= limits[0])

    crop: Any = fallback_crop if isinstance(height, int) else _fallback_crops
    fallback_height, fallback_width = crop(height, width, ratio)
    box_height = jnp.broadcast_to(jnp.asarray(fallback_height, jnp.int32), draws.shape[:-1])
    box_width = jnp.broadcast_to(jnp.asarray(fallback_width, jnp.int32), draws.shape[:-1])
    for attempt in reversed(range(TRIES)):
        box_height = jnp.where(fits[..., attempt], heights[..., attempt], box_height)
        box_width = jnp.where(fits[..., attempt], widths[..., attempt], box_width)

    def offset(draw: Array, free: Array) -> Array:
        # Uniform on 0..free, up to 2^-23 (free + 1); the minimum guards the rounding of the product for u near 1.
        return jnp.minimum(jnp.floor(draw * (free + 1).astype(jnp.float32)).astype(jnp.int32), free)

    some = jnp.any(fits, axis=-1)
    top = jnp.where(some, offset(draws[..., 2 * TRIES], height - box_height), (height - fallback_height) // 2)
    left = jnp.where(some, offset(draws[..., 2 * TRIES + 1], width - box_width), (width - fallback_width) // 2)
    return jnp.stack([top, left, box_height, box_width], axis=-1)


def fallback_crop(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """(height, width) in pixels of the largest crop of the image whose aspect lies in `ratio`."""
    aspect = width / height
    if aspect < min(ratio):
        return min(height, round(width / min(ratio))), width
    if aspect > max(ratio):
        return height, min(width, round(height * max(ratio)))
    return height, width


def _f32(values: Array) -> Array:
    return values.astype(jnp.float32)


def _fallback_crops(height: Array, width: Array, ratio: tuple[float, float]) -> tuple[Array, Array]:
    """`fallback_crop` of many images: heights and widths int32 of one shape."""
    aspect = _f32(width) / _f32(height)
    tall = jnp.minimum(height, jnp.round(_f32(width) / min(ratio)).astype(jnp.int32))
    wide = jnp.minimum(width, jnp.round(_f32(height) * max(ratio)).astype(jnp.int32))
    return jnp.where(aspect < min(ratio), tall, height), jnp.where(aspect > max(ratio), wide, width)


def on_canvas(box: Array, extent: Array, canvas: int) -> Array:
    """Boxes `[B,4]` drawn on images of `extent [B,2]` (height, width) -> float32 boxes on the square canvas that holds
    the whole image with each axis scaled to `canvas` pixels."""
    factor = canvas / _f32(extent)
    return _f32(box) * jnp.concatenate([factor, factor], axis=-1)


def resize_matrix(
    start: Array, length: Array, flip: Array | None, input_size: int, output_size: int, interpolation: str
) -> Array:
    """Crop, flip and antialiased resize of one axis as weights `[B,S,W]`, float32, rows summing to 1.

    Row i weighs pixel w by f((w - start + 1/2 - c_i) / s) with c_i = (i + 1/2) length / S, s = max(length / S, 1)
    (the filter is stretched when shrinking: antialiasing) and f the bilinear (triangle) or bicubic (a = -1/2) kernel;
    pixels outside the box get 0 and each row is normalised. This is Pillow's `image.crop(box).resize(size)`, what
    torchvision runs on Pillow images. (`image.resize(size, box=box)` also looks past the edge of the box; the two
    agree where the filter stays inside.)

    start, length: `[B]`, pixels, int32, or float32 where the canvas is scaled (a pixel is inside when its centre is; a
    box must be two pixels or longer). flip: bool `[B]` or None, reverses the output. Bands are dense here: S x W is
    small, and matrix units like it.
    """
    step = length.astype(jnp.float32)[:, None] / output_size
    outputs = jnp.arange(output_size, dtype=jnp.float32)[None, :]
    if flip is not None:
        outputs = jnp.where(flip[:, None], (output_size - 1.0) - outputs, outputs)
    centres = (outputs + 0.5) * step
    if jnp.issubdtype(start.dtype, jnp.integer):
        pixels = jnp.arange(input_size, dtype=jnp.int32)[None, :] - start[:, None]
        inside = (pixels >= 0) & (pixels < length[:, None])
    else:
        pixels = jnp.arange(input_size, dtype=jnp.float32)[None, :] - start[:, None]
        inside = (pixels >= -0.5) & (pixels + 0.5 <= length[:, None])
    distance = jnp.abs((pixels.astype(jnp.float32) + 0.5)[:, None, :] - centres[:, :, None])
    weights = _kernel(distance / jnp.maximum(step, 1.0)[:, :, None], FILTER_SUPPORT[interpolation])
    weights = jnp.where(inside[:, None, :], weights, 0.0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _kernel(distance: Array, support: float) -> Array:
    if support == 1.0:
        return jnp.maximum(1.0 - distance, 0.0)
    near = ((CUBIC_A + 2.0) * distance - (CUBIC_A + 3.0)) * distance * distance + 1.0
    far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * CUBIC_A
    return jnp.where(distance < 1.0, near, jnp.where(distance < 2.0, far, 0.0))


def blur_matrix(sigma: Array, size: int) -> Array:
    """Pillow's Gaussian blur of one axis as weights `[B,S,S]`, float32, rows summing to 1.

    Pillow runs three passes of an extended box filter whose variance is exactly sigma^2 / 3, repeating the edge pixel
    before each pass: M = E E E with E_ij = clip(r + 1 - |i - j|, 0, 1) / (2 r + 1), and what falls outside added to
    the edge column, max(r - i, 0) / (2 r + 1) on the left. r(sigma) is formula (14) of Gwosdek et al. (2011),
    "Theoretical foundations of Gaussian convolution by extended box filtering". sigma = 0 gives exactly the identity.
    (A sampled Gaussian differs below sigma = 0.7, where sampling loses most of its variance; the published recipes
    ran Pillow.)

    sigma: float32 `[B]`, standard deviation in pixels of the view.
    """
    radius = box_radius(sigma)[:, None, None]
    index = jnp.arange(size, dtype=jnp.float32)
    lag = jnp.abs(index[:, None] - index[None, :])[None]
    rows = index[None, :, None]
    first, last = (index == 0)[None, None, :], (index == size - 1)[None, None, :]
    box = jnp.clip(radius + 1.0 - lag, 0.0, 1.0)
    box = box + jnp.where(first, jnp.maximum(radius - rows, 0.0), 0.0)
    box = box + jnp.where(last, jnp.maximum(radius - ((size - 1.0) - rows), 0.0), 0.0)
    box = box / (2.0 * radius + 1.0)
    return multiply(multiply(box, box, jnp.dtype(jnp.float32)), box, jnp.dtype(jnp.float32))


def box_radius(sigma: Array) -> Array:
    """Radius r of the extended box filter of variance sigma^2 / 3: r whole pixels on each side, and a fraction."""
    variance = sigma * sigma / 3.0
    whole = jnp.floor((jnp.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    numerator = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
    return whole + numerator / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)))


def multiply(left: Array, right: Array, dtype: DTypeLike) -> Array:
    """Batched matrix product in float32, or with operands rounded to `dtype` and float32 accumulation.

    With float32 operands the product is a true float32 one on every device (no TF32 or bfloat16 passes)."""
    return jnp.matmul(
        left.astype(dtype),
        right.astype(dtype),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def transform_columns(images: Array, weights: Array, dtype: DTypeLike) -> Array:
    """`[B,H,3,W] x [B,S,W] -> [B,H,3,S]`: weights applied to the columns axis."""
    batch, height, channels, width = images.shape
    product = multiply(images.reshape(batch, height * channels, width), jnp.swapaxes(weights, 1, 2), dtype)
    return product.reshape(batch, height, channels, weights.shape[1])


def transform_rows(images: Array, weights: Array, dtype: DTypeLike) -> Array:
    """`[B,H,3,W] x [B,S,H] -> [B,S,3,W]`: weights applied to the rows axis."""
    batch, height, channels, width = images.shape
    product = multiply(weights, images.reshape(batch, height, channels * width), dtype)
    return product.reshape(batch, weights.shape[1], channels, width)


def crop_resize(
    images: Array, box: Array, flip: Array | None, size: int, interpolation: str, dtype: DTypeLike
) -> Array:
    """Crop, mirror and resize: `[B,H0,3,W0]` levels 0..255 and boxes `[B,4]` -> float32 `[B,S,3,S]` in 0..255.

    Columns first and, for the bicubic filter, clipped after each axis, as Pillow did for the published recipes (the
    filter overshoots, Pillow's bytes cannot; since version 13 Pillow takes the rows of tall crops first, which differs
    at clipped edges). dtype: of the operands of the two products."""
    top, left, height, width = (box[:, field] for field in range(4))
    columns = resize_matrix(left, width, flip, images.shape[3], size, interpolation)
    rows = resize_matrix(top, height, None, images.shape[1], size, interpolation)
    overshoots = interpolation == "bicubic"
    images = transform_columns(images, columns, dtype)
    if overshoots:
        images = jnp.clip(images, 0.0, 255.0)
    images = transform_rows(images, rows, dtype)
    return jnp.clip(images, 0.0, 255.0) if overshoots else images


def blur(images: Array, sigma: Array, dtype: DTypeLike) -> Array:
    """Gaussian blur as Pillow computes it: square `[B,S,3,S]`, sigma float32 `[B]` in pixels -> the same shape."""
    weights = blur_matrix(sigma, images.shape[1])
    return transform_rows(transform_columns(images, weights, dtype), weights, dtype)
