"""From image files to fixed-size uint8 arrays: decoding, fitting to the canvas, and what happens to damaged ones."""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from protojax.data.records import Content

OnCorrupt = Literal["skip", "error"]
CACHE_LIMIT_BYTES = 4 * 1024**3  # decoded images are kept in memory up to this size of a split
_log = logging.getLogger(__name__)


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Scales `image` (bicubic, antialiased) to just cover height x width and cuts out the centre: uint8 [H,W,3].

    With a square canvas: the short side becomes `height`, then a centre crop. An image of the right size is unchanged.
    """
    if image.mode.startswith("I;16"):  # Pillow clips 16-bit grey at 255 instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        covering = (max(round(image.width * scale), width), max(round(image.height * scale), height))
        image = image.resize(covering, Image.Resampling.BICUBIC)
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image)


def decode(file: str | Path | bytes, height: int, width: int) -> np.ndarray:
    """Opens an image file (path or contents) and fits it to the canvas: uint8 [H,W,3]. Raises whatever Pillow raises.

    Large JPEGs are decoded at a reduced scale, still at least twice the canvas, which costs a fraction of the time.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        scale = max(width / image.width, height / image.height)
        image.draft("RGB", (int(2 * scale * image.width), int(2 * scale * image.height)))
        return fit(image, height, width)


class ImageReader:
    """`Records.read` over images that are decoded when they are needed.

    load(row) -> uint8 [H,W,3] or an exception; describe(row) -> the example's name for messages. on_corrupt: 'skip'
    reports an image that cannot be decoded as bad (and names it in `problems`, once), 'error' raises ValueError. Images
    are decoded by a pool of threads and kept when `cache` is set and the whole split fits CACHE_LIMIT_BYTES.
    """

    def __init__(
        self,
        load: Callable[[int], np.ndarray],
        describe: Callable[[int], str],
        size: int,
        canvas: tuple[int, int],
        *,
        on_corrupt: OnCorrupt = "skip",
        cache: bool = False,
        workers: int | None = None,
    ) -> None:
        if on_corrupt not in ("skip", "error"):
            raise ValueError(f"on_corrupt must be 'skip' or 'error', got {on_corrupt!r}")
        self._load, self._describe, self._on_corrupt, self._canvas = load, describe, on_corrupt, canvas
        self._bad: dict[int, str] = {}
        self._lock = threading.Lock()
        self._workers = workers or min(8, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None
        fits = cache and size * canvas[0] * canvas[1] * 3 <= CACHE_LIMIT_BYTES
        self._ready = np.zeros(size, bool) if fits else None
        self._store = np.empty((size, *canvas, 3), np.uint8) if fits else None

    def problems(self) -> list[str]:
        """'name: why' of every image that could not be decoded so far, in split order."""
        with self._lock:
            return [self._bad[row] for row in sorted(self._bad)]

    def __call__(self, rows: np.ndarray) -> tuple[Content, np.ndarray]:
        if self._store is None or self._ready is None:
            images = np.zeros((len(rows), *self._canvas, 3), np.uint8)
            good = self._decode_into(images, np.arange(len(rows)), rows)
        else:
            missing = np.unique(rows[~self._ready[rows]])
            decoded = self._decode_into(self._store, missing, missing)
            self._ready[missing[decoded]] = True  # after the pixels: another thread must not see it too early
            images, good = self._store[rows], self._ready[rows]
        return {"image": images}, good

    def _decode_into(self, images: np.ndarray, places: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """images[places[i]] = image rows[i]; which ones succeeded, bool [len(rows)]."""

        def one(place_and_row: tuple[int, int]) -> bool:
            place, row = place_and_row
            if row in self._bad:
                return False
            try:
                images[place] = self._load(row)
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


def first_size(contents: Callable[[int], bytes], size: int, name: str) -> tuple[int, int]:
    """(height, width) of the first image whose header can be read. Raises ValueError when there is none."""
    for row in range(size):
        try:
            with Image.open(io.BytesIO(contents(row))) as image:
                return image.height, image.width
        except Exception:  # damaged; reported with its name when it is read
            continue
    raise ValueError(f"{name}: none of its {size} images can be decoded")
