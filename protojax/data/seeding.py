"""Random orders that are the same on every machine and with every NumPy release."""

from __future__ import annotations

import numpy as np

# One number a use, so that two uses of one seed never share a stream.
EPOCH_ORDER, CLASS_ORDER, WITHIN_CLASS, HOLDOUT, SYNTHETIC = 1, 2, 3, 4, 5


def raw_stream(size: int, seed: int, *stream: int) -> np.ndarray:
    """`size` uniform 64-bit words, uint64 [size], determined by (seed, stream).

    PCG64 and SeedSequence are the parts of `numpy.random` whose output is promised never to change; the methods of
    `Generator` (permutation, normal, ...) are not, and a resumed run must see the order that it was started with.
    Raises ValueError for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"a data seed must be 0 or more, got {seed}")
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=stream))
    return np.asarray(bits.random_raw(size), dtype=np.uint64)


def permutation(size: int, seed: int, *stream: int) -> np.ndarray:
    """A uniformly random permutation of range(size), int64 [size]: the ranks of `size` random 64-bit words."""
    return np.argsort(raw_stream(size, seed, *stream), kind="stable").astype(np.int64)
