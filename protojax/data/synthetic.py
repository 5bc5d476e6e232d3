"""Small deterministic images with classes, for smoke tests: no file, no download, the same on every machine."""

from __future__ import annotations

import time

import numpy as np

from protojax.data import seeding
from protojax.data.records import Content, Records, from_arrays

SPLITS = ("train", "test")


def open_synthetic(
    split: str, *, size: int = 512, classes: int = 10, side: int = 32, seed: int = 0, delay: float = 0.0
) -> Records:
    """`size` images uint8 [side,side,3] of `classes` kinds of coloured stripes under a random phase and noise.

    A class is a direction and frequency of stripes and a pair of colours, drawn from (seed, class) alone, so that both
    splits show the same classes; phase and noise are drawn from (seed, split, image). Labels: 'fine' = i mod classes:
    sizes differ by at most one; 'coarse' = fine div 2 (neighbours share their colours). delay: seconds that every
    batch takes to read, as from a slow disk. Raises ValueError for an unknown split, fewer images than classes or a
    negative delay.
    """
    if split not in SPLITS:
        raise ValueError(f"synthetic has no split {split!r}; it has: {', '.join(SPLITS)}")
    if classes < 1 or size < classes or side < 1:
        raise ValueError(f"synthetic needs size >= classes >= 1 and side >= 1; got {size=}, {classes=}, {side=}")
    if delay < 0.0:
        raise ValueError(f"synthetic needs delay >= 0 seconds; got {delay}")
    fine = np.arange(size) % classes
    coarse = fine // 2
    stream = 1 + SPLITS.index(split)
    colours = _uniform(2 * 3 * (classes // 2 + 1), seed, 0, 0).reshape(-1, 2, 3)
    angle, frequency = _uniform(2 * classes, seed, 0, 1).reshape(2, classes)
    phase = _uniform(size, seed, stream, 0)[:, None, None]
    noise = _uniform(size * side * side, seed, stream, 1).reshape(size, side, side, 1)

    y, x = np.mgrid[:side, :side] / side
    angle, frequency = np.pi * angle[fine][:, None, None], (1.0 + 4.0 * frequency[fine])[:, None, None]
    along = np.cos(angle) * x[None] + np.sin(angle) * y[None]
    wave = 0.5 + 0.5 * np.sin(2.0 * np.pi * (frequency * along + phase))[..., None]
    first, second = colours[coarse, 0][:, None, None], colours[coarse, 1][:, None, None]
    images = 0.8 * (wave * first + (1.0 - wave) * second) + 0.2 * noise
    names = {
        "fine": tuple(f"stripes {c}" for c in range(classes)),
        "coarse": tuple(f"colours {c}" for c in range((classes + 1) // 2)),
    }
    records = from_arrays(
        f"synthetic/{split}", np.floor(255.999 * images).astype(np.uint8), {"fine": fine, "coarse": coarse}, names
    )
    return _slowed(records, delay) if delay else records


def _slowed(records: Records, delay: float) -> Records:
    """The same records behind a wait of `delay` seconds a read."""

    def read(rows: np.ndarray) -> tuple[Content, np.ndarray]:
        time.sleep(delay)
        return records.read(rows)

    return records._replace(read=read)


def _uniform(size: int, seed: int, *stream: int) -> np.ndarray:
    """float64 [size] in [0, 1), from the stream (seed, SYNTHETIC, ...)."""
    words = seeding.raw_stream(size, seed, seeding.SYNTHETIC, *stream)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
