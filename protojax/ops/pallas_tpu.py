"""Pallas TPU kernels of the sweeps: the same results as `sweeps`, with the logits never leaving VMEM.

Each function takes what its portable twin takes, pads to whole tiles (bias -inf for prototypes, lse +inf for rows, zero
columns for the width) and cuts the padding off again. `interpret=True` runs the kernels on any device, for tests.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from protojax.ops.checks import product_dtype
from protojax.ops.sweeps import Prepare, Tiling, finite_or_zero, pad_to_multiples

Array = jax.Array
LANES = 128
ROWS, PROTOTYPES = 256, 512  # block of logits: 0.5 MB of float32 in VMEM


def _dot(left: Array, right: Array, contract: tuple[int, int]) -> Array:
    precision = lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, numbers, precision=precision, preferred_element_type=jnp.float32)


def _compiler(*semantics: Any) -> Any:
    return pltpu.CompilerParams(dimension_semantics=semantics)


# ------------------------------------------------------------------------------------------------- row sweep
def _row_kernel(*refs: Any, attention: bool, values: bool, weights: bool):
    queries, keys, bias, *rest = refs
    value_ref: Any = rest.pop(0) if values else keys
    weight_ref: Any = rest.pop(0) if weights else None
    averages = attention or values
    lse_out = rest.pop(0)
    mean_out: Any = rest.pop(0) if averages else None
    scalar_out: Any = rest.pop(0) if weights else None
    top, mass, *rest = rest
    mean = rest.pop(0) if averages else None
    scalar = rest.pop(0) if weights else None
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _start():
        top[...] = jnp.full_like(top, -jnp.inf)
        for sums in (mass, mean, scalar):
            if sums is not None:
                sums[...] = jnp.zeros_like(sums)

    logits = _dot(queries[...], keys[...], (1, 1)) + bias[...]
    new_top = jnp.maximum(top[...], jnp.max(logits, axis=1, keepdims=True))
    shift = finite_or_zero(new_top)
    rescale, chance = jnp.exp(top[...] - shift), jnp.exp(logits - shift)
    top[...] = new_top
    mass[...] = mass[...] * rescale + jnp.sum(chance, axis=1, keepdims=True)
    if mean is not None:
        mean[...] = mean[...] * rescale + _dot(chance.astype(value_ref.dtype), value_ref[...], (1, 0))
    if scalar is not None:
        share = jnp.where(chance == 0.0, 0.0, chance * weight_ref[...])
        scalar[...] = scalar[...] * rescale + jnp.sum(share, axis=1, keepdims=True)

    @pl.when(step == pl.num_programs(1) - 1)
    def _finish():
        inverse = 1.0 / jnp.where(mass[...] == 0.0, 1.0, mass[...])
        lse_out[...] = finite_or_zero(top[...]) + jnp.log(mass[...])
        if mean is not None:
            mean_out[...] = mean[...] * inverse
        if scalar is not None:
            scalar_out[...] = scalar[...] * inverse


def row_sweep(
    queries: Array,
    prototypes: Array,
    bias: Array,
    values: Array | None,
    weights: Array | None,
    options: Tiling,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """As `sweeps.row_sweep`, float32 results: grid (row blocks, prototype blocks), the latter in sequence."""
    operand = product_dtype(options.matmul_dtype, queries, prototypes)
    length, attention = queries.shape[0], values is prototypes
    arrays = [
        pad_to_multiples(queries.astype(operand), (ROWS, LANES)),
        pad_to_multiples(prototypes.astype(operand), (PROTOTYPES, LANES)),
        pad_to_multiples(bias.astype(jnp.float32)[None, :], (None, PROTOTYPES), -jnp.inf),
    ]
    width = arrays[0].shape[1]
    by_row = lambda size: pl.BlockSpec((ROWS, size), lambda n, k: (n, 0))  # noqa: E731
    by_prototype = lambda size: pl.BlockSpec((PROTOTYPES, size), lambda n, k: (k, 0))  # noqa: E731
    flat = pl.BlockSpec((1, PROTOTYPES), lambda n, k: (0, k))
    specs = [by_row(width), by_prototype(width), flat]
    outputs, scratch = [1], [1, 1]
    if values is not None:
        wide = width
        if not attention:
            arrays.append(pad_to_multiples(values.astype(operand), (PROTOTYPES, LANES)))
            wide = arrays[-1].shape[1]
            specs.append(by_prototype(wide))
        outputs.append(wide)
        scratch.append(wide)
    if weights is not None:
        arrays.append(pad_to_multiples(weights.astype(jnp.float32)[None, :], (None, PROTOTYPES)))
        specs.append(flat)
        outputs.append(1)
        scratch.append(1)
    padded = arrays[0].shape[0]
    results = pl.pallas_call(
        partial(
            _row_kernel, attention=attention, values=values is not None and not attention, weights=weights is not None
        ),
        grid=(padded // ROWS, arrays[1].shape[0] // PROTOTYPES),
        in_specs=specs,
        out_specs=[by_row(size) for size in outputs],
        out_shape=[jax.ShapeDtypeStruct((padded, size), jnp.float32) for size in outputs],
        scratch_shapes=[pltpu.VMEM((ROWS, size), jnp.float32) for size in scratch],
        compiler_params=_compiler("parallel", "arbitrary"),
        interpret=interpret,
        name="protojax_row_sweep",
    )(*arrays)
    mean = None if values is None else results[1][:length, : values.shape[1]]
    return results[0][:length, 0], mean, None if weights is None else results[-1][:length, 0]


# ---------------------------------------------------------------------------------------------- column sweep
def _column_kernel(keys, bias, queries, lse, vectors, scalars, first_out, sums_out):
    @pl.when(pl.program_id(1) == 0)
    def _start():
        first_out[...] = jnp.zeros_like(first_out)
        sums_out[...] = jnp.zeros_like(sums_out)

    share = jnp.exp(_dot(keys[...], queries[...], (1, 1)) + bias[...] - lse[...])
    first_out[...] += _dot(share.astype(vectors.dtype), vectors[...], (1, 0))
    # Scalars on the vector unit: as columns of the product they would fill a whole tile of 128.
    columns = [jnp.sum(share * scalars[i, :][None, :], axis=1, keepdims=True) for i in range(scalars.shape[0])]
    sums_out[...] += jnp.concatenate(columns, axis=1) if len(columns) > 1 else columns[0]


def column_sweep(
    queries: Array,
    prototypes: Array,
    bias: Array,
    lse: Array,
    rows: Any,
    prepare: Prepare,
    options: Tiling,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """As `sweeps.column_sweep`, float32 results: a prototype block stays in VMEM while the rows stream past it."""
    operand = product_dtype(options.matmul_dtype, queries, prototypes)
    queries, vectors, scalars = prepare(queries, rows)
    kind = product_dtype(options.matmul_dtype, vectors)
    count, wide, number = prototypes.shape[0], vectors.shape[1], scalars.shape[1]
    keys = pad_to_multiples(prototypes.astype(operand), (PROTOTYPES, LANES))
    arrays = [
        keys,
        pad_to_multiples(bias.astype(jnp.float32)[:, None], (PROTOTYPES, None), -jnp.inf),
        pad_to_multiples(queries.astype(operand), (ROWS, LANES)),
        pad_to_multiples(finite_or_zero(lse.astype(jnp.float32))[None, :], (None, ROWS), jnp.inf),
        pad_to_multiples(vectors.astype(kind), (ROWS, LANES)),
        pad_to_multiples(scalars.astype(jnp.float32).T, (None, ROWS)),
    ]
    width, wide_padded = keys.shape[1], arrays[4].shape[1]
    by_prototype = lambda size: pl.BlockSpec((PROTOTYPES, size), lambda k, n: (k, 0))  # noqa: E731
    by_row = lambda size: pl.BlockSpec((ROWS, size), lambda k, n: (n, 0))  # noqa: E731
    flat = lambda size: pl.BlockSpec((size, ROWS), lambda k, n: (0, n))  # noqa: E731
    first, sums = pl.pallas_call(
        _column_kernel,
        grid=(keys.shape[0] // PROTOTYPES, arrays[2].shape[0] // ROWS),
        in_specs=[by_prototype(width), by_prototype(1), by_row(width), flat(1), by_row(wide_padded), flat(number)],
        out_specs=[by_prototype(wide_padded), by_prototype(number)],
        out_shape=[jax.ShapeDtypeStruct((keys.shape[0], size), jnp.float32) for size in (wide_padded, number)],
        compiler_params=_compiler("parallel", "arbitrary"),
        interpret=interpret,
        name="protojax_column_sweep",
    )(*arrays)
    return first[:count, :wide], sums[:count]
