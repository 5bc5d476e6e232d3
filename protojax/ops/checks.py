"""Argument checks shared by the prototype operations: raised from shapes and dtypes, so at trace time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array


def floating(name: str, value: Array, rank: int) -> Array:
    """`value` as an array of `rank` axes in bfloat16, float32 or float64; TypeError or ValueError otherwise."""
    array = jnp.asarray(value)
    if array.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(
            f"{name} must be bfloat16, float32 or float64, got {array.dtype}; "
            f"convert it first, for example with {name}.astype(jnp.float32)"
        )
    if array.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes, got shape {array.shape}")
    return array


def accumulation_dtype(*arrays: Array) -> jnp.dtype:
    """float64 when any operand is, float32 otherwise: sums, exponentials and logarithms never run in bfloat16."""
    return jnp.dtype(jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32)


def product_dtype(matmul_dtype: DTypeLike | None, *arrays: Array) -> jnp.dtype:
    """Dtype of matrix-product operands: the policy's, else bfloat16 only when every operand already is."""
    if matmul_dtype is not None:
        dtype = jnp.dtype(matmul_dtype)
        if dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
            raise TypeError(f"matmul_dtype must be bfloat16, float32 or float64, got {dtype}")
        return dtype
    if all(array.dtype == jnp.bfloat16 for array in arrays):
        return jnp.dtype(jnp.bfloat16)
    return accumulation_dtype(*arrays)


def logit_arguments(queries: Array, prototypes: Array, bias: Array, kind: str = "") -> tuple[Array, Array, Array]:
    """Checked (queries [N,D], prototypes [K,D], bias [K]); `kind` is prefixed to the names in messages."""
    queries = floating(f"{kind}queries", queries, 2)
    prototypes = floating(f"{kind}prototypes", prototypes, 2)
    bias = floating(f"{kind}bias", bias, 1)
    if prototypes.shape[0] == 0:
        raise ValueError(f"{kind}prototypes must hold at least one row, got shape {prototypes.shape} (K = 0)")
    if queries.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"{kind}queries and {kind}prototypes must have the same width, "
            f"got {queries.shape} and {prototypes.shape}: pass rows of D = {prototypes.shape[1]}"
        )
    if bias.shape[0] != prototypes.shape[0]:
        raise ValueError(
            f"{kind}bias must hold one value a prototype ([{prototypes.shape[0]}]), got shape {bias.shape}"
        )
    return queries, prototypes, bias


def positive(name: str, value: int) -> int:
    """`value` as an int of at least 1."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)
