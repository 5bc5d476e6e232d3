"""Crop, flip, resize and blur matrices against Pillow and slow NumPy twins."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import stats

from protojax.data import views_geometry as geometry

FLOAT32 = jnp.dtype(jnp.float32)
BFLOAT16 = jnp.dtype(jnp.bfloat16)
BOXES = np.array(  # top, left, height, width: whole, shrinking, enlarging, mixed, one pixel, a corner
    [[0, 0, 40, 48], [3, 5, 33, 31], [10, 20, 12, 9], [0, 30, 40, 7], [39, 47, 1, 1], [28, 36, 12, 12]], np.int32
)
FLIPS = np.array([False, True, False, True, True, False])
SIZE = 24
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [H,W,3] with everything that is hard: noise, smooth ramps and saturated edges."""
    rng = np.random.default_rng(seed)
    image = np.linspace(0, 255, height * width).reshape(height, width, 1) + rng.normal(0, 40, (height, width, 3))
    image[: height // 3, : width // 3] = 255
    image[height // 2 :, width // 2 :] *= rng.random((height - height // 2, width - width // 2, 1)) > 0.5
    return np.clip(image, 0, 255).astype(np.uint8)


def to_planar(images: np.ndarray) -> jax.Array:
    return jnp.swapaxes(jnp.asarray(images), 2, 3).astype(jnp.float32)


def from_planar(images: jax.Array) -> np.ndarray:
    return np.asarray(jnp.swapaxes(images, 2, 3))


def crop(interpolation: str, dtype: jnp.dtype) -> np.ndarray:
    images = to_planar(np.repeat(photograph(40, 48)[None], len(BOXES), 0))
    resize = jax.jit(geometry.crop_resize, static_argnums=(3, 4, 5))
    return from_planar(resize(images, jnp.asarray(BOXES), jnp.asarray(FLIPS), SIZE, interpolation, dtype))


def absolute_row_sum(interpolation: str) -> float:
    """How much one pass can amplify an error of its input: the largest sum of |weights| (1 for bilinear)."""
    sums = []
    for axis, extent in ((0, 40), (1, 48)):
        start, length = jnp.asarray(BOXES[:, axis]), jnp.asarray(BOXES[:, axis + 2])
        weights = geometry.resize_matrix(start, length, None, extent, SIZE, interpolation)
        sums.append(float(jnp.max(jnp.sum(jnp.abs(weights), axis=-1))))
    return max(sums)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_flip_resize_is_pillows_up_to_its_rounding(interpolation: str) -> None:
    image = Image.fromarray(photograph(40, 48))
    ours = crop(interpolation, FLOAT32)
    # Pillow rounds to bytes after the columns (an error of 1/2, then weighed by the rows) and after the rows (1/2).
    tolerance = 0.5 * absolute_row_sum(interpolation) + 0.5 + 0.01
    for number, (top, left, height, width) in enumerate(BOXES.tolist()):
        # Columns, then rows, as every Pillow did until 12; later ones may swap the passes, and clipping tells.
        cut = image.crop((left, top, left + width, top + height))
        expected = cut.resize((SIZE, height), RESAMPLING[interpolation]).resize((SIZE, SIZE), RESAMPLING[interpolation])
        if FLIPS[number]:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        error = np.abs(ours[number] - np.asarray(expected, np.float32))
        assert error.max() <= tolerance, f"box {number}: {error.max()} > {tolerance}"
        assert error.mean() < 0.5  # and not merely within the worst case


def test_resize_with_a_box_agrees_with_pillow_where_the_filter_stays_inside() -> None:
    """`Image.resize(box=)` looks past the edge of the box, a crop cannot: equal away from the border."""
    top, left, height, width = BOXES[1].tolist()
    columns = Image.fromarray(photograph(40, 48)).resize(
        (SIZE, 40), Image.Resampling.BICUBIC, box=(left, 0, left + width, 40)
    )
    expected = columns.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(0, top, SIZE, top + height))
    ours = crop("bicubic", FLOAT32)[1][:, ::-1]  # box 1 is mirrored
    error = np.abs(ours - np.asarray(expected, np.float32))[3:-3, 3:-3]
    assert error.max() <= 0.5 * absolute_row_sum("bicubic") + 0.51


def test_whole_image_at_its_own_size_is_the_identity() -> None:
    image = photograph(32, 32)
    box = jnp.asarray([[0, 0, 32, 32]], jnp.int32)
    resize = jax.jit(geometry.crop_resize, static_argnums=(3, 4, 5))
    for flip, expected in ((False, image), (True, image[:, ::-1])):
        view = resize(to_planar(image[None]), box, jnp.asarray([flip]), 32, "bicubic", FLOAT32)
        np.testing.assert_array_equal(from_planar(view)[0], expected)


def test_bfloat16_products_cost_two_levels_at_most() -> None:
    # Unit roundoff 2^-9; rounded: both weight matrices and the intermediate image (bytes are exact in bfloat16).
    amplification = absolute_row_sum("bicubic")
    tolerance = 255 * 2.0**-9 * (2 * amplification**2 + amplification) * 1.01
    error = np.abs(crop("bicubic", BFLOAT16) - crop("bicubic", FLOAT32))
    assert error.max() <= tolerance
    assert 0 < error.mean() < 0.5


def test_resize_rows_sum_to_one_and_see_only_the_box() -> None:
    weights = np.asarray(
        geometry.resize_matrix(jnp.asarray(BOXES[:, 1]), jnp.asarray(BOXES[:, 3]), None, 48, SIZE, "bicubic")
    )
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    for rows, (_, left, _, width) in zip(weights, BOXES.tolist(), strict=True):
        assert not rows[:, :left].any()
        assert not rows[:, left + width :].any()


def box_passes(signal: np.ndarray, sigma: float, passes: int = 3) -> np.ndarray:
    """Twin of Pillow's blur of one axis (the last) in float64: explicit windows over an edge-padded signal."""
    variance = sigma**2 / passes
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    for _ in range(passes):
        padded = np.pad(signal, [(0, 0)] * (signal.ndim - 1) + [(whole + 1, whole + 1)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * whole + 3, axis=-1)
        weights = np.ones(2 * whole + 3)
        weights[[0, -1]] = part
        signal = windows @ (weights / (2 * whole + 1 + 2 * part))
    return signal


SIGMAS = np.array([0.0, 0.1, 0.4, 0.9, 1.7, 2.0, 5.0], np.float32)


def test_blur_is_three_extended_box_passes_with_repeated_edges() -> None:
    image = photograph(20, 20).astype(np.float64)
    repeated = jnp.asarray(np.repeat(image[None], len(SIGMAS), 0), jnp.float32)
    ours = from_planar(
        jax.jit(geometry.blur, static_argnums=2)(jnp.swapaxes(repeated, 2, 3), jnp.asarray(SIGMAS), FLOAT32)
    )
    np.testing.assert_array_equal(ours[0], image)  # sigma 0: exactly the identity
    for blurred, sigma in zip(ours, SIGMAS.tolist(), strict=True):
        expected = box_passes(np.moveaxis(image, 1, -1), sigma)  # columns last: [H,3,W]
        expected = box_passes(np.moveaxis(expected, 0, -1), sigma)  # rows last: [3,W,H]
        # float32: about 30 products and sums of numbers up to 255
        np.testing.assert_allclose(blurred, np.transpose(expected, (2, 1, 0)), atol=30 * 255 * 2.0**-24)


def test_blur_is_pillows_up_to_its_rounding() -> None:
    image = photograph(40, 40)
    images = to_planar(np.repeat(image[None], len(SIGMAS), 0))
    ours = from_planar(jax.jit(geometry.blur, static_argnums=2)(images, jnp.asarray(SIGMAS), FLOAT32))
    for blurred, sigma in zip(ours, SIGMAS.tolist(), strict=True):
        expected = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)), np.float32)
        error = np.abs(blurred - expected)
        # Three passes an axis, each rounds to bytes (1/2) and none amplifies (positive weights of sum 1).
        assert error.max() <= 6 * 0.5 + 0.01, (sigma, error.max())
        assert error.mean() < 1.0


def test_blur_has_the_variance_and_nearly_the_shape_of_the_gaussian() -> None:
    size, centre = 61, 30
    weights = np.asarray(geometry.blur_matrix(jnp.asarray(SIGMAS), size), np.float64)[:, centre]
    lags = np.arange(size) - centre
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose((weights * lags**2).sum(-1), SIGMAS.astype(np.float64) ** 2, rtol=1e-5, atol=1e-5)
    for row, sigma in zip(weights[3:], SIGMAS[3:].tolist(), strict=True):
        gaussian = np.exp(-0.5 * (lags / sigma) ** 2)
        # a piecewise quadratic is not a Gaussian: compared as distributions, a few percent of total variation
        assert 0.5 * np.abs(row - gaussian / gaussian.sum()).sum() < 0.04


def crop_twin(draws: np.ndarray, height: int, width: int, scale: tuple, ratio: tuple) -> list[int]:
    """RandomResizedCrop's loop, one image at a time in float64, fed with the same uniforms."""
    for attempt in range(10):
        area = height * width * (scale[0] + draws[attempt] * (scale[1] - scale[0]))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + draws[10 + attempt] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w]
    if width / height < min(ratio):
        h, w = round(width / min(ratio)), width
    elif width / height > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        h, w = height, width
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(64, 64, (0.2, 1.0)), (64, 64, (0.05, 0.2)), (20, 90, (0.2, 1.0)), (90, 20, (0.9, 1.0)), (8, 8, (0.001, 0.002))],
    ids=["global", "local", "wide", "tall-always-fallback", "empty-boxes-fallback"],
)
def test_boxes_are_those_of_random_resized_crop(height: int, width: int, scale: tuple[float, float]) -> None:
    ratio = (3 / 4, 4 / 3)
    draws = np.random.default_rng(3).random((500, 22), np.float32)
    sample = jax.jit(geometry.boxes_from_uniforms, static_argnums=(1, 2, 3, 4))
    ours = sample(jnp.asarray(draws), height, width, scale, ratio)
    assert ours.dtype == jnp.int32
    expected = [crop_twin(row.astype(np.float64), height, width, scale, ratio) for row in draws]
    np.testing.assert_array_equal(np.asarray(ours), np.array(expected))


def test_area_is_uniform_ratio_log_uniform_and_offsets_uniform() -> None:
    count, side = 4000, 10_000  # a large image, so that whole pixels do not show
    draws = jnp.asarray(np.random.default_rng(4).random((count, 22), np.float32))
    boxes = np.asarray(geometry.boxes_from_uniforms(draws, side, side, (0.2, 0.5), (3 / 4, 4 / 3)), np.float64)
    top, left, height, width = boxes.T
    bound = 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at p = 0.001
    assert stats.kstest((height * width / side**2 - 0.2) / 0.3, "uniform").statistic < bound
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert stats.kstest((np.log(width / height) - low) / (high - low), "uniform").statistic < bound
    assert stats.kstest(top / (side - height), "uniform").statistic < bound
    assert stats.kstest(left / (side - width), "uniform").statistic < bound
    assert abs(np.corrcoef(top, left)[0, 1]) < 4 / math.sqrt(count)
