"""CARP's block losses: softmax inside random blocks of prototypes, one streamed sweep over the blocks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from protojax.ops.checks import accumulation_dtype, floating, positive, product_dtype

Array = jax.Array


class _Setting(NamedTuple):
    block: int
    eps: float
    operand: Any
    total: Any


def block_consistency(
    student: Array,
    teacher: Array,
    prediction: tuple[Array, Array],
    target: tuple[Array, Array],
    mask: Array,
    permutation: Array,
    *,
    block: int = 512,
    student_temperature: float | Array = 1.0,
    teacher_temperature: float | Array = 1.0,
    eps: float = 1.1920929e-07,
    matmul_dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """(consistency, regulariser), two scalars, of CARP (Silva & Ramírez Rivera, NeurIPS 2023).

    The K prototypes, in the order of `permutation`, are cut into K / block blocks; p and q are the softmax of student
    and teacher logits (h . m_k + c_k) / temperature inside a block.

    - consistency: mean over blocks, rows and pairs (student view i, teacher view j, i != j) of
      -ln clip(<p_i, q_j>, eps, 1 - eps). Teacher view j is the student's view j, so the first T student views meet
      T - 1 teacher views and the others T.
    - regulariser: mean over blocks of ln(block) + sum_c pbar_c ln clip(pbar_c, eps, 1 - eps), with pbar the mean over
      rows of the probabilities of *all* views, student (S) and teacher (T), each view with equal weight, as the
      authors' formula pools them. It is 0 when usage is uniform and at most ln(block). Only column means of `block`
      numbers enter it, so that under data parallelism they are summed and no probability is gathered.

    Args:
      student: [S,B,D]; teacher: [T,B,D], no gradient. prediction, target: (prototypes [K,D], bias [K]) for the student
        and the teacher; gradients reach `prediction`, and none reaches `target`.
      mask: [B] bool or weights: rows of 0 count nothing (with none left both results are 0).
      permutation: [K] int, a permutation of range(K).

    The backward pass recomputes the probabilities block by block: memory is (S + T) x B x block numbers, independent of
    K. Raises ValueError when K is not a multiple of `block`, when no pair of distinct views exists, and for shapes that
    disagree; TypeError as `lse` does."""
    student, teacher = floating("student", student, 3), floating("teacher", teacher, 3)
    count = _check(student, teacher, prediction, target, mask, permutation, positive("block", block))
    total = accumulation_dtype(student, teacher, *prediction, *target)
    operand = product_dtype(matmul_dtype, student, teacher, prediction[0], target[0])
    setting = _Setting(block, eps, operand, total)
    teacher, target = lax.stop_gradient((teacher, target))
    weight = mask.astype(total)
    used = (weight != 0.0)[None, :, None]
    # Masked rows may hold anything, NaN included: zero them before they meet a product.
    student = jnp.where(used, student, jnp.zeros((), student.dtype)).astype(total)
    teacher = jnp.where(used, teacher, jnp.zeros((), teacher.dtype)).astype(total)
    student = student / jnp.asarray(student_temperature, total)
    teacher = teacher / jnp.asarray(teacher_temperature, total)
    scale = (1.0 / jnp.asarray(student_temperature, total), 1.0 / jnp.asarray(teacher_temperature, total))
    parts = []
    for (prototypes, bias), inverse in zip((prediction, target), scale, strict=True):
        parts.append(prototypes[permutation].reshape(count // block, block, -1))
        parts.append((bias.astype(total)[permutation] * inverse).reshape(count // block, block))
    share = weight / jnp.maximum(jnp.sum(weight), jnp.ones((), total) * jnp.finfo(total).tiny)

    def body(sums, blocks):
        losses = _one_block(student, teacher, blocks, share, setting)
        return (sums[0] + losses[0], sums[1] + losses[1]), None

    # Rematerialised: without it the scan would keep every block's probabilities, which is the N x K array.
    zero = jnp.zeros((), total)
    (consistency, regulariser), _ = lax.scan(jax.checkpoint(body, prevent_cse=False), (zero, zero), tuple(parts))
    blocks_number = count // block
    any_row = jnp.sum(weight) > 0.0
    return consistency / blocks_number, jnp.where(any_row, regulariser / blocks_number, zero)


def _one_block(student: Array, teacher: Array, blocks: Any, share: Array, setting: _Setting) -> tuple[Array, Array]:
    """Both losses of one block; share [B] weighs the rows and sums to one."""
    prediction, prediction_bias, target, target_bias = blocks
    views, teachers = student.shape[0], teacher.shape[0]

    def probabilities(rows: Array, prototypes: Array, bias: Array) -> Array:
        precision = lax.Precision.DEFAULT if setting.operand == jnp.bfloat16 else lax.Precision.HIGHEST
        logits = jnp.einsum(
            "vbd,kd->vbk",
            rows.astype(setting.operand),
            prototypes.astype(setting.operand),
            precision=precision,
            preferred_element_type=setting.total,
        )
        return jax.nn.softmax(logits + bias[None, None, :], axis=-1)

    predicted = probabilities(student, prediction, prediction_bias)
    assigned = lax.stop_gradient(probabilities(teacher, target, target_bias))
    pairs = [(i, j) for i in range(views) for j in range(teachers) if i != j]
    consistency = jnp.zeros((), setting.total)
    for i, j in pairs:
        agreement = jnp.clip(jnp.sum(predicted[i] * assigned[j], axis=-1), setting.eps, 1.0 - setting.eps)
        consistency = consistency - jnp.sum(share * jnp.log(agreement))
    pooled = jnp.sum(predicted, axis=0) + jnp.sum(assigned, axis=0)
    usage = jnp.sum(pooled * share[:, None], axis=0) / (views + teachers)
    entropy = jnp.sum(usage * jnp.log(jnp.clip(usage, setting.eps, 1.0 - setting.eps)))
    return consistency / len(pairs), math.log(setting.block) + entropy


def _check(student, teacher, prediction, target, mask, permutation, block) -> int:
    """K, after checking every shape."""
    for name, (prototypes, bias) in (("prediction", prediction), ("target", target)):
        floating(f"{name} prototypes", prototypes, 2)
        floating(f"{name} bias", bias, 1)
        if prototypes.shape[1] != student.shape[2] or bias.shape[0] != prototypes.shape[0]:
            raise ValueError(
                f"{name} must be (prototypes [K,{student.shape[2]}], bias [K]), got {prototypes.shape} and {bias.shape}"
            )
    count = prediction[0].shape[0]
    if target[0].shape[0] != count or permutation.shape != (count,):
        raise ValueError(
            f"prediction, target and permutation must agree on K, got {count}, {target[0].shape[0]} and "
            f"{permutation.shape}"
        )
    if count == 0 or count % block:
        lower, upper = count // block * block, (count // block + 1) * block
        raise ValueError(
            f"the number of prototypes must be a multiple of block, got K = {count} and block = {block}: set K to "
            f"{max(lower, block)} or {upper}, or choose a block that divides {count}"
        )
    if teacher.shape[1:] != student.shape[1:] or teacher.shape[0] > student.shape[0]:
        raise ValueError(
            f"teacher must be [T,B,D] with T <= S and the student's B and D, got {teacher.shape} and {student.shape}"
        )
    if mask.shape != student.shape[1:2]:
        raise ValueError(f"mask must have one value an image ({student.shape[1]}), got shape {mask.shape}")
    if teacher.shape[0] == 0 or student.shape[0] < 2:
        raise ValueError(
            f"CARP compares different views: pass at least 2 student views and 1 teacher view, got {student.shape[0]} "
            f"and {teacher.shape[0]}"
        )
    return count
