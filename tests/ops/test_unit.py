"""Unit rows: length one, safe at zero, exact gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.ops.unit import center, masked_mean, unit
from tests.ops.cases import close, weights


def test_value_and_gradient(x64):
    rows = weights(0, 4, 5)
    direction = weights(1, 4, 5)
    plain = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    close(unit(rows), plain(rows))
    close(unit(rows.T, axis=0), plain(rows).T)
    gradient = lambda f: jax.grad(lambda x: jnp.sum(direction * f(x)))(rows)  # noqa: E731
    close(gradient(unit), gradient(plain))


def test_zero_tiny_and_huge_rows():
    rows = jnp.asarray([[0.0, 0.0], [3e-30, 4e-30], [3e30, 4e30]], jnp.float32)
    np.testing.assert_allclose(unit(rows), [[0.0, 0.0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(unit(x)))(rows)
    assert not jnp.any(gradient[0])
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_dtype_is_kept_and_integers_are_refused():
    assert unit(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="unit expects floating-point rows, got int32"):
        unit(jnp.ones((2, 3), jnp.int32))


def test_masked_mean_and_center():
    rows = jnp.asarray([[1.0, 2.0], [jnp.nan, 0.0], [3.0, 6.0]], jnp.float32)
    total, number = masked_mean(rows, jnp.asarray([True, False, True]))
    np.testing.assert_array_equal(total / number, [2.0, 4.0])
    np.testing.assert_array_equal(center(rows, total / number)[0], [-1.0, -2.0])
    with pytest.raises(ValueError, match="mean must have shape"):
        center(rows, jnp.zeros((3,), jnp.float32))
