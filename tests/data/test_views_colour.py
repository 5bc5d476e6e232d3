"""Colour operations against Pillow, colorsys and a slow NumPy twin of ColorJitter in every order."""

from __future__ import annotations

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from protojax.data import views_colour as colour

GREY = np.array([0.299, 0.587, 0.114])
HARD_PIXELS = [  # ties between channels, greys, primaries, and near-greys where hue is ill-defined
    [0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255],
    [90, 90, 90], [90, 90, 20], [20, 90, 90], [90, 20, 90], [128, 127, 127], [127, 128, 128], [1, 0, 0],
    [254, 255, 255],
]  # fmt: skip


def pixels(side: int = 16) -> np.ndarray:
    """uint8 [side,side,3]: random colours, the first row hard ones."""
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image[0, : len(HARD_PIXELS)] = HARD_PIXELS
    return image


def to_planar(image: np.ndarray, copies: int = 1) -> jax.Array:
    """[H,W,3] levels 0..255 -> float32 [copies,H,3,W] in [0, 1]."""
    planar = jnp.swapaxes(jnp.asarray(image, jnp.float32), 1, 2)[None] / 255.0
    return jnp.tile(planar, (copies, 1, 1, 1))


def from_planar(images: jax.Array) -> np.ndarray:
    return np.asarray(jnp.swapaxes(images, 2, 3), np.float64) * 255.0


def single(op: int, factors: list[float]) -> colour.JitterParameters:
    """Parameters that apply one operation, one factor an image; the others are absent."""
    fields: list[jax.Array | None] = [None] * 4
    fields[op] = jnp.asarray(factors, jnp.float32)
    return colour.JitterParameters(*fields, jnp.tile(jnp.arange(4, dtype=jnp.int32), (len(factors), 1)))


@pytest.mark.parametrize(
    ("op", "enhance"),
    [
        (colour.BRIGHTNESS, ImageEnhance.Brightness),
        (colour.CONTRAST, ImageEnhance.Contrast),
        (colour.SATURATION, ImageEnhance.Color),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_blends_are_pillows_up_to_its_rounding(op: int, enhance: type) -> None:
    image, factors = pixels(), [0.0, 0.6, 0.93, 1.0, 1.21, 1.4, 2.5]
    ours = from_planar(jax.jit(colour.jitter)(to_planar(image, len(factors)), single(op, factors)))
    for result, factor in zip(ours, factors, strict=True):
        expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor), np.float64)
        # Pillow rounds the grey (1/2, weighed by 1 - f) and truncates the blend (up to 1). Float32: 1e-3 of a level.
        assert np.abs(result - expected).max() <= 1.0 + 0.5 * abs(1.0 - factor) + 1e-3
    np.testing.assert_allclose(ours[3], image, atol=1e-4)  # factor 1


def hue_twin(image: np.ndarray, turns: float) -> np.ndarray:
    """[H,W,3] in [0, 1], through colorsys, a pixel at a time."""
    rotated = np.empty(image.shape)
    for index in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[index].tolist())
        rotated[index] = colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)
    return rotated


def test_hue_rotates_as_colorsys() -> None:
    image, turns = pixels() / 255.0, [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1, 0.5, 1.0]
    ours = colour.rotate_hue(to_planar(pixels(), len(turns)), jnp.asarray(turns, jnp.float32))
    for result, turn in zip(from_planar(ours) / 255.0, turns, strict=True):
        # hue in sixths is of order 6 with an error of 6 x 2^-24 a step; chroma <= 1 carries it to the levels
        np.testing.assert_allclose(result, hue_twin(image, turn), atol=4e-6)
    for neutral in (3, 7):  # no turn, a whole turn
        np.testing.assert_allclose(from_planar(ours)[neutral], pixels(), atol=1e-3)


def test_hue_is_continuous_in_the_pixel() -> None:
    """A last-bit change of a channel (another fusion of the same graph) must not become a change of colour."""
    image, rotate = to_planar(pixels()), jax.jit(colour.rotate_hue)
    nudged = image * (1.0 + 2.0**-22 * jnp.asarray([1.0, -1.0, 0.0], jnp.float32)[None, None, :, None])
    turn = jnp.asarray([0.08], jnp.float32)
    change = jnp.abs(rotate(image, turn) - rotate(nudged, turn))
    assert float(jnp.max(change)) < 20 * 2.0**-22


def jitter_twin(image: np.ndarray, order: tuple[int, ...], factors: tuple[float, ...]) -> np.ndarray:
    """ColorJitter in float64, one operation after the other. [H,W,3] in [0, 1]."""
    for op in order:
        luma = (image @ GREY)[..., None]
        if op == colour.HUE:
            image = hue_twin(image, factors[op])
            continue
        towards = {colour.BRIGHTNESS: 0.0, colour.CONTRAST: luma.mean(), colour.SATURATION: luma}[op]
        image = np.clip(factors[op] * image + (1 - factors[op]) * towards, 0, 1)
    return image


def test_every_order_of_the_four_operations() -> None:
    orders = list(itertools.permutations(range(4)))
    factors = (1.35, 0.65, 1.18, 0.09)  # saturates some channels, so that the order matters
    parameters = colour.JitterParameters(
        *(jnp.full((24,), factor, jnp.float32) for factor in factors), jnp.asarray(orders, jnp.int32)
    )
    image = pixels()
    ours = from_planar(jax.jit(colour.jitter)(to_planar(image, 24), parameters)) / 255.0
    for result, order in zip(ours, orders, strict=True):
        np.testing.assert_allclose(result, jitter_twin(image / 255.0, order, factors), atol=1e-5)
    # and the 24 pictures differ, by ten tolerances at least: no order passes for another
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(ours, 2)) > 1e-4


def test_operations_may_be_absent_in_any_order() -> None:
    """None is the same as a neutral factor, and keeps the order of the others."""
    orders = list(itertools.permutations(range(4)))
    image = pixels()
    for absent, neutral in ((colour.CONTRAST, 1.0), (colour.HUE, 0.0)):
        factors = [1.35, 0.65, 1.18, 0.09]
        factors[absent] = neutral
        fields: list[jax.Array | None] = [jnp.full((24,), factor, jnp.float32) for factor in factors]
        fields[absent] = None
        parameters = colour.JitterParameters(*fields, jnp.asarray(orders, jnp.int32))
        ours = from_planar(jax.jit(colour.jitter)(to_planar(image, 24), parameters)) / 255.0
        for result, order in zip(ours[::5], orders[::5], strict=True):
            np.testing.assert_allclose(result, jitter_twin(image / 255.0, order, tuple(factors)), atol=1e-5)


def test_grey_is_pillows_luma() -> None:
    image = pixels()
    ours = from_planar(colour.grey_where(to_planar(image, 2), jnp.asarray([True, False])))
    expected = np.asarray(Image.fromarray(image).convert("L"), np.float64)[..., None]
    assert np.abs(ours[0] - expected).max() <= 0.5 + 1e-3  # Pillow rounds to a byte
    np.testing.assert_allclose(ours[1], image, atol=1e-4)


@pytest.mark.parametrize("threshold", [0, 64, 128, 256])
def test_solarise_is_pillows(threshold: int) -> None:
    image = pixels()
    ours = from_planar(colour.solarise(to_planar(image, 2), jnp.asarray([True, False]), threshold))
    np.testing.assert_array_equal(np.round(ours[0]), np.asarray(ImageOps.solarize(Image.fromarray(image), threshold)))
    np.testing.assert_array_equal(np.round(ours[1]), image)


def test_solarise_at_128_is_continuous_between_bytes() -> None:
    levels = np.full((4, 4, 3), 127.5) + np.linspace(-1e-3, 1e-3, 16).reshape(4, 4, 1)
    ours = from_planar(colour.solarise(to_planar(levels), jnp.asarray([True]), 128))
    np.testing.assert_allclose(ours, 127.5, atol=2e-3)
