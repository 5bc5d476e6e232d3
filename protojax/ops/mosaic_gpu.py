"""Mosaic GPU kernels (Hopper) of the two sweeps: one stationary block against a stream of tiles.

A thread block keeps 128 rows of one side in shared memory (64 for each of two compute warpgroups) while a third
warpgroup streams tiles of the other side past them; logits live in registers only. The row sweep keeps queries and
streams prototypes with online rescaling; the column sweep keeps prototypes and streams rows whose log-sum-exp is known.
Where the stationary side has too few blocks to fill the card, the stream is cut into parts whose results are combined.

Operands are bfloat16, sums float32; widths are padded to a multiple of 64 and may not exceed 256. Sums leave the chip
as two bfloat16 numbers, high and low part (2^-17 relative), which halves the staging buffer. `interpret` runs the
kernels on a CPU under a JAX that has the GPU interpreter; nothing else than that has been executed without a GPU.

cuDNN's attention is no substitute: its log-sum-exp comes back in bfloat16, which costs 2-29% in the first moments.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from protojax.ops.sweeps import Prepare, Tiling, finite_or_zero, pad_to_multiples

Array = jax.Array
GROUPS, ROWS, TILE = 2, 64, 64  # compute warpgroups, stationary rows of each, rows of a streamed tile
MULTIPROCESSORS = 132


class _Plan(NamedTuple):
    """Static: width of all matrices, tiles a part, whether rows are normalised on the way, what is streamed, and
    whether the interpreter runs it."""

    width: int
    steps: int
    online: bool
    matrix: bool  # a second streamed matrix holds the values; otherwise the tiles themselves do
    values: bool  # averages of values are wanted at all
    scalars: int
    interpreted: bool


def _transposed(reference: Any) -> Any:
    if jax.__version_info__ >= (0, 11):
        return reference.transpose((1, 0))
    return plgpu.transpose_ref(reference, (1, 0))


def _accumulate(mean: Array, weights: Array, values: Any, interpreted: bool) -> Array:
    """mean + weights @ values, in place in the accumulator's registers."""
    if not interpreted:
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, values))(plgpu.ACC.init(mean))

    # The interpreter knows neither run_state nor register operands of wgmma: the same sum, spelled out.
    return mean + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)


def _across(vector: Array, shape: tuple[int, int], axis: int) -> Array:
    return lax.broadcast_in_dim(vector, shape, [axis])


def _body(_, *refs: Any, plan: _Plan, keys: Any, bias: Any) -> Any:
    """One streamed tile: logits, share of each row, sums. refs: tile, its vector, [values], scalars..., carry."""
    tile, vector, *rest, carry = refs
    values = rest.pop(0) if plan.matrix else tile
    top, mass, mean, scalars = carry
    shape = (ROWS, TILE)

    def product(accumulator):
        plgpu.wgmma(accumulator, keys, _transposed(tile))
        return accumulator[...]

    logits = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32)) + _across(vector[...], shape, 1)
    if plan.online:
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        shift = jnp.where(new_top == -jnp.inf, jnp.zeros_like(new_top), new_top)
        rescale, share = jnp.exp(top - shift), jnp.exp(logits - _across(shift, shape, 0))
        mass, top = mass * rescale + jnp.sum(share, axis=1), new_top
        scalars = tuple(scalar * rescale for scalar in scalars)
        if plan.values:
            mean = mean * _across(rescale, mean.shape, 0)
    else:
        share = jnp.exp(logits + _across(bias[...], shape, 0))
    added = []
    for scalar, weight in zip(scalars, rest, strict=True):
        part = share * _across(weight[...], shape, 1)
        # An excluded prototype (weight -inf) without mass contributes 0, not 0 * -inf.
        added.append(scalar + jnp.sum(jnp.where(share == 0.0, jnp.zeros_like(part), part), axis=1))
    if plan.values:
        weights = share.astype(jnp.bfloat16)
        mean = _accumulate(mean, weights, values, plan.interpreted)
    return top, mass, mean, tuple(added)


def _kernel(*refs: Any, plan: _Plan) -> None:
    """refs: keys, bias, tiles, vectors, [values], scalars [F,S]; outputs high, low, lse, sums; scratch."""
    inputs, outputs = refs[: 4 + plan.matrix + plan.scalars], refs[4 + plan.matrix + plan.scalars : -5]
    keys_smem, bias_smem, lse_smem, sums_smem, barriers = refs[-5:]
    keys, bias, *streams = inputs
    high, low, lse, *sums = outputs
    group, part = lax.axis_index("group"), lax.axis_index("part")
    first = (lax.axis_index("block") * GROUPS + group) * ROWS
    rows = pl.ds(first, ROWS)
    mine, my_bias = keys_smem.at[group], bias_smem.at[group]

    def send(value, smem, target):
        smem[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, target)
        plgpu.wait_smem_to_gmem(0)

    def compute(pipeline):
        plgpu.copy_gmem_to_smem(keys.at[rows], mine, barriers.at[group])
        plgpu.barrier_wait(barriers.at[group])
        plgpu.copy_gmem_to_smem(bias.at[rows], my_bias, barriers.at[group])
        plgpu.barrier_wait(barriers.at[group])
        zero = jnp.zeros((ROWS,), jnp.float32)
        width = plan.width if plan.values else TILE
        start = (
            jnp.full((ROWS,), -jnp.inf, jnp.float32),
            zero,
            jnp.zeros((ROWS, width), jnp.float32),
            (zero,) * plan.scalars,
        )
        top, mass, mean, scalars = pipeline(start)
        if plan.online:
            safe = jnp.where(mass == 0.0, jnp.ones_like(mass), mass)
            shift = jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)
            send(shift + jnp.log(mass), lse_smem.at[group], lse.at[part, rows])
            mean = mean / _across(safe, mean.shape, 0) if plan.values else mean
            scalars = tuple(scalar / safe for scalar in scalars)
        for scalar, target in zip(scalars, sums, strict=True):
            send(scalar, sums_smem.at[group], target.at[part, rows])
        if plan.values:
            rounded = mean.astype(jnp.bfloat16)
            send(rounded, mine, high.at[part, rows])
            send((mean - rounded.astype(jnp.float32)).astype(jnp.bfloat16), mine, low.at[part, rows])

    matrix, vector = (
        plgpu.BlockSpec((TILE, plan.width), lambda step: (step, 0)),
        plgpu.BlockSpec((TILE,), lambda step: (step,)),
    )
    pipeline = plgpu.emit_pipeline_warp_specialized(
        partial(_body, plan=plan, keys=mine, bias=my_bias),
        grid=(plan.steps,),
        max_concurrent_steps=min(2, plan.steps),
        num_compute_wgs=GROUPS,
        memory_registers=40,
        wg_axis="group",
        compute_context=compute,
        in_specs=[matrix, vector, *([matrix] if plan.matrix else []), *[vector] * plan.scalars],
        out_specs=[],
    )
    length = plan.steps * TILE
    pipeline(*(stream.at[pl.ds(part * length, length)] for stream in streams))


def _plan(
    keys: Array, tiles: Array, values: Array | None, scalars: int, online: bool, interpreted: bool
) -> tuple[_Plan, int, int]:
    """(plan, parts of the stream, padded number of keys)."""
    width = max(a.shape[1] for a in (keys, tiles, *([] if values is None else [values])))
    width += -width % 64
    if width > 256:
        raise ValueError(f"the Mosaic GPU kernels take widths up to 256, got {width}: use the portable path")
    block = GROUPS * ROWS
    rows = keys.shape[0] + -keys.shape[0] % block
    tile_number = -(-tiles.shape[0] // TILE)
    parts = max(1, min(8, MULTIPROCESSORS // (rows // block), tile_number))
    matrix = values is not None and values is not tiles
    plan = _Plan(width, -(-tile_number // parts), online, matrix, values is not None, scalars, interpreted)
    return plan, parts, rows


def _run(
    keys: Array,
    bias: Array,
    tiles: Array,
    vector: Array,
    values: Array | None,
    scalars: list[Array],
    online: bool,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """(lse [parts,R], sums of values [parts,R,W], sums of scalars [parts,R,F]) for stationary keys [R,P]."""
    plan, parts, rows = _plan(keys, tiles, values, len(scalars), online, interpret is not None)
    width, length, bf16 = plan.width, parts * plan.steps * TILE, jnp.bfloat16
    pad = pad_to_multiples
    arguments = [pad(keys.astype(bf16), (rows, width)), pad(bias.astype(jnp.float32), (rows,))]
    # Padded tiles have logits of -inf, in either sweep.
    arguments += [pad(tiles.astype(bf16), (length, width)), pad(vector.astype(jnp.float32), (length,), -jnp.inf)]
    if values is not None and plan.matrix:
        arguments.append(pad(values.astype(bf16), (length, width)))
    arguments += [pad(scalar.astype(jnp.float32), (length,)) for scalar in scalars]
    wide = width if values is not None else TILE
    shape = jax.ShapeDtypeStruct
    more = {} if interpret is None else {"interpret": interpret}
    high, low, lse, *sums = plgpu.kernel(
        partial(_kernel, plan=plan),
        out_type=[
            shape((parts, rows, wide), bf16),
            shape((parts, rows, wide), bf16),
            shape((parts, rows), jnp.float32),
            *[shape((parts, rows), jnp.float32) for _ in scalars],
        ],
        grid=(rows // (GROUPS * ROWS), parts),
        grid_names=("block", "part"),
        num_threads=GROUPS + 1,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((GROUPS, ROWS, width), bf16),
            plgpu.SMEM((GROUPS, ROWS), jnp.float32),
            plgpu.SMEM((GROUPS, ROWS), jnp.float32),
            plgpu.SMEM((GROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=GROUPS),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **more,
    )(*arguments)
    mean = (
        high.astype(jnp.float32) + low.astype(jnp.float32)
        if values is not None
        else jnp.zeros((parts, rows, 0), jnp.float32)
    )
    stacked = jnp.stack(sums, axis=2) if sums else jnp.zeros((parts, rows, 0), jnp.float32)
    count = keys.shape[0]
    return lse[:, :count], mean[:, :count], stacked[:, :count]


def _interpreter(interpret: bool) -> Any:
    if not interpret:
        return None
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise RuntimeError(f"JAX {jax.__version__} has no interpreter for Mosaic GPU kernels; use JAX 0.11 or later")
    return plgpu.InterpretGPUParams()


def row_sweep(
    queries: Array,
    prototypes: Array,
    bias: Array,
    values: Array | None,
    weights: Array | None,
    options: Tiling,
    interpret: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """As `sweeps.row_sweep`, float32 results; parts of the prototypes are combined by their log-sum-exps."""
    scalars = [] if weights is None else [weights]
    zero = jnp.zeros(queries.shape[:1], jnp.float32)
    found = _run(queries, zero, prototypes, bias, values, scalars, True, _interpreter(interpret))
    parts, mean, scalar = found
    lse = jax.nn.logsumexp(parts, axis=0)
    share = jnp.exp(parts - finite_or_zero(lse)[None, :])[:, :, None]
    mean, scalar = jnp.sum(share * mean, axis=0), jnp.sum(share * scalar, axis=0)
    return lse, None if values is None else mean[:, : values.shape[1]], None if weights is None else scalar[:, 0]


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
    """As `sweeps.column_sweep`, float32 results. Vectors wider than 256 take one sweep for every 256 columns."""
    queries, vectors, scalars = prepare(queries, rows)
    columns = [scalars[:, i] for i in range(scalars.shape[1])]
    normaliser = -finite_or_zero(lse.astype(jnp.float32))
    first: list[Array] = []
    sums: Array | None = None
    for start in range(0, vectors.shape[1], 256):
        piece = vectors[:, start : start + 256]
        wanted = columns if sums is None else []
        arguments = (prototypes, bias, queries, normaliser, piece, wanted, False, _interpreter(interpret))
        _, mean, scalar = _run(*arguments)
        first.append(jnp.sum(mean, axis=0)[:, : piece.shape[1]])
        sums = jnp.sum(scalar, axis=0) if sums is None else sums
    assert sums is not None
    return jnp.concatenate(first, axis=1), sums
