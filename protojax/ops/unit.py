"""Unit rows and centring."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def unit(x: Array, axis: int = -1) -> Array:
    """x / ||x|| along `axis`; a zero row stays zero and has zero gradient (never NaN), dtype kept.

    Rows are scaled by their largest entry first, so that squares neither overflow nor underflow; the norm is float32 at
    least."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"unit expects floating-point rows, got {x.dtype}; convert them first")
    wide = x.astype(_wide(x.dtype))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=axis, keepdims=True))
    empty = largest == 0.0
    # The scale cancels in x / ||x||, so that stopping its gradient is exact.
    scaled = wide / jnp.where(empty, jnp.ones_like(largest), largest)
    square = jnp.sum(scaled * scaled, axis=axis, keepdims=True)
    inverse = jnp.where(empty, jnp.zeros_like(square), jax.lax.rsqrt(jnp.where(empty, jnp.ones_like(square), square)))
    return (scaled * inverse).astype(x.dtype)


def center(x: Array, mean: Array) -> Array:
    """Rows of x [..., D] minus `mean` [D]."""
    if mean.shape != x.shape[-1:]:
        raise ValueError(f"mean must have shape {x.shape[-1:]}, one value a column of x, got {mean.shape}")
    return x - mean.reshape((1,) * (x.ndim - 1) + mean.shape).astype(x.dtype)


def masked_mean(x: Array, mask: Array) -> tuple[Array, Array]:
    """(sum of the rows of x [N,D] where mask [N], their number): additive parts of a mean; masked rows may hold NaN."""
    weight = mask.astype(_wide(x.dtype))
    kept = jnp.where(weight[:, None] != 0.0, x, jnp.zeros((), x.dtype)).astype(weight.dtype)
    return jnp.sum(kept * weight[:, None], axis=0), jnp.sum(weight)
