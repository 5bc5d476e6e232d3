"""Pallas TPU kernels of CARP's block losses: forward sweep and gradient of the student views, a block in VMEM."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from protojax.ops.pallas_tpu import LANES, _compiler, _dot
from protojax.ops.sweeps import pad_to_multiples

Array = jax.Array
ROWS = 128


def _softmax(views: Any, keys: Any, bias: Any, sharpness: Any, index: int) -> Array:
    logits = (_dot(views[index], keys[0], (1, 1)) + bias[0]) * sharpness[0, 0]
    chance = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return chance / jnp.sum(chance, axis=1, keepdims=True)


def _chances(refs: Any) -> tuple[list[Array], list[Array]]:
    """Probabilities of every student and teacher view in the block, [R,block] each."""
    student, teacher, keys, bias, target_keys, target_bias, sharpness, target_sharpness = refs
    predicted = [_softmax(student, keys, bias, sharpness, i) for i in range(student.shape[0])]
    assigned = [_softmax(teacher, target_keys, target_bias, target_sharpness, j) for j in range(teacher.shape[0])]
    return predicted, assigned


def _pairs(predicted: list, assigned: list) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(predicted)) for j in range(len(assigned)) if i != j]


def _forward_kernel(*refs, eps: float):
    *inputs, share, consistency, columns = refs

    @pl.when(pl.program_id(1) == 0)
    def _start():
        consistency[...] = jnp.zeros_like(consistency)
        columns[...] = jnp.zeros_like(columns)

    predicted, assigned = _chances(inputs)
    weight = share[...]
    loss = jnp.zeros((1, 1), jnp.float32)
    for i, j in _pairs(predicted, assigned):
        agreement = jnp.sum(predicted[i] * assigned[j], axis=1, keepdims=True)
        log = jnp.log(jnp.clip(agreement, eps, 1.0 - eps))
        loss = loss - jnp.sum(weight * log, axis=0, keepdims=True)
    pooled = jnp.sum(weight * sum(predicted + assigned), axis=0, keepdims=True)
    consistency[...] += jnp.broadcast_to(loss[None], consistency.shape)
    columns[...] += pooled[None]


def _backward_kernel(*refs, eps: float):
    *inputs, share, consistency_bar, columns_bar, student_bar = refs
    keys, sharpness = inputs[2], inputs[6]

    @pl.when(pl.program_id(1) == 0)
    def _start():
        student_bar[...] = jnp.zeros_like(student_bar)

    predicted, assigned = _chances(inputs)
    weight = share[...]
    bars = [weight * columns_bar[0] for _ in predicted]
    for i, j in _pairs(predicted, assigned):
        agreement = jnp.sum(predicted[i] * assigned[j], axis=1, keepdims=True)
        inside = (agreement > eps) & (agreement < 1.0 - eps)
        slope = jnp.where(inside, -weight * consistency_bar[0, 0] / jnp.where(inside, agreement, 1.0), 0.0)
        bars[i] = bars[i] + slope * assigned[j]
    for i, (chance, bar) in enumerate(zip(predicted, bars, strict=True)):
        logit_bar = chance * (bar - jnp.sum(chance * bar, axis=1, keepdims=True)) * sharpness[0, 0]
        student_bar[i] += _dot(logit_bar.astype(keys.dtype), keys[0], (1, 0))


def _arguments(student: Any, teacher: Any, share: Array, blocks: Array, operand: Any) -> list[Array]:
    """Padded rows and gathered blocks [G,block,D]: masked rows are zeroed, whatever they held."""
    used = (share != 0.0)[None, :, None]
    arrays = [
        pad_to_multiples(
            jnp.where(used, side.views, jnp.zeros((), side.views.dtype)).astype(operand), (None, ROWS, LANES)
        )
        for side in (student, teacher)
    ]
    for side in (student, teacher):
        arrays.append(pad_to_multiples(side.prototypes.astype(operand)[blocks], (None, None, LANES)))
        arrays.append(side.bias.astype(jnp.float32)[blocks][:, None, :])
    arrays += [side.sharpness.astype(jnp.float32).reshape(1, 1) for side in (student, teacher)]
    return [*arrays, pad_to_multiples(share.astype(jnp.float32)[:, None], (ROWS, None))]


def _specs(arrays: list[Array], block: int, chunk_axis: int) -> list[pl.BlockSpec]:
    chunk = lambda *grid: grid[chunk_axis]  # noqa: E731
    group = lambda *grid: grid[1 - chunk_axis]  # noqa: E731
    width = arrays[0].shape[2]
    rows = [pl.BlockSpec((a.shape[0], ROWS, width), lambda *g: (0, chunk(*g), 0)) for a in arrays[:2]]
    keys = pl.BlockSpec((1, block, width), lambda *g: (group(*g), 0, 0))
    flat = pl.BlockSpec((1, 1, block), lambda *g: (group(*g), 0, 0))
    one = pl.BlockSpec((1, 1), lambda *g: (0, 0))
    return [*rows, keys, flat, keys, flat, one, one, pl.BlockSpec((ROWS, 1), lambda *g: (chunk(*g), 0))]


def forward(
    student: Any, teacher: Any, share: Array, blocks: Array, eps: float, operand: Any, interpret: bool = False
) -> tuple[Array, Array]:
    """(sum over blocks, rows and pairs of -share ln clip(<p, q>), column sums [G,block] of all views' probabilities).

    student, teacher: views [V,B,D], prototypes [K,D], bias [K], sharpness; blocks [G,block]: prototype indices."""
    arrays = _arguments(student, teacher, share, blocks, operand)
    groups, block = blocks.shape
    flat = pl.BlockSpec((1, 1, block), lambda g, c: (g, 0, 0))
    consistency, columns = pl.pallas_call(
        partial(_forward_kernel, eps=eps),
        grid=(groups, arrays[0].shape[1] // ROWS),
        in_specs=_specs(arrays, block, chunk_axis=1),
        out_specs=[flat, flat],
        out_shape=[jax.ShapeDtypeStruct((groups, 1, block), jnp.float32)] * 2,
        compiler_params=_compiler("parallel", "arbitrary"),
        interpret=interpret,
        name="protojax_block_losses",
    )(*arrays)
    return jnp.sum(consistency[:, 0, 0]), columns[:, 0]


def backward(
    student: Any,
    teacher: Any,
    share: Array,
    blocks: Array,
    consistency_bar: Array,
    columns_bar: Array,
    eps: float,
    operand: Any,
    interpret: bool = False,
) -> Array:
    """Cotangent of the student views [S,B,D], from those of the consistency sum and of the column sums [G,block]."""
    arrays = _arguments(student, teacher, share, blocks, operand)
    groups, block = blocks.shape
    specs = _specs(arrays, block, chunk_axis=0)
    specs += [pl.BlockSpec((1, 1), lambda c, g: (0, 0)), pl.BlockSpec((1, 1, block), lambda c, g: (g, 0, 0))]
    bars = [consistency_bar.astype(jnp.float32).reshape(1, 1), columns_bar.astype(jnp.float32)[:, None, :]]
    found = pl.pallas_call(
        partial(_backward_kernel, eps=eps),
        grid=(arrays[0].shape[1] // ROWS, groups),
        in_specs=specs,
        out_specs=specs[0],
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32),
        compiler_params=_compiler("parallel", "arbitrary"),
        interpret=interpret,
        name="protojax_block_gradient",
    )(*arrays, *bars)
    return found[:, : student.views.shape[1], : student.views.shape[2]]
