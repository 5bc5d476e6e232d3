"""CARP's block losses: softmax inside random blocks of prototypes, one streamed sweep over the blocks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from protojax.ops.checks import accumulation_dtype, floating, positive, product_dtype
from protojax.ops.kernels import block_kernels, block_path, current_engine, policy

Array = jax.Array


class _Setting(NamedTuple):
    """Static: prototypes a block, rows a chunk, clip, dtypes of products and of everything else, and the program."""

    block: int
    chunk: int
    eps: float
    operand: Any
    total: Any
    path: str = "scan"
    engine: Any = None

    @property
    def pallas(self) -> dict[str, Any]:
        """Arguments of the Pallas kernels."""
        return {"eps": self.eps, "operand": jnp.dtype(self.operand), "interpret": self.path.endswith("_interpret")}


class _Side(NamedTuple):
    """Views [V,B,D] scored against prototypes [K,D] and bias [K], logits times the scalar `sharpness` = 1 / T."""

    views: Any
    prototypes: Any
    bias: Any
    sharpness: Any


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
    row_tile: int | None = None,
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

    One sweep over blocks and chunks of rows; the backward pass recomputes the probabilities from column means that the
    forward pass keeps (K numbers), so that memory depends on neither N x K nor B x block.

    Raises ValueError when K is not a multiple of `block`, when no pair of distinct views exists, and for shapes that
    disagree; TypeError as `lse` does."""
    student, teacher = floating("student", student, 3), floating("teacher", teacher, 3)
    _check(student, teacher, prediction, target, mask, permutation, positive("block", block))
    total = accumulation_dtype(student, teacher, *prediction, *target)
    operand = product_dtype(policy(matmul_dtype, total), student, teacher, prediction[0], target[0])
    views, rows = student.shape[0] + teacher.shape[0], student.shape[1]
    # As many rows a chunk as keep the probabilities of all views in a CPU's cache, or fill an accelerator.
    room = 2**20 if jax.default_backend() == "cpu" else 2**25
    chunk = row_tile if row_tile is not None else max(8, room // (views * block))
    chunk = max(1, min(chunk, rows))
    weight = mask.astype(total)
    share = weight / jnp.maximum(jnp.sum(weight), jnp.asarray(jnp.finfo(total).tiny, total))
    sharpness = [1.0 / jnp.asarray(t, total) for t in (student_temperature, teacher_temperature)]
    sides = (
        _Side(student, *prediction, sharpness[0]),
        _Side(teacher, *target, sharpness[1]),
    )
    path = block_path(rows, block, student.shape[2], operand, total)
    setting = _Setting(block, chunk, eps, operand.name, total.name, path, current_engine())
    return _block_losses(*sides, share, permutation.reshape(-1, block), setting)


# ------------------------------------------------------------------------------------------ one block, one chunk
def _probabilities(views: Array, side: _Side, setting: _Setting) -> Array:
    """softmax inside the block, [V,R,block], of chunk `views` [V,R,D]; side holds the block's prototypes."""
    total, operand = jnp.dtype(setting.total), jnp.dtype(setting.operand)
    precision = lax.Precision.DEFAULT if operand == jnp.bfloat16 else lax.Precision.HIGHEST
    logits = jnp.einsum(
        "vrd,kd->vrk",
        views.astype(operand),
        side.prototypes.astype(operand),
        precision=precision,
        preferred_element_type=total,
    )
    return jax.nn.softmax((logits + side.bias.astype(total)[None, None, :]) * side.sharpness, axis=-1)


def _chunk_losses(student: _Side, teacher: _Side, share: Array, setting: _Setting) -> tuple[Array, Array]:
    """(sum over rows and pairs of -share ln <p, q>, column sums of the pooled probabilities [block])."""
    used = (share != 0.0)[None, :, None]
    # Masked rows may hold anything, NaN included: zero them before they meet a product.
    clean = [jnp.where(used, side.views, jnp.zeros((), side.views.dtype)) for side in (student, teacher)]
    predicted = _probabilities(clean[0], student, setting)
    assigned = lax.stop_gradient(_probabilities(clean[1], teacher, setting))
    consistency = jnp.zeros((), predicted.dtype)
    for i, j in _pairs(student, teacher):
        agreement = jnp.clip(jnp.sum(predicted[i] * assigned[j], axis=-1), setting.eps, 1.0 - setting.eps)
        consistency = consistency - jnp.sum(share * jnp.log(agreement))
    pooled = jnp.sum(predicted, axis=0) + jnp.sum(assigned, axis=0)
    return consistency, jnp.sum(pooled * share[:, None], axis=0)


def _pairs(student: _Side, teacher: _Side) -> list[tuple[int, int]]:
    return [(i, j) for i in range(student.views.shape[0]) for j in range(teacher.views.shape[0]) if i != j]


def _regulariser(columns: Array, views: int, setting: _Setting) -> Array:
    """ln(block) + sum_c pbar_c ln pbar_c from the column sums of one block; 0 when no row was left."""
    usage = columns / views
    entropy = jnp.sum(usage * jnp.log(jnp.clip(usage, setting.eps, 1.0 - setting.eps)))
    return jnp.where(jnp.sum(columns) > 0.0, math.log(setting.block) + entropy, jnp.zeros((), columns.dtype))


def _rows_of(side: _Side, index: Array, size: int) -> _Side:
    return side._replace(views=lax.dynamic_slice_in_dim(side.views, index * size, size, axis=1))


def _block_of(side: _Side, picked: Array) -> _Side:
    return side._replace(prototypes=side.prototypes[picked], bias=side.bias[picked])


# ------------------------------------------------------------------------------------------------- all of them
def _sums(student: _Side, teacher: _Side, share: Array, blocks: Array, setting: _Setting) -> tuple[Array, Array]:
    """(sum of -share ln <p, q> over blocks, rows and pairs, column sums [K/block, block]); sums over rows."""
    if setting.path != "scan":
        return block_kernels().forward(student, teacher, share, blocks, **setting.pallas)
    total = jnp.dtype(setting.total)
    student, teacher, share, size = _padded(student, teacher, share, setting)

    def one_block(consistency, picked):
        ours, theirs = _block_of(student, picked), _block_of(teacher, picked)

        def one_chunk(carry, index):
            part = lax.dynamic_slice_in_dim(share, index * size, size)
            rows = [_rows_of(side, index, size) for side in (ours, theirs)]
            losses = _chunk_losses(rows[0], rows[1], part, setting)
            return (carry[0] + losses[0], carry[1] + losses[1]), None

        start = (consistency, jnp.zeros((setting.block,), total))
        return lax.scan(one_chunk, start, jnp.arange(share.shape[0] // size))[0]

    return lax.scan(one_block, jnp.zeros((), total), blocks)


def _bars(
    student: _Side,
    teacher: _Side,
    share: Array,
    blocks: Array,
    consistency_bar: Array,
    slopes: Array,
    names: tuple[str, ...],
    setting: _Setting,
) -> dict[str, Array]:
    """Cotangents of the student's arrays `names`, from those of the two results of `_sums`.

    Block by block, chunk by chunk: the chunk's losses are rebuilt and differentiated, and their probabilities dropped.
    `names` holds the prototypes only where they take a gradient (not when decoupled)."""
    if setting.path != "scan" and names == ("views",):
        arguments = (student, teacher, share, blocks, consistency_bar, slopes)
        return {"views": block_kernels().backward(*arguments, **setting.pallas)}
    total, length = jnp.dtype(setting.total), share.shape[0]
    student, teacher, share, size = _padded(student, teacher, share, setting)
    tables = [name for name in ("prototypes", "bias") if name in names]

    def one_block(carry, part):
        picked, slope = part
        ours, theirs = _block_of(student, picked), _block_of(teacher, picked)

        def one_chunk(bars, index):
            mass = lax.dynamic_slice_in_dim(share, index * size, size)
            rows, other = (_rows_of(side, index, size) for side in (ours, theirs))

            def losses(live):
                return _chunk_losses(rows._replace(**live), other, mass, setting)

            _, pull = jax.vjp(losses, {name: getattr(rows, name) for name in bars})
            found = {name: bar.astype(total) for name, bar in pull((consistency_bar, slope))[0].items()}
            at = (0, index * size, 0)
            old = lax.dynamic_slice(bars["views"], at, found["views"].shape)
            added = {name: bars[name] + found[name] for name in bars if name != "views"}
            return added | {"views": lax.dynamic_update_slice(bars["views"], old + found["views"], at)}, None

        blank = {name: jnp.zeros(getattr(ours, name).shape, total) for name in tables}
        bars, _ = lax.scan(one_chunk, carry | blank, jnp.arange(share.shape[0] // size))
        return bars | {name: carry[name].at[picked].set(bars[name], unique_indices=True) for name in tables}, None

    start = {name: jnp.zeros(getattr(student, name).shape, total) for name in names}
    bars, _ = lax.scan(one_block, start, (blocks, slopes))
    return bars | {"views": bars["views"][:, :length]}


def _padded(student: _Side, teacher: _Side, share: Array, setting: _Setting) -> tuple[_Side, _Side, Array, int]:
    """Rows up to whole chunks (share 0 there), and the rows a chunk."""
    size = max(1, min(setting.chunk, share.shape[0]))
    more = -share.shape[0] % size
    if more:
        widths = ((0, 0), (0, more), (0, 0))
        student, teacher = (side._replace(views=jnp.pad(side.views, widths)) for side in (student, teacher))
        share = jnp.pad(share, (0, more))
    return student, teacher, share, size


def _losses(student: _Side, teacher: _Side, share: Array, blocks: Array, setting: _Setting):
    """((consistency, regulariser), column sums)."""
    views, pairs = student.views.shape[0] + teacher.views.shape[0], len(_pairs(student, teacher))
    if setting.engine is None:
        consistency, columns = _sums(student, teacher, share, blocks, setting)
    else:
        alone = partial(_sums, setting=setting._replace(engine=None))
        consistency, columns = setting.engine.block_sums(alone, student, teacher, share, blocks)
    regulariser = jnp.mean(jax.vmap(lambda sums: _regulariser(sums, views, setting))(columns))
    return (consistency / (pairs * blocks.shape[0]), regulariser), columns


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _block_losses(student: _Side, teacher: _Side, share: Array, blocks: Array, setting: _Setting):
    return _losses(student, teacher, share, blocks, setting)[0]


def _forward(student, teacher, share, blocks, setting):
    # The structure of the residuals tells the backward pass what to differentiate.
    wanted = {name: None for name in ("prototypes", "bias", "sharpness") if getattr(student, name).perturbed}
    student, teacher, share, blocks = jax.tree.map(lambda a: a.value, (student, teacher, share, blocks))
    losses, columns = _losses(student, teacher, share, blocks, setting)
    return losses, (student, teacher, share, blocks, columns, wanted)


def _backward(setting, residuals, cotangents):
    student, teacher, share, blocks, columns, wanted = residuals
    views = student.views.shape[0] + teacher.views.shape[0]
    consistency_bar, regulariser_bar = (
        jnp.zeros(bar.shape, bar.dtype) if isinstance(bar, SymbolicZero) else bar for bar in cotangents
    )
    consistency_bar = consistency_bar / (len(_pairs(student, teacher)) * blocks.shape[0])
    regulariser_bar = regulariser_bar / blocks.shape[0]
    slopes = jax.vmap(lambda sums: regulariser_bar * jax.grad(_regulariser)(sums, views, setting))(columns)
    alone = partial(_bars, names=("views", *wanted), setting=setting._replace(engine=None))
    arguments = (student, teacher, share, blocks, consistency_bar, slopes)
    bars = alone(*arguments) if setting.engine is None else setting.engine.block_bars(alone, *arguments)
    found = {name: bar.astype(getattr(student, name).dtype) for name, bar in bars.items()}
    return _Side(*(found.get(name) for name in _Side._fields)), None, None, None


_block_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def _check(student, teacher, prediction, target, mask, permutation, block) -> None:
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
