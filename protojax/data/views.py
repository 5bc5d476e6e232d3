"""Random views of images, made on the device: multi-crop with the CARP and DINO augmentations.

`make_views(global_spec, local_spec, ...)` gives the recipe's `views(key, batch)`. Parameters are drawn first
(`sample_parameters`), then applied by a pure function (`apply_parameters`): crop, flip and resize (one weight matrix
per axis), colour jitter in random order, grey, blur (one matrix per axis), solarise, normalise. An operation whose
probability or strength is zero is not in the compiled graph.

Sources: torchvision RandomResizedCrop and ColorJitter on Pillow images; Silva and Ramirez Rivera, "Representation
Learning via Consistent Assignment of Views over Random Partitions" (NeurIPS 2023); Caron et al., "Emerging Properties
in Self-Supervised Vision Transformers" (ICCV 2021). We differ in one thing: levels stay real numbers between
operations, where Pillow rounds to bytes after each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from protojax.api import Array, Batch, Key
from protojax.data import views_colour as colour
from protojax.data import views_geometry as geometry

Views = dict[str, Array]


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view ('global' or 'local').

    size: output side S, pixels. count: views V of this kind. scale: range of the crop's area as a fraction of the
    image; ratio: range of its width / height. flip: probability of mirroring. jitter: strengths (brightness, contrast,
    saturation, hue) as in ColorJitter: factors from U(max(0, 1 - x), 1 + x), hue from U(-h, h) turns; all four in
    random order. solarise_threshold: level 0..255 from which pixels are inverted. blur_sigma: range of the standard
    deviation in pixels *of the view*; the published range is for 224 px, so a caller with small views scales it
    (0.1 to 2 S / 224 keeps the relative strength). interpolation: 'bicubic' or 'bilinear', antialiased.
    The four probabilities are a number for all views or a tuple of V numbers, one a view.

    Errors: ValueError for a size or count below 1, a range out of order or out of bounds, a probability outside
    [0, 1] or a tuple that has not V entries, an unknown interpolation.
    """

    size: int
    count: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float | tuple[float, ...] = 0.8
    grey_probability: float | tuple[float, ...] = 0.2
    blur_probability: float | tuple[float, ...] = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise_probability: float | tuple[float, ...] = 0.0
    solarise_threshold: float = 128
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("size", "count"):
            if getattr(self, name) < 1:
                raise ValueError(f"a view's {name} must be at least 1, got {getattr(self, name)}")
        _check_range("scale", self.scale, 0.0, 1.0, positive=True)
        _check_range("ratio", self.ratio, 0.0, float("inf"), positive=True)
        _check_range("blur_sigma", self.blur_sigma, 0.0, float("inf"))
        if len(self.jitter) != 4 or min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(
                "jitter is (brightness, contrast, saturation, hue), none negative and hue at most 0.5 (half a turn), "
                f"got {self.jitter}"
            )
        for name in ("flip", "jitter_probability", "grey_probability", "blur_probability", "solarise_probability"):
            self.probabilities(name)
        if self.interpolation not in geometry.FILTER_SUPPORT:
            raise ValueError(f"interpolation must be one of {sorted(geometry.FILTER_SUPPORT)}: {self.interpolation!r}")

    def probabilities(self, name: str) -> tuple[float, ...]:
        """The probability field `name` as one number a view."""
        value = getattr(self, name)
        values = tuple(value) if isinstance(value, Sequence) else (value,) * self.count
        if len(values) != self.count:
            raise ValueError(f"{name} must be one number or {self.count} (one a view), got {len(values)}: {value}")
        if not all(0.0 <= probability <= 1.0 for probability in values):
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
        return values


def _check_range(name: str, pair: tuple[float, float], low: float, high: float, positive: bool = False) -> None:
    ordered = len(pair) == 2 and low <= pair[0] <= pair[1] <= high
    if not ordered or (positive and pair[0] <= 0):
        bounds = f"{'above' if positive else 'from'} {low:g} to {high:g}"
        raise ValueError(f"{name} must be (low, high) with low <= high, {bounds}, got {pair}")


class ViewParameters(NamedTuple):
    """What happens to each image in one view; all that is random. A field that is None: not computed.

    box: `[B,4]` (top, left, height, width) in pixels, int32, or float32 on a scaled canvas. flip, grey, solarise: bool
    `[B]`. jitter: see `JitterParameters`; factors 1 and hue 0 where not jittered. blur_sigma: float32 `[B]`, pixels
    of the view, 0 where not blurred.
    """

    box: Array
    flip: Array | None
    jitter: colour.JitterParameters | None
    grey: Array | None
    blur_sigma: Array | None
    solarise: Array | None


# Every random number has a fixed column, so that switching an operation off changes no other draw.
_BOX = slice(0, 2 * geometry.TRIES + 2)
_FLIP, _JITTER, _GREY, _BLUR, _SIGMA, _SOLARISE = range(_BOX.stop, _BOX.stop + 6)
_FACTORS = slice(_SOLARISE + 1, _SOLARISE + 5)
_ORDER = slice(_FACTORS.stop, _FACTORS.stop + 4)
_COLUMNS = _ORDER.stop


def sample_parameters(
    key: Key, spec: ViewSpec, batch_size: int, height: int, width: int, extent: Array | None = None
) -> tuple[ViewParameters, ...]:
    """Draws the parameters of `spec.count` views of `batch_size` images of height x width pixels, one tuple a view.

    extent: int32 `[B,2]` when the square canvas holds whole images of other aspects: crops are drawn on images of that
    (height, width), and their boxes become float32 boxes on the canvas.

    One uniform array [B, V, columns] holds all randomness: the numbers of image b depend on the key and b alone, not
    on the batch size nor (with the partitionable threefry, JAX's default) on how the batch is sharded.
    """
    draws = jax.random.uniform(key, (batch_size, spec.count, _COLUMNS), jnp.float32)
    if extent is None:
        box = geometry.boxes_from_uniforms(draws[..., _BOX], height, width, spec.scale, spec.ratio)
    else:
        tall, wide = (jnp.broadcast_to(extent[:, axis, None], draws.shape[:2]) for axis in range(2))
        drawn = geometry.boxes_from_uniforms(draws[..., _BOX], tall, wide, spec.scale, spec.ratio)
        box = geometry.on_canvas(drawn, extent[:, None, :], height)
    return tuple(_view_parameters(draws[:, view], box[:, view], spec, view) for view in range(spec.count))


def _view_parameters(draws: Array, box: Array, spec: ViewSpec, view: int) -> ViewParameters:
    def chosen(name: str, column: int) -> Array | None:
        probability = spec.probabilities(name)[view]
        return draws[:, column] < probability if probability > 0 else None

    blurred = chosen("blur_probability", _BLUR)
    sigma = None
    if blurred is not None:
        low, high = spec.blur_sigma
        sigma = jnp.where(blurred, draws[:, _SIGMA] * (high - low) + low, 0.0)
    return ViewParameters(
        box=box,
        flip=chosen("flip", _FLIP),
        jitter=_jitter_parameters(draws, spec, chosen("jitter_probability", _JITTER)),
        grey=chosen("grey_probability", _GREY),
        blur_sigma=sigma,
        solarise=chosen("solarise_probability", _SOLARISE),
    )


def _jitter_parameters(draws: Array, spec: ViewSpec, chosen: Array | None) -> colour.JitterParameters | None:
    if chosen is None or max(spec.jitter) == 0:
        return None
    uniforms = draws[:, _FACTORS]

    def draw(op: int, low: float, high: float, neutral: float) -> Array | None:
        if spec.jitter[op] == 0:
            return None
        return jnp.where(chosen, uniforms[:, op] * (high - low) + low, neutral)

    def factor(op: int) -> Array | None:
        return draw(op, max(0.0, 1.0 - spec.jitter[op]), 1.0 + spec.jitter[op], 1.0)

    return colour.JitterParameters(
        brightness=factor(colour.BRIGHTNESS),
        contrast=factor(colour.CONTRAST),
        saturation=factor(colour.SATURATION),
        hue=draw(colour.HUE, -spec.jitter[colour.HUE], spec.jitter[colour.HUE], 0.0),
        order=jnp.argsort(draws[:, _ORDER], axis=-1).astype(jnp.int32),
    )


def apply_parameters(
    parameters: ViewParameters,
    images: Array,
    spec: ViewSpec,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
    matmul_dtype: DTypeLike = jnp.float32,
) -> Array:
    """One view `[B,S,S,3]` in `dtype` of uint8 `images [B,H0,W0,3]`: (level / 255 - mean) / std per channel.

    Colour maths are float32 throughout. matmul_dtype: of the operands of the crop and blur products (accumulated in
    float32); bfloat16 costs about one level of 255 and is several times faster on matrix units."""
    # rows, channels, columns: see views_geometry. The same expression for every view, so it is computed once.
    levels = jnp.swapaxes(images, 2, 3).astype(jnp.float32)
    view = geometry.crop_resize(
        levels, parameters.box, parameters.flip, spec.size, spec.interpolation, jnp.dtype(matmul_dtype)
    )
    view = view / 255.0
    if parameters.jitter is not None:
        view = colour.jitter(view, parameters.jitter)
    if parameters.grey is not None:
        view = colour.grey_where(view, parameters.grey)
    if parameters.blur_sigma is not None:
        view = geometry.blur(view, parameters.blur_sigma, jnp.dtype(matmul_dtype))
    if parameters.solarise is not None:
        view = colour.solarise(view, parameters.solarise, spec.solarise_threshold)
    return _normalise(jnp.swapaxes(view, 2, 3), mean, std, dtype)


def _normalise(levels: Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike) -> Array:
    """`[...,3]` in [0, 1] -> (levels - mean) / std in `dtype`."""
    shape = (1,) * (levels.ndim - 1) + (3,)
    centre = jnp.asarray(mean, jnp.float32).reshape(shape)
    scale = jnp.asarray([1.0 / value for value in std], jnp.float32).reshape(shape)
    return ((levels - centre) * scale).astype(dtype)


def make_views(
    global_spec: ViewSpec,
    local_spec: ViewSpec | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike = jnp.float32,
    matmul_dtype: DTypeLike = jnp.float32,
) -> Callable[[Key, Batch], Views]:
    """The recipe's `views(key, batch) -> {'global': [V_g,B,S,S,3], 'local': [V_l,B,s,s,3]}`, to be called inside jit.

    batch['image']: uint8 `[B,H0,W0,3]`; batch['extent'], where there is one: see `sample_parameters`. 'local' is
    absent when `local_spec` is None. mean, std: per channel, in units of the full
    range (ImageNet: (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)). dtype: of the views. matmul_dtype: see
    `apply_parameters`. Deterministic in the key.

    Errors: ValueError for mean or std that are not three numbers, or std not positive; for a batch without 'image' or
    of another rank; TypeError for images that are not uint8.
    """
    _check_moments(mean, std)
    specs = {"global": global_spec} if local_spec is None else {"global": global_spec, "local": local_spec}

    def views(key: Key, batch: Batch) -> Views:
        images = _checked_images(batch)
        batch_size, height, width, _ = images.shape
        made = {}
        for stream, (kind, spec) in enumerate(specs.items()):
            stream_key = jax.random.fold_in(key, stream)
            parameters = sample_parameters(stream_key, spec, batch_size, height, width, batch.get("extent"))

            def apply(view: ViewParameters, spec: ViewSpec = spec) -> Array:
                return apply_parameters(view, images, spec, mean=mean, std=std, dtype=dtype, matmul_dtype=matmul_dtype)

            made[kind] = _map_views(apply, parameters)
        return made

    return views


def _map_views(apply: Callable[[ViewParameters], Array], parameters: Sequence[ViewParameters]) -> Array:
    """`[V,B,S,S,3]`. Views with the same operations are one loop: compiled once, one view in memory at a time."""
    parts = []
    for _, alike in itertools.groupby(parameters, key=jax.tree.structure):
        group = list(alike)
        if len(group) == 1:
            parts.append(apply(group[0])[None])
        else:
            parts.append(jax.lax.map(apply, jax.tree.map(lambda *leaves: jnp.stack(leaves), *group)))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def teacher_views(inputs: Mapping[str, Array]) -> Views:
    """The part of the inputs that the teacher sees: the global views, and whole images ('plain') where there are such.
    Patches that are hidden from the student ('masked') are those that the teacher is asked about ('patches')."""
    asked = {"patches": inputs["masked"]} if "masked" in inputs else {}
    whole = {"plain": inputs["plain"]} if "plain" in inputs else {}
    return {"global": inputs["global"], **asked, **whole}


def plain_view(
    batch: Batch,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    crop_fraction: float = 1.0,
    interpolation: str = "bicubic",
    dtype: DTypeLike = jnp.float32,
) -> Views:
    """The evaluation view {'global': `[1,B,size,size,3]`}: the central square, resized and normalised, nothing random.

    The square's side is crop_fraction of the image's shorter side (224/256 is the usual 'resize to 256, crop 224');
    when it equals `size` the pixels are taken as they are. Errors: as `make_views`; ValueError for a size below 1 or a
    fraction outside (0, 1].
    """
    _check_moments(mean, std)
    if size < 1 or not 0.0 < crop_fraction <= 1.0:
        raise ValueError(f"expected size >= 1 and 0 < crop_fraction <= 1, got {size} and {crop_fraction}")
    images = _checked_images(batch)
    count, height, width, _ = images.shape
    if "extent" in batch:
        return {
            "global": _normalise(
                _central(images, batch["extent"], size, crop_fraction, interpolation), mean, std, dtype
            )[None]
        }
    side = max(1, round(min(height, width) * crop_fraction))
    top, left = (height - side) // 2, (width - side) // 2
    square = images[:, top : top + side, left : left + side]
    if side == size:
        levels = square.astype(jnp.float32)
    else:
        box = jnp.broadcast_to(jnp.asarray([[0, 0, side, side]], jnp.int32), (count, 4))
        planar = jnp.swapaxes(square, 2, 3).astype(jnp.float32)
        resized = geometry.crop_resize(planar, box, None, size, interpolation, jnp.dtype(jnp.float32))
        levels = jnp.swapaxes(resized, 2, 3)
    return {"global": _normalise(levels / 255.0, mean, std, dtype)[None]}


def _central(images: Array, extent: Array, size: int, crop_fraction: float, interpolation: str) -> Array:
    """`[B,size,size,3]` in [0, 1]: the central square of whole images on a canvas, by their extents `[B,2]`."""
    short = jnp.min(extent, axis=-1, keepdims=True).astype(jnp.float32) * crop_fraction
    start = (extent.astype(jnp.float32) - short) / 2.0
    box = geometry.on_canvas(
        jnp.concatenate([start, jnp.broadcast_to(short, start.shape)], -1), extent, images.shape[1]
    )
    planar = jnp.swapaxes(images, 2, 3).astype(jnp.float32)
    resized = geometry.crop_resize(planar, box, None, size, interpolation, jnp.dtype(jnp.float32))
    return jnp.swapaxes(resized, 2, 3) / 255.0


def _checked_images(batch: Mapping[str, Any]) -> Array:
    if "image" not in batch:
        raise ValueError(f"views need batch['image'], got keys {sorted(batch)}")
    images = batch["image"]
    if images.dtype != jnp.uint8:
        raise TypeError(f"batch['image'] must be uint8 levels 0..255, got {images.dtype}; do not normalise before")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"batch['image'] must be [B, height, width, 3], got shape {tuple(images.shape)}")
    return jnp.asarray(images)


def _check_moments(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must be three numbers a piece, std positive, got {mean} and {std}")


def CARP_VIEWS(  # the name of a published recipe
    global_size: int = 224,
    local_size: int = 96,
    local_count: int = 6,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    local_blur_sigma: tuple[float, float] | None = None,
) -> tuple[ViewSpec, ViewSpec | None]:
    """(global, local) views of CARP: 2 x 224 of area 0.2-1 and 6 x 96 of area 0.05-0.2; None when local_count = 0.

    Both: flip 0.5, jitter (0.4, 0.4, 0.2, 0.1) at 0.8, grey 0.2. Blur at 1.0 and 0.1 on the two global views, 0.5 on
    the local ones; solarise 0.2 on the second global view; bicubic. blur_sigma is in pixels of the view: the default
    is the published one for 224 and 96; local_blur_sigma defaults to it.
    """
    return _recipe((global_size, (0.2, 1.0)), (local_size, (0.05, 0.2)), local_count, blur_sigma, local_blur_sigma)


def DINO_VIEWS(  # the name of a published recipe
    global_size: int = 224,
    local_size: int = 96,
    local_count: int = 8,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    local_blur_sigma: tuple[float, float] | None = None,
) -> tuple[ViewSpec, ViewSpec | None]:
    """(global, local) views of DINO: 2 x 224 of area 0.4-1 and 8 x 96 of area 0.05-0.4; otherwise as `CARP_VIEWS`."""
    return _recipe((global_size, (0.4, 1.0)), (local_size, (0.05, 0.4)), local_count, blur_sigma, local_blur_sigma)


def _recipe(
    large: tuple[int, tuple[float, float]],
    small: tuple[int, tuple[float, float]],
    local_count: int,
    blur_sigma: tuple[float, float],
    local_blur_sigma: tuple[float, float] | None,
) -> tuple[ViewSpec, ViewSpec | None]:
    global_spec = ViewSpec(
        large[0], 2, large[1], blur_probability=(1.0, 0.1), solarise_probability=(0.0, 0.2), blur_sigma=blur_sigma
    )
    if local_count == 0:
        return global_spec, None
    local_sigma = blur_sigma if local_blur_sigma is None else local_blur_sigma
    return global_spec, ViewSpec(small[0], local_count, small[1], blur_probability=0.5, blur_sigma=local_sigma)
