"""Random and peaked inputs of ragged sizes, in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

N, K, D = 37, 53, 5
TILES = {"tile": 16, "row_tile": 8}  # neither divides 53 or 37


def side(seed: int, peaked: bool, rows: int = N, count: int = K, width: int = D):
    """(queries, prototypes, bias): logits of order one, or of order hundreds, where a softmax is one-hot."""
    rng = np.random.default_rng(seed)
    scale = 60.0 if peaked else 1.0
    arrays = scale * rng.normal(size=(rows, width)), rng.normal(size=(count, width)), rng.normal(size=count)
    return tuple(jnp.asarray(a) for a in arrays)


def weights(seed: int, *shape: int):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def close(actual, expected, tolerance: float = 1e-12):
    """Equal up to rounding, relative to the size of the expected array."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)
