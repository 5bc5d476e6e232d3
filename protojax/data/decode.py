"""From image files to fixed-size uint8 arrays: decoding, fitting to the canvas, and what happens to damaged ones."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from protojax.data.records import Content, image_shapes

OnCorrupt = Literal["skip", "error"]
Fit = Literal["crop", "whole"]
MAX_CORRUPT = 0.01  # of a split: more is not a few damaged files but a broken copy
CACHE_LIMIT_BYTES = 4 * 1024**3  # decoded images are kept in memory up to this size of a split
_log = logging.getLogger(__name__)


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scales `image` (bicubic, antialiased) to just cover height x width and cuts out the centre: uint8 [H,W,3].

    With a square canvas: the short side becomes `height`, then a centre crop. An image of the right size is unchanged.
    """
    image = to_colour(image)
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        covering = (max(round(image.width * scale), width), max(round(image.height * scale), height))
        image = image.resize(covering, Image.Resampling.BICUBIC)
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image)


def to_colour(image: Image.Image) -> Image.Image:
    """RGB; 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I;16"):  # Pillow clips 16-bit grey at 255 instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def whole(image: Image.Image, canvas: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The whole image, each axis scaled to `canvas` pixels (bicubic, antialiased): (uint8 [canvas,canvas,3], extent).

    extent: (height, width) that the image would have with a short side of `canvas` pixels and its own aspect. Views
    draw their crops in that geometry and undo the distortion in the same resampling (`views_geometry.crop_resize`), so
    that nothing is cut off before the random crop.
    """
    image = to_colour(image)
    scale = canvas / min(image.size)
    extent = (max(round(image.height * scale), canvas), max(round(image.width * scale), canvas))
    if image.size != (canvas, canvas):
        image = image.resize((canvas, canvas), Image.Resampling.BICUBIC)
    return np.asarray(image), extent


def decode(
    file: str | Path | bytes, height: int, width: int, how: Fit = "crop"
) -> np.ndarray | tuple[np.ndarray, tuple[int, int]]:
    """Opens an image file (path or contents) and fits it to the canvas: uint8 [H,W,3]; with 'whole' also its extent.

    Large JPEGs are decoded at a reduced scale, still at least twice the canvas, which costs a fraction of the time.
    Raises whatever Pillow raises.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        scale = max(width / image.width, height / image.height)
        image.draft("RGB", (int(2 * scale * image.width), int(2 * scale * image.height)))
        return fit(image, height, width) if how == "crop" else whole(image, height)


def content_shapes(height: int, width: int, how: Fit) -> dict[str, jax.ShapeDtypeStruct]:
    """Per-example shapes of an image that was fitted so: 'whole' adds `extent` int32 [2]. ValueError for another."""
    if how not in ("crop", "whole"):
        raise ValueError(f"fit must be 'crop' (short side, centre square) or 'whole' (no part is lost), got {how!r}")
    extent = {"extent": jax.ShapeDtypeStruct((2,), np.int32)} if how == "whole" else {}
    return {**image_shapes(height, width), **extent}


def prepared(file: str | Path, prepare: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """An image file, opened and handed to `prepare`. Raises whatever Pillow raises."""
    with Image.open(file) as image:
        return prepare(image)


class TooManyCorrupt(ValueError):
    """So many images cannot be decoded that leaving them out would change the data set."""


class ImageReader:
    """`Records.read` over images that are decoded when they are needed.

    load(row) -> uint8 [H,W,3], or (that, extent) where how = 'whole', or an exception; describe(row) -> the example's
    name for messages. on_corrupt: 'skip' reports an image that cannot be decoded as bad (and names it in `problems`,
    once), 'error' raises ValueError; so does more than MAX_CORRUPT of the split (and more than ten images) in any case.
    Images are decoded by a pool of threads and kept when `cache` is set and the whole split fits CACHE_LIMIT_BYTES. It
    can be pickled (for worker processes), without what it has kept.
    """

    def __init__(
        self,
        load: Callable[[int], np.ndarray | tuple[np.ndarray, tuple[int, int]]],
        describe: Callable[[int], str],
        size: int,
        canvas: tuple[int, int],
        *,
        on_corrupt: OnCorrupt = "skip",
        cache: bool = False,
        workers: int | None = None,
        how: Fit = "crop",
    ) -> None:
        if on_corrupt not in ("skip", "error"):
            raise ValueError(f"on_corrupt must be 'skip' or 'error', got {on_corrupt!r}")
        self._load, self._describe, self._on_corrupt, self._canvas = load, describe, on_corrupt, canvas
        self._size, self._cache = size, cache
        self._kept = content_shapes(*canvas, how)
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()
        self._workers = workers or min(8, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None
        self._reserve()

    def _reserve(self) -> None:
        fits = self._cache and self._size * self._canvas[0] * self._canvas[1] * 3 <= CACHE_LIMIT_BYTES
        self._ready = np.zeros(self._size, bool) if fits else None
        self._store = self._empty(self._size) if fits else None

    def _empty(self, count: int) -> Content:
        # zeros, not empty: pages that are never written cost no memory either way
        return {key: np.zeros((count, *shape.shape), shape.dtype) for key, shape in self._kept.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_pool", "_ready", "_store")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._pool = threading.Lock(), None
        self._reserve()

    def problems(self) -> list[str]:
        """'name: why' of every image that could not be decoded so far, in split order."""
        with self._lock:
            return [self._bad[row] for row in sorted(self._bad)]

    def __call__(self, rows: np.ndarray) -> tuple[Content, np.ndarray]:
        if self._store is None or self._ready is None:
            content = self._empty(len(rows))
            good = self._decode_into(content, np.arange(len(rows)), rows)
        else:
            missing = np.unique(rows[~self._ready[rows]])
            decoded = self._decode_into(self._store, missing, missing)
            self._ready[missing[decoded]] = True  # after the pixels: another thread must not see it too early
            content, good = {key: values[rows] for key, values in self._store.items()}, self._ready[rows]
        return content, good

    def _decode_into(self, content: Content, places: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """content[places[i]] = image rows[i]; which ones succeeded, bool [len(rows)]."""

        def one(place_and_row: tuple[int, int]) -> bool:
            place, row = place_and_row
            if row in self._bad:
                return False
            try:
                loaded = self._load(row)
                if isinstance(loaded, tuple):
                    content["image"][place], content["extent"][place] = loaded
                else:
                    content["image"][place] = loaded
            except Exception as error:  # Pillow raises many types for damaged files
                self._report(row, error)
                return False
            return True

        jobs = list(zip(places.tolist(), rows.tolist(), strict=True))
        if len(jobs) < 4 or self._workers == 1:
            results = [one(job) for job in jobs]
        else:
            with self._lock:
                self._pool = self._pool or ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
            results = list(self._pool.map(one, jobs, chunksize=max(1, len(jobs) // (4 * self._workers))))
        return np.array(results, dtype=bool)

    def _report(self, row: int, error: Exception) -> None:
        message = f"{self._describe(row)}: {type(error).__name__}: {error}"
        if self._on_corrupt == "error":
            raise ValueError(
                f"cannot decode {message}; repair or remove it, or set on_corrupt='skip' to leave such images out"
            ) from error
        with self._lock:
            if row not in self._bad:
                self._bad[row] = message
                _log.warning("left out an image that cannot be decoded (%d so far): %s", len(self._bad), message)
            count, bound = len(self._bad), max(10, int(MAX_CORRUPT * self._size))
        if bound < count < self._size:
            raise TooManyCorrupt(
                f"{count} of {self._size} images cannot be decoded, more than {MAX_CORRUPT:.0%}: this copy of the "
                f"data is broken; copy it again. The last one: {message}"
            ) from error


def first_size(contents: Callable[[int], bytes], size: int, name: str) -> tuple[int, int]:
    """(height, width) of the first image whose header can be read. Raises ValueError when there is none."""
    for row in range(size):
        try:
            with Image.open(io.BytesIO(contents(row))) as image:
                return image.height, image.width
        except Exception:  # damaged; reported with its name when it is read
            continue
    raise ValueError(f"{name}: none of its {size} images can be decoded")
