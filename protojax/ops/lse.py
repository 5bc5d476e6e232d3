"""The one primitive of the prototype layer: log-sum-exp of logits over prototypes, streamed, with its gradient.

Logits are l_nk = q_n . m_k + c_k (queries [N,D], prototypes [K,D], bias [K]). Temperatures are the caller's: pass
queries / T and bias / T. No array of N x K elements is ever made, forward or backward.

- `lse`: LSE_k l_nk. Its gradient with respect to the bias is the responsibility mass n_k of an E-step, with respect to
  the prototypes the first moments m1_k = sum_n r_nk q_n, with respect to a query the attention output.
- `attend`: (LSE, sum_k softmax_k(l_n) m_k): keys = values = prototypes.
- `soft_cross_entropy`: -sum_k t_nk ln s_nk = LSE(s) - q_s . O_t - t . c with O_t = sum_k t_nk m_k, whose gradient with
  respect to the student query is O_s - O_t.

There is no forward mode (`jax.jvp` raises): JAX would have to transpose a rule that is linear in the tangents for the
backward pass, and transposing the sweep keeps every tile of responsibilities, N x K numbers; a second primitive with
its own transpose would double the sweeps, and nothing in training needs it.

Operands may be bfloat16, float32 or float64; sums, exponentials and logarithms are float32 (float64 when an operand
is), since a bfloat16 LSE costs 2-29% error in the first moments.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from protojax.ops.checks import accumulation_dtype, floating, logit_arguments, product_dtype
from protojax.ops.kernels import column_sweep, plan, row_sweep, streams_rows
from protojax.ops.sweeps import Tiling, attend_backward, book, join, row_block, row_tile_of, split

Array = jax.Array
Side = tuple[Array, Array, Array]  # queries [N,D], prototypes [K,D], bias [K]


def _dense(cotangent: Any) -> Array:
    """A cotangent as an array: JAX hands unused outputs over as symbolic zeros."""
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _weighted(queries: Array, rows: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Rows x weighted by a cotangent g: (queries, g x, g), what the cotangents of prototypes and bias are sums of."""
    vectors, weight = rows[0], rows[1][:, None]
    return queries, vectors.astype(weight.dtype) * weight, weight


# ------------------------------------------------------------------------------------------------------- lse
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _lse(queries: Array, prototypes: Array, bias: Array, options: Tiling) -> Array:
    return row_sweep(queries, prototypes, bias, None, None, options)[0]


def _lse_forward(queries, prototypes, bias, options):
    # The forward sweep of a differentiated call also keeps the attention output: then the query's cotangent is a
    # product of [N,D] arrays and the backward pass sweeps only for those of the prototypes, if anybody asks for them.
    wanted = (queries.perturbed, prototypes.perturbed or bias.perturbed)
    queries, prototypes, bias = queries.value, prototypes.value, bias.value
    values = prototypes if wanted[0] else None
    lse, mean, _ = row_sweep(queries, prototypes, bias, values, None, options)
    columns = (queries, prototypes, bias, lse) if wanted[1] else None
    dtypes = tuple(jnp.zeros((0,), array.dtype) for array in (queries, prototypes, bias))
    return lse, (mean, columns, dtypes)


def _lse_backward(options, residuals, cotangent):
    mean, columns, dtypes = residuals
    lse_bar = _dense(cotangent)
    queries_bar = None if mean is None else (lse_bar[:, None] * mean).astype(dtypes[0].dtype)
    if columns is None:
        return queries_bar, None, None
    queries, prototypes, bias, lse = columns
    first, mass = column_sweep(queries, prototypes, bias, lse, (queries, lse_bar), _weighted, options)
    return queries_bar, first.astype(dtypes[1].dtype), mass[:, 0].astype(dtypes[2].dtype)


_lse.defvjp(_lse_forward, _lse_backward, symbolic_zeros=True)


def lse(
    queries: Array,
    prototypes: Array,
    bias: Array,
    *,
    tile: int = 2048,
    row_tile: int | None = None,
    matmul_dtype: DTypeLike | None = None,
) -> Array:
    """LSE_k(q_n . m_k + c_k), one value a row, streamed over prototype tiles.

    Args:
      queries: [N,D], already divided by the temperature.
      prototypes: [K,D]. bias: [K]; -inf excludes a prototype.
      tile, row_tile: block of logits held at once; K and N are padded to whole tiles and masked.
      matmul_dtype: dtype of the operands of matrix products (bfloat16 on accelerators by policy); None keeps theirs.

    Returns [N], float32 or float64. Gradients: queries get softmax-averaged prototypes, prototypes the first moments,
    bias the responsibility masses. A row that holds NaN gives NaN; a row whose every logit is -inf gives -inf.

    Raises TypeError for integer, boolean or float16 arrays; ValueError for wrong ranks, differing widths and K = 0.
    """
    queries, prototypes, bias = logit_arguments(queries, prototypes, bias)
    return _lse(queries, prototypes, bias, plan(queries, prototypes, bias, tile, row_tile, matmul_dtype))


# ---------------------------------------------------------------------------------------------------- attend
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(queries: Array, prototypes: Array, bias: Array, options: Tiling) -> tuple[Array, Array]:
    lse, mean, _ = row_sweep(queries, prototypes, bias, prototypes, None, options)
    return lse, mean  # type: ignore[return-value]


def _attend_forward(queries, prototypes, bias, options):
    lse, mean = _attend(queries, prototypes, bias, options)
    return (lse, mean), (queries, prototypes, bias, lse, mean)


def _attend_backward(options, residuals, cotangents):
    queries, prototypes, bias, lse, mean = residuals
    lse_bar, mean_bar = cotangents
    lse_bar = lse_bar - jnp.sum(mean_bar * mean, axis=1)
    bars = attend_backward(queries, prototypes, bias, lse, lse_bar, mean_bar, options)
    return tuple(bar.astype(array.dtype) for bar, array in zip(bars, (queries, prototypes, bias), strict=True))


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    queries: Array,
    prototypes: Array,
    bias: Array,
    *,
    tile: int = 2048,
    row_tile: int | None = None,
    matmul_dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """(LSE_k l_nk [N], sum_k softmax_k(l_n) m_k [N,D]): soft assignment to prototypes as attention, keys = values.

    Arguments and errors as in `lse`. Both results are differentiable with respect to all three arrays; the backward
    pass recomputes the logits tile by tile."""
    queries, prototypes, bias = logit_arguments(queries, prototypes, bias)
    return _attend(queries, prototypes, bias, plan(queries, prototypes, bias, tile, row_tile, matmul_dtype))


# ---------------------------------------------------------------------------------------------- expectation
@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _expectation(queries, prototypes, bias, values, weights, options):
    return row_sweep(queries, prototypes, bias, values, weights, options)[1:]


def _expectation_forward(queries, prototypes, bias, values, weights, options):
    wanted = values.perturbed or weights.perturbed
    queries, prototypes, bias = queries.value, prototypes.value, bias.value
    values, weights = values.value, weights.value
    lse, mean, scalar = row_sweep(queries, prototypes, bias, values, weights, options)
    dtypes = (jnp.zeros((0,), values.dtype), jnp.zeros((0,), weights.dtype))
    return (mean, scalar), ((queries, prototypes, bias, lse) if wanted else None, dtypes)


def _expectation_backward(options, residuals, cotangents):
    columns, dtypes = residuals
    if columns is None:
        return None, None, None, None, None
    rows = tuple(_dense(cotangent) for cotangent in cotangents)
    queries, prototypes, bias, lse = columns
    values_bar, weights_bar = column_sweep(queries, prototypes, bias, lse, rows, _unweighted, options)
    return None, None, None, values_bar.astype(dtypes[0].dtype), weights_bar[:, 0].astype(dtypes[1].dtype)


def _unweighted(queries: Array, rows: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    return queries, rows[0], rows[1][:, None]


_expectation.defvjp(_expectation_forward, _expectation_backward, symbolic_zeros=True)


def expectation(
    queries: Array,
    prototypes: Array,
    bias: Array,
    values: Array,
    weights: Array,
    *,
    tile: int = 2048,
    row_tile: int | None = None,
    matmul_dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """(sum_k t_nk values_k [N,E], sum_k t_nk weights_k [N]) with t_n = softmax_k(q_n . m_k + c_k), a teacher's target.

    The logits carry no gradient; `values` [K,E] and `weights` [K] do (sum_n t_nk times the cotangent)."""
    queries, prototypes, bias = logit_arguments(queries, prototypes, bias)
    values, weights = floating("values", values, 2), floating("weights", weights, 1)
    if values.shape[0] != prototypes.shape[0] or weights.shape != bias.shape:
        raise ValueError(
            f"values and weights must have one row a prototype ({prototypes.shape[0]}), "
            f"got {values.shape} and {weights.shape}"
        )
    return _expectation(
        queries, prototypes, bias, values, weights, plan(queries, prototypes, bias, tile, row_tile, matmul_dtype)
    )


# ---------------------------------------------------------------------------------------- soft cross-entropy
def _both_rows(student: Side, teacher: Side, options: Tiling, difference: bool) -> tuple[Array, Array, Array, Array]:
    """(loss [N], O_s - O_t [N,D] or [N,0], LSE_s [N], LSE_t [N]); student, teacher = (queries, prototypes, bias)."""
    total = accumulation_dtype(*student, *teacher)
    keys = student[1]

    def combine(queries, student_sweep, teacher_sweep):
        loss = student_sweep[0] - jnp.sum(queries.astype(total) * teacher_sweep[1], axis=1) - teacher_sweep[2]
        gap = student_sweep[1] - teacher_sweep[1] if difference else jnp.zeros((queries.shape[0], 0), total)
        return loss, gap, student_sweep[0], teacher_sweep[0]

    if not streams_rows(options):
        student_sweep = row_sweep(*student, keys if difference else None, None, options)
        return combine(student[0], student_sweep, row_sweep(*teacher, keys, student[2], options))
    # Chunk by chunk through both sweeps: one [N,D] array is kept for the gradient, not two.
    operands = [product_dtype(options.matmul_dtype, *side[:2]) for side in (student, teacher)]
    student_tiles = book(keys, student[2], keys if difference else None, None, options.tile, operands[0], total)
    teacher_tiles = book(*teacher[1:], keys, student[2], options.tile, operands[1], total)

    def chunk(queries):
        student_sweep = row_block(queries[0].astype(operands[0]), student_tiles, operands[0], total)
        return combine(
            queries[0], student_sweep, row_block(queries[1].astype(operands[1]), teacher_tiles, operands[1], total)
        )

    length = student[0].shape[0]
    size = row_tile_of(options, length)
    results = lax.map(chunk, (split(student[0], size), split(teacher[0], size)))
    loss, gap, student_lse, teacher_lse = (join(part, length) for part in results)
    return loss, gap, student_lse, teacher_lse


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy(student: Side, teacher: Side, options: Tiling) -> Array:
    return _both_rows(student, teacher, options, difference=False)[0]


def _cross_entropy_forward(student, teacher, options):
    by_query, *by_codebook = (array.perturbed for array in student)
    student, teacher = (tuple(array.value for array in side) for side in (student, teacher))
    loss, gap, student_lse, teacher_lse = _both_rows(student, teacher, options, difference=by_query)
    columns = (student, teacher, student_lse, teacher_lse) if any(by_codebook) else None
    dtypes = tuple(jnp.zeros((0,), array.dtype) for array in student)
    return loss, (gap if by_query else None, columns, dtypes)


def _cross_entropy_backward(options, residuals, loss_bar):
    gap, columns, dtypes = residuals
    bars: list[Array | None] = [None if gap is None else loss_bar[:, None] * gap, None, None]
    if columns is not None:
        student, teacher, student_lse, teacher_lse = columns
        rows = (student[0], loss_bar)
        ours, theirs = (
            column_sweep(side[0], side[1], side[2], side_lse, rows, _weighted, options)
            for side, side_lse in ((student, student_lse), (teacher, teacher_lse))
        )
        bars[1:] = [ours[0] - theirs[0], (ours[1] - theirs[1])[:, 0]]
    bars = [None if bar is None else bar.astype(like.dtype) for bar, like in zip(bars, dtypes, strict=True)]
    return tuple(bars), (None, None, None)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


def soft_cross_entropy(
    student_queries: Array,
    student_prototypes: Array,
    student_bias: Array,
    teacher_queries: Array,
    teacher_prototypes: Array,
    teacher_bias: Array,
    *,
    tile: int = 2048,
    row_tile: int | None = None,
    matmul_dtype: DTypeLike | None = None,
) -> Array:
    """-sum_k t_nk ln s_nk [N] with t, s the softmax of teacher and student logits over the same K prototypes.

    Computed as LSE_s - q_s . O_t - t . c with O_t = sum_k t_nk m_k the *student* prototypes under the teacher's
    assignment and t . c the student bias under it: two sweeps, no N x K array. The gradient reaches the student
    queries (O_s - O_t), prototypes and bias where the caller differentiates them; the teacher side carries none.

    A student bias of -inf where the teacher has mass gives +inf, as the definition does.

    Raises ValueError when the two sides differ in rows or in prototypes; further errors as in `lse`."""
    student = logit_arguments(student_queries, student_prototypes, student_bias, "student_")
    teacher = logit_arguments(teacher_queries, teacher_prototypes, teacher_bias, "teacher_")
    if student[1].shape[0] != teacher[1].shape[0] or student[0].shape[0] != teacher[0].shape[0]:
        raise ValueError(
            "student and teacher must score the same rows against the same number of prototypes, got queries "
            f"{student[0].shape} and {teacher[0].shape}, prototypes {student[1].shape} and {teacher[1].shape}"
        )
    return _cross_entropy(student, teacher, plan(*student, tile, row_tile, matmul_dtype))


def soft_cross_entropy_pairs(
    student: tuple[Array, Array, Array],
    teacher: tuple[Array, Array, Array],
    *,
    tile: int = 2048,
    row_tile: int | None = None,
    matmul_dtype: DTypeLike | None = None,
) -> Array:
    """`soft_cross_entropy` of every student view against every teacher view: [S,T,B] from S + T sweeps, not S x T.

    student = (queries [S,B,D], prototypes [K,D], bias [K]), teacher = (queries [T,B,P], prototypes [K,P], bias [K]).
    A pair of views costs B dot products of width D. Gradients as in `soft_cross_entropy`."""
    options: dict[str, Any] = {"tile": tile, "row_tile": row_tile, "matmul_dtype": matmul_dtype}
    floating("student queries", student[0], 3)
    floating("teacher queries", teacher[0], 3)
    views, teachers, rows = student[0].shape[0], teacher[0].shape[0], student[0].shape[1]
    if teacher[0].shape[1] != rows or teacher[1].shape[0] != student[1].shape[0]:
        raise ValueError(
            f"student and teacher must agree on B and K, got queries {student[0].shape} and {teacher[0].shape}, "
            f"prototypes {student[1].shape} and {teacher[1].shape}"
        )
    normaliser = lse(student[0].reshape(views * rows, -1), student[1], student[2], **options)
    assigned = teacher[0].reshape(teachers * rows, -1)
    mean, offset = expectation(assigned, teacher[1], teacher[2], student[1], student[2], **options)
    total = accumulation_dtype(*student, *teacher)
    mean = mean.astype(total).reshape(teachers, rows, -1)
    agreement = jnp.einsum("sbd,tbd->stb", student[0].astype(total), mean, precision=lax.Precision.HIGHEST)
    offset = offset.astype(total).reshape(1, teachers, rows)
    return normaliser.astype(total).reshape(views, 1, rows) - agreement - offset
