"""Whole images on a square canvas: crops are those of the original image, whatever its aspect."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from protojax.data import decode, views, views_geometry
from protojax.data.decode import ImageReader, TooManyCorrupt
from protojax.data.views import ViewSpec

PLAIN = {
    "flip": 0.0, "jitter_probability": 0.0, "grey_probability": 0.0, "blur_probability": 0.0,
    "solarise_probability": 0.0,
}  # fmt: skip
CANVAS = 64


def ramp(height: int, width: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom: a pixel's colour tells where it comes from."""
    rows, columns = np.mgrid[0:height, 0:width]
    levels = [columns / (width - 1) * 255, rows / (height - 1) * 255, np.full((height, width), 128.0)]
    return Image.fromarray(np.stack(levels, -1).round().astype(np.uint8))


@pytest.mark.parametrize("shape", [(80, 160), (160, 80), (64, 64)])
def test_crops_come_from_the_whole_image_in_its_own_aspect(shape):
    """The random box, taken from the original by Pillow, is our view to within rounding of a ramp's levels."""
    image = ramp(*shape)
    pixels, extent = decode.whole(image, CANVAS)
    assert pixels.shape == (CANVAS, CANVAS, 3)
    assert extent == (CANVAS * shape[0] // min(shape), CANVAS * shape[1] // min(shape))
    spec = ViewSpec(16, 1, (0.2, 1.0), interpolation="bilinear", **PLAIN)
    count = 32
    images = jnp.broadcast_to(jnp.asarray(pixels)[None], (count, *pixels.shape))
    extents = jnp.broadcast_to(jnp.asarray([extent], jnp.int32), (count, 2))
    key = jax.random.key(0)
    (given,) = views.sample_parameters(key, spec, count, CANVAS, CANVAS, extents)
    made = views.apply_parameters(given, images, spec, mean=(0, 0, 0), std=(1, 1, 1))
    draws = jax.random.uniform(key, (count, 1, views._COLUMNS), jnp.float32)[:, 0, views._BOX]
    boxes = np.asarray(views_geometry.boxes_from_uniforms(draws, *extent, spec.scale, spec.ratio))
    reached = 0
    for view, (top, left, height, width) in zip(np.asarray(made) * 255, boxes, strict=True):
        scale = min(shape) / CANVAS
        box = (left * scale, top * scale, (left + width) * scale, (top + height) * scale)
        expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR, box=box), np.float32)
        # One pixel of the canvas is 255 / 64 levels of the ramp; edges of the box fall between pixels.
        assert np.abs(view - expected).max() <= 255 / CANVAS
        reached += left + width > CANVAS or top + height > CANVAS
    assert bool(reached) == (shape != (64, 64))  # a centre square would have cut these off


def test_the_plain_view_is_the_centre_square_of_the_original():
    image = ramp(60, 120)
    pixels, extent = decode.whole(image, CANVAS)
    batch = {"image": jnp.asarray(pixels)[None], "extent": jnp.asarray([extent], jnp.int32)}
    made = views.plain_view(batch, 32, (0, 0, 0), (1, 1, 1))["global"][0, 0] * 255
    expected = np.asarray(image.crop((30, 0, 90, 60)).resize((32, 32), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(np.asarray(made) - expected).max() <= 255 / CANVAS


def test_boxes_of_many_shapes_are_the_boxes_of_each():
    draws = jax.random.uniform(jax.random.key(3), (6, 22), jnp.float32)
    sides = [(64, 64), (64, 190), (190, 64)] * 2
    tall, wide = jnp.asarray(sides, jnp.int32).T
    together = views_geometry.boxes_from_uniforms(draws, tall, wide, (0.2, 1.0), (3 / 4, 4 / 3))
    alone = [
        views_geometry.boxes_from_uniforms(d, h, w, (0.2, 1.0), (3 / 4, 4 / 3))
        for d, (h, w) in zip(draws, sides, strict=True)
    ]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_a_broken_copy_of_the_data_is_not_skipped_over():
    def load(row: int) -> np.ndarray:
        if row % 2:
            raise OSError("image file is truncated")
        return np.zeros((4, 4, 3), np.uint8)

    reader = ImageReader(load, lambda row: f"photo {row}", 100, (4, 4), workers=1)
    with pytest.raises(TooManyCorrupt, match=r"11 of 100 images cannot be decoded, more than 1%: .*photo 21: OSError"):
        reader(np.arange(100))
    with pytest.raises(ValueError, match="fit must be 'crop'"):
        decode.content_shapes(4, 4, "squeeze")  # type: ignore[arg-type]
