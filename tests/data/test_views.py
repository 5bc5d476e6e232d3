"""Views as the training step uses them: recipes, statistics of the draws, the whole chain, sharding, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from protojax.data import views_colour as colour
from protojax.data import views_geometry as geometry
from protojax.data.views import (
    CARP_VIEWS,
    DINO_VIEWS,
    ViewParameters,
    ViewSpec,
    apply_parameters,
    make_views,
    plain_view,
    sample_parameters,
    teacher_views,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
PLAIN = ViewSpec(12, 1, (0.2, 1.0), flip=0.0, jitter_probability=0.0, grey_probability=0.0)


def images(count: int, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def carp() -> Callable[[jax.Array, dict[str, jax.Array]], dict[str, jax.Array]]:
    return jax.jit(make_views(*CARP_VIEWS(16, 8, 3, blur_sigma=(0.1, 1.0)), mean=MEAN, std=STD))


# ------------------------------------------------------------------------------------------------------- recipes
def test_recipes_are_the_published_ones() -> None:
    carp_global, carp_local = CARP_VIEWS()
    dino_global, dino_local = DINO_VIEWS()
    assert carp_local is not None
    assert dino_local is not None
    assert (carp_global.size, carp_global.count, carp_global.scale) == (224, 2, (0.2, 1.0))
    assert (carp_local.size, carp_local.count, carp_local.scale) == (96, 6, (0.05, 0.2))
    assert (dino_global.size, dino_global.count, dino_global.scale) == (224, 2, (0.4, 1.0))
    assert (dino_local.size, dino_local.count, dino_local.scale) == (96, 8, (0.05, 0.4))
    for spec in (carp_global, dino_global):
        assert spec.probabilities("blur_probability") == (1.0, 0.1)
        assert spec.probabilities("solarise_probability") == (0.0, 0.2)
    for spec in (carp_local, dino_local):
        assert set(spec.probabilities("blur_probability")) == {0.5}
        assert set(spec.probabilities("solarise_probability")) == {0.0}
    for spec in (carp_global, carp_local, dino_global, dino_local):
        assert spec.ratio == (3 / 4, 4 / 3)
        assert (spec.flip, spec.jitter, spec.jitter_probability, spec.grey_probability) == (
            0.5,
            (0.4, 0.4, 0.2, 0.1),
            0.8,
            0.2,
        )
        assert (spec.blur_sigma, spec.solarise_threshold, spec.interpolation) == ((0.1, 2.0), 128, "bicubic")
    assert CARP_VIEWS(local_count=0)[1] is None
    small = CARP_VIEWS(48, 24, 2, blur_sigma=(0.1, 0.5), local_blur_sigma=(0.1, 0.25))
    assert [spec.blur_sigma for spec in small if spec] == [(0.1, 0.5), (0.1, 0.25)]


# ----------------------------------------------------------------------------------------------- views(key, batch)
def test_shapes_dtypes_and_determinism(carp: Callable, key: jax.Array) -> None:
    batch = {"image": images(8)}
    views = carp(key, batch)
    assert {name: view.shape for name, view in views.items()} == {"global": (2, 8, 16, 16, 3), "local": (3, 8, 8, 8, 3)}
    assert {view.dtype for view in views.values()} == {jnp.dtype(jnp.float32)}
    assert set(teacher_views(views)) == {"global"}
    assert teacher_views(views)["global"] is views["global"]
    assert teacher_views({**views, "plain": 0})["plain"] == 0
    low, high = (0.0 - np.array(MEAN)) / STD, (1.0 - np.array(MEAN)) / STD
    for view in views.values():
        assert np.all(np.isfinite(view))
        assert np.all(np.asarray(view) >= low - 1e-5)
        assert np.all(np.asarray(view) <= high + 1e-5)
    again, other = carp(key, batch), carp(jax.random.key(1), batch)
    for name in views:
        np.testing.assert_array_equal(views[name], again[name])
        assert not np.array_equal(views[name], other[name])
        assert not np.array_equal(views[name][0], views[name][1])


def test_local_is_absent_without_local_views_and_dtypes_follow(key: jax.Array) -> None:
    make = make_views(replace(PLAIN, count=2), None, mean=MEAN, std=STD, dtype=jnp.bfloat16, matmul_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(make, key, {"image": images(4)})
    assert {name: (view.shape, view.dtype) for name, view in shapes.items()} == {
        "global": ((2, 4, 12, 12, 3), jnp.dtype(jnp.bfloat16))
    }


def test_views_are_independent_of_sharding(carp: Callable, key: jax.Array) -> None:
    """Eight devices, one slice each: the same pictures, and nothing is communicated."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    batch = {"image": images(8)}
    sharded = {"image": jax.device_put(batch["image"], NamedSharding(mesh, P("data")))}
    compiled = carp.lower(key, sharded).compile()
    program = compiled.as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in program
    ours, whole = compiled(key, sharded), carp(key, batch)
    for name, view in ours.items():
        assert view.sharding.shard_shape(view.shape)[1] == 1
        # products and means may be summed in another order: about a hundred roundings of levels up to 1, over std
        np.testing.assert_allclose(view, whole[name], atol=100 * 2.0**-24 / min(STD))


def test_an_image_draws_the_same_numbers_in_any_batch(key: jax.Array) -> None:
    spec = replace(CARP_VIEWS(16)[0], count=2)
    sample = jax.jit(sample_parameters, static_argnums=(1, 2, 3, 4))
    few, many = (sample(key, spec, count, 20, 24) for count in (3, 5))
    for short, long in zip(jax.tree.leaves(few), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(short, long[:3])


def test_switching_an_operation_off_changes_no_other_draw(key: jax.Array) -> None:
    sample = jax.jit(sample_parameters, static_argnums=(1, 2, 3, 4))
    full = sample(key, replace(CARP_VIEWS(16)[0], solarise_probability=0.2), 4, 20, 24)
    bare = sample(key, replace(PLAIN, count=2, flip=0.5, grey_probability=0.2), 4, 20, 24)
    for rich, poor in zip(full, bare, strict=True):
        for field in ("box", "flip", "grey"):
            np.testing.assert_array_equal(getattr(rich, field), getattr(poor, field))
        assert (poor.jitter, poor.blur_sigma, poor.solarise) == (None, None, None)


def test_operations_of_probability_zero_are_not_in_the_graph(key: jax.Array) -> None:
    def graph(spec: ViewSpec) -> str:
        make = make_views(spec, None, mean=MEAN, std=STD)
        return str(jax.make_jaxpr(make)(key, {"image": images(2)}))

    bare = graph(PLAIN)
    assert bare.count("dot_general") == 2  # columns and rows, nothing else
    assert "optimization_barrier" not in bare
    jittered = graph(replace(PLAIN, jitter_probability=0.8))
    assert jittered.count("optimization_barrier") == 7  # three blends, hue, three blends
    assert graph(replace(PLAIN, jitter_probability=0.8, jitter=(0.4, 0.4, 0.2, 0.0))).count("optimization_barrier") == 3
    assert graph(replace(PLAIN, jitter_probability=0.8, jitter=(0, 0, 0, 0))).count("optimization_barrier") == 0
    assert graph(replace(PLAIN, blur_probability=0.5)).count("dot_general") == 6  # E E E, columns, rows
    sizes = [len(graph(replace(PLAIN, **{name: 0.5}))) for name in ("flip", "grey_probability", "solarise_probability")]
    assert min(sizes) > len(bare)


# ------------------------------------------------------------------------------------------------------ statistics
COUNT = 6000


@pytest.fixture(scope="module")
def draws() -> tuple[ViewParameters, ...]:
    spec = CARP_VIEWS()[0]
    return jax.jit(lambda key: sample_parameters(key, spec, COUNT, 256, 256))(jax.random.key(5))


def assert_frequency(chosen: jax.Array | np.ndarray, probability: float) -> None:
    """Within five binomial standard deviations."""
    spread = math.sqrt(probability * (1 - probability) / np.size(chosen))
    assert abs(np.mean(np.asarray(chosen)) - probability) <= 5 * spread


def assert_uniform(values: jax.Array | np.ndarray, low: float, high: float) -> None:
    """Kolmogorov-Smirnov at p = 0.001."""
    unit = (np.asarray(values, np.float64) - low) / (high - low)
    assert stats.kstest(unit, "uniform").statistic < 1.95 / math.sqrt(unit.size)


def test_probabilities_of_each_view(draws: tuple[ViewParameters, ...]) -> None:
    for view, blur in zip(draws, (1.0, 0.1), strict=True):
        assert view.jitter is not None
        assert_frequency(view.flip, 0.5)
        assert_frequency(view.grey, 0.2)
        assert_frequency(np.asarray(view.jitter.brightness) != 1.0, 0.8)
        assert_frequency(np.asarray(view.blur_sigma) > 0, blur)
    assert draws[0].solarise is None
    assert_frequency(draws[1].solarise, 0.2)


def test_strengths_are_uniform_in_their_ranges(draws: tuple[ViewParameters, ...]) -> None:
    view = draws[0]
    assert view.jitter is not None
    jittered = np.asarray(view.jitter.brightness) != 1.0
    assert_uniform(np.asarray(view.jitter.brightness)[jittered], 0.6, 1.4)
    assert_uniform(np.asarray(view.jitter.contrast)[jittered], 0.6, 1.4)
    assert_uniform(np.asarray(view.jitter.saturation)[jittered], 0.8, 1.2)
    assert_uniform(np.asarray(view.jitter.hue)[jittered], -0.1, 0.1)
    assert_uniform(view.blur_sigma, 0.1, 2.0)
    # an image that is not jittered is jittered by nothing at all
    for field, neutral in (("contrast", 1.0), ("saturation", 1.0), ("hue", 0.0)):
        assert np.all(np.asarray(getattr(view.jitter, field))[~jittered] == neutral)


def test_order_is_uniform_over_the_24_and_views_are_independent(draws: tuple[ViewParameters, ...]) -> None:
    assert draws[0].jitter is not None
    order = np.asarray(draws[0].jitter.order)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(4), (COUNT, 1)))
    _, counts = np.unique(order @ [64, 16, 4, 1], return_counts=True)
    assert counts.size == 24
    assert stats.chisquare(counts).pvalue > 0.001
    series = np.stack(
        [np.asarray(value, np.float64) for view in draws for value in (view.flip, view.grey, view.box[:, 0])]
        + [np.asarray(draws[1].solarise, np.float64), np.asarray(draws[0].blur_sigma, np.float64)]
    )
    correlation = np.corrcoef(series) - np.eye(len(series))
    assert np.abs(correlation).max() < 5 / math.sqrt(COUNT)


def test_boxes_lie_in_the_image(draws: tuple[ViewParameters, ...]) -> None:
    top, left, height, width = np.asarray(draws[0].box).T
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= 256
    assert (left + width).max() <= 256


# ------------------------------------------------------------------------------------------------- the whole chain
def pillow_chain(image: np.ndarray, box: list[int], flip: bool, order: list[int], factors: list[float], sigma: float):
    """Crop, mirror, jitter, blur, solarise by Pillow, and the bound on its distance from real arithmetic, in levels.

    Each rounding adds to the error; an operation multiplies the error so far by at most its Lipschitz constant."""
    top, left, height, width = box
    bicubic = Image.Resampling.BICUBIC
    picture = Image.fromarray(image).crop((left, top, left + width, top + height))
    picture = picture.resize((24, height), bicubic).resize((24, 24), bicubic)
    error = 0.5 * 1.3 + 0.5  # 1.3: largest sum of |weights| of a bicubic row
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for op in order:
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[op]
        picture = enhance(picture).enhance(factors[op])
        grey_error = 0.0 if op == colour.BRIGHTNESS else abs(1 - factors[op]) * (error + 0.5)
        error = factors[op] * error + grey_error + 1.0
    picture = ImageOps.solarize(picture.filter(ImageFilter.GaussianBlur(sigma)))
    return np.asarray(picture, np.float64), error + 6 * 0.5


def test_whole_chain_is_pillows_up_to_its_roundings() -> None:
    """Hue aside (Pillow's is quantised to 1/255 of a turn; tested alone), every operation, in the recipe's order."""
    picture = np.asarray(Image.fromarray(images(1)[0]).resize((48, 40), Image.Resampling.BICUBIC))
    boxes = [[0, 0, 40, 48], [5, 9, 31, 27], [20, 2, 14, 18]]
    orders, flips, sigmas = [[0, 1, 2], [2, 0, 1], [1, 2, 0]], [True, False, True], [0.3, 1.2, 2.0]
    factors = np.array([[1.3, 0.7, 1.2], [0.7, 1.4, 0.8], [1.1, 1.2, 0.9]], np.float32)
    parameters = ViewParameters(
        box=jnp.asarray(boxes, jnp.int32),
        flip=jnp.asarray(flips),
        jitter=colour.JitterParameters(
            *jnp.asarray(factors.T), None, jnp.asarray([[*order, colour.HUE] for order in orders], jnp.int32)
        ),
        grey=jnp.asarray([False] * 3),
        blur_sigma=jnp.asarray(sigmas, jnp.float32),
        solarise=jnp.asarray([True] * 3),
    )
    spec = replace(PLAIN, size=24)
    apply = jax.jit(lambda parameters, images: apply_parameters(parameters, images, spec, **RAW))
    ours = np.asarray(apply(parameters, jnp.asarray(np.repeat(picture[None], 3, 0))), np.float64) * 255
    for number in range(3):
        expected, bound = pillow_chain(
            picture, boxes[number], flips[number], orders[number], factors[number].tolist(), sigmas[number]
        )
        error = np.abs(ours[number] - expected)
        assert error.max() <= bound
        assert error.mean() < 2.0


def test_normalisation_is_per_channel(key: jax.Array) -> None:
    batch = {"image": images(2, 12, 12)}
    raw = jax.jit(make_views(PLAIN, None, **RAW))(key, batch)["global"]
    normalised = jax.jit(make_views(PLAIN, None, mean=MEAN, std=STD))(key, batch)["global"]
    np.testing.assert_allclose(normalised, (np.asarray(raw, np.float64) - MEAN) / STD, atol=2e-6)


# ---------------------------------------------------------------------------------------------------- plain_view
def test_plain_view_of_the_same_size_is_the_image() -> None:
    batch = {"image": images(3, 12, 12)}
    view = plain_view(batch, 12, **RAW)["global"]
    assert view.shape == (1, 3, 12, 12, 3)
    np.testing.assert_array_equal(np.round(np.asarray(view[0]) * 255), batch["image"])
    normalised = plain_view(batch, 12, MEAN, STD, dtype=jnp.bfloat16)["global"]
    assert normalised.dtype == jnp.bfloat16


def test_plain_view_is_the_central_square_resized_as_pillow() -> None:
    batch = {"image": images(2, 20, 27)}
    view = np.asarray(plain_view(batch, 12, **RAW)["global"][0]) * 255
    for ours, image in zip(view, batch["image"], strict=True):
        square = Image.fromarray(image).crop((3, 0, 23, 20))
        expected = square.resize((12, 20), Image.Resampling.BICUBIC).resize((12, 12), Image.Resampling.BICUBIC)
        assert np.abs(ours - np.asarray(expected)).max() <= 0.5 * 1.3 + 0.51
    cropped = np.asarray(plain_view(batch, 10, **RAW, crop_fraction=0.5)["global"][0]) * 255
    np.testing.assert_array_equal(np.round(cropped), batch["image"][:, 5:15, 8:18])


# ------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": -3}, "size must be at least 1, got -3"),
        ({"count": 0}, "count must be at least 1"),
        ({"scale": (0.0, 1.0)}, r"scale must be \(low, high\).*above 0 to 1, got \(0.0, 1.0\)"),
        ({"scale": (0.5, 0.2)}, "scale must be"),
        ({"scale": (0.5, 1.2)}, "scale must be"),
        ({"ratio": (-1.0, 1.0)}, "ratio must be"),
        ({"blur_sigma": (2.0, 0.1)}, "blur_sigma must be"),
        ({"flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"),
        ({"blur_probability": (1.0, 0.1)}, "blur_probability must be one number or 1 .*got 2"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "hue at most 0.5"),
        ({"jitter": (0.4, 0.4, 0.2)}, "jitter is"),
        ({"interpolation": "lanczos"}, "interpolation must be one of.*'lanczos'"),
    ],
)
def test_bad_specs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)


def test_bad_batches_are_refused(key: jax.Array) -> None:
    views = make_views(PLAIN, None, mean=MEAN, std=STD)
    for call in (lambda batch: views(key, batch), lambda batch: plain_view(batch, 12, MEAN, STD)):
        with pytest.raises(TypeError, match=r"must be uint8 levels 0\.\.255, got float32"):
            call({"image": images(2).astype(np.float32)})
        with pytest.raises(ValueError, match=r"must be \[B, height, width, 3\], got shape \(20, 24, 3\)"):
            call({"image": images(2)[0]})
        with pytest.raises(ValueError, match=r"got shape \(2, 20, 24, 1\)"):
            call({"image": images(2)[..., :1]})
        with pytest.raises(ValueError, match=r"need batch\['image'\], got keys \['label'\]"):
            call({"label": images(2)})


def test_bad_moments_and_plain_views_are_refused() -> None:
    with pytest.raises(ValueError, match="std positive"):
        make_views(PLAIN, None, mean=MEAN, std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="three numbers a piece"):
        plain_view({"image": images(2)}, 12, (0.5,), STD)
    with pytest.raises(ValueError, match=r"size >= 1 and 0 < crop_fraction <= 1, got 0 and 1\.0"):
        plain_view({"image": images(2)}, 0, MEAN, STD)
    with pytest.raises(ValueError, match=r"got 12 and 1\.5"):
        plain_view({"image": images(2)}, 12, MEAN, STD, crop_fraction=1.5)


def test_image_smaller_than_the_view_is_enlarged(key: jax.Array) -> None:
    view = jax.jit(make_views(replace(PLAIN, size=16), None, **RAW))(key, {"image": images(2, 5, 7)})["global"]
    assert view.shape == (1, 2, 16, 16, 3)
    assert np.all(np.isfinite(view))
    assert geometry.fallback_crop(5, 70, (3 / 4, 4 / 3)) == (5, 7)
