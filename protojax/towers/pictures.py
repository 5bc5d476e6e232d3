"""preprocessor_config.json: from a picture to what an image tower reads, with Pillow, as `transformers` does it.

Two halves, so that images travel as uint8: `fit` on the host (colour, resize, centre crop), `normalise` on the device
(rescale, mean, standard deviation).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from PIL import Image

from protojax.api import Array
from protojax.data.decode import to_colour
from protojax.towers.weights import read_json

NAME, NESTED = "preprocessor_config.json", "processor_config.json"
_RESAMPLES = {int(kind): kind for kind in Image.Resampling}
# What transformers' processors do when the file does not say.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip": {
        "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip": {
        "size": {"height": 224, "width": 224}, "crop_size": None, "do_center_crop": False,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    },
}  # fmt: skip
_COMMON = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
    "resample": int(Image.Resampling.BICUBIC),
}  # fmt: skip


class Preprocessing(NamedTuple):
    """short: the short side becomes this many pixels, the other keeps the aspect; or size (height, width); or neither.
    crop: (height, width) of the centre, black where the image is smaller. pixel -> (pixel * factor - mean) / std."""

    short: int | None
    size: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def digest(self) -> str:
        """8 hexadecimal digits: equal for preprocessings that are equal."""
        return hashlib.blake2b(repr(tuple(self)).encode(), digest_size=4).hexdigest()

    def fit(self, image: Image.Image) -> np.ndarray:
        """uint8 [S,S,3]: RGB (transparent parts white), resized and cropped."""
        image = to_colour(_on_white(image))
        size = self.size
        if self.short is not None:
            scaled = int(self.short * max(image.size) / min(image.size))
            size = (scaled, self.short) if image.width <= image.height else (self.short, scaled)
        if size is not None:
            image = image.resize((size[1], size[0]), Image.Resampling(self.resample))
        pixels = np.asarray(image)
        return pixels if self.crop is None else _centre(pixels, *self.crop)

    def normalise(self, pixels: Array) -> Array:
        """uint8 [N,S,S,3] -> float32 for the tower."""
        mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (self.mean, self.std))
        return (pixels.astype(jnp.float32) * self.factor - mean) / std


def open_preprocessing(folder: Path, kind: str, image_size: int) -> Preprocessing:
    """The preprocessing of a folder of weights ('clip' or 'siglip') whose tower reads squares of image_size pixels.

    Raises ValueError when both files are missing, for values that make no sense, and for images of another size.
    """
    found: Any = read_json(folder, NESTED, optional=True).get("image_processor")
    if not isinstance(found, dict):
        found = read_json(folder, NAME)
    given = {**_COMMON, **_DEFAULTS[kind], **{k: v for k, v in found.items() if v is not None}}
    short, size, crop = None, None, None
    if given["do_resize"]:
        short, size = _sides(given["size"], "size")
    if given["do_center_crop"]:
        side, crop = _sides(given["crop_size"], "crop_size")
        crop = (side, side) if side is not None else crop
    if given["resample"] not in _RESAMPLES:
        raise ValueError(f"{NAME}: resample {given['resample']!r} is none of Pillow's: {sorted(_RESAMPLES)}")
    result = crop or size
    if result != (image_size, image_size):
        made = "images of their own size" if result is None else f"images of {result[0]} x {result[1]} pixels"
        raise ValueError(
            f"{folder / NAME} makes {made}, the tower of config.json reads {image_size} x {image_size}: take both "
            "files from the same model"
        )
    return Preprocessing(
        short, size, int(given["resample"]), crop,
        float(given["rescale_factor"]) if given["do_rescale"] else 1.0,
        _channels(given["image_mean"] if given["do_normalize"] else 0.0, "image_mean"),
        _channels(given["image_std"] if given["do_normalize"] else 1.0, "image_std"),
    )  # fmt: skip


def _sides(value: Any, name: str) -> tuple[int | None, tuple[int, int] | None]:
    """(short side, None) or (None, (height, width)) of a number, {'shortest_edge'} or {'height', 'width'}."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"shortest_edge": value}
    if isinstance(value, dict):
        numbers = [value.get(key) for key in ("shortest_edge", "height", "width")]
        good = [isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers]
        if good == [True, False, False] and value.get("longest_edge") is None:
            return numbers[0], None
        if good == [False, True, True]:
            return None, (int(value["height"]), int(value["width"]))
    raise ValueError(
        f"{NAME}: {name} must be pixels, {{'shortest_edge': pixels}} or {{'height', 'width'}}, got {value!r}"
    )


def _channels(value: Any, name: str) -> tuple[float, ...]:
    values = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise ValueError(f"{NAME}: {name} must be a number or three of them, got {value!r}")
    if name.endswith("std") and not all(v > 0 for v in values):
        raise ValueError(f"{NAME}: {name} must be positive, got {value!r}")
    return tuple(float(v) for v in values)


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre height x width; where the image is smaller it stands in the middle of black."""
    rows, columns = pixels.shape[:2]
    top, left = (rows - height) // 2, (columns - width) // 2
    if top >= 0 and left >= 0:
        return np.ascontiguousarray(pixels[top : top + height, left : left + width])
    above, beside = max(-top, 0), max(-left, 0)
    below, right = max(height - rows - above, 0), max(width - columns - beside, 0)
    padded = np.pad(pixels, ((above, below), (beside, right), (0, 0)))
    return np.ascontiguousarray(padded[max(top, 0) :, max(left, 0) :][:height, :width])
