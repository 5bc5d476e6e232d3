"""The sweeps under every prototype operation, as portable `lax.scan` programs.

With logits l_nk = q_n . m_k + c_k:

- `row_sweep`: for each row, LSE_k l_nk and averages of values under softmax_k(l_n), with online rescaling;
- `column_sweep`: for each prototype, sums over rows of exp(l_nk - lse_n) x_n. It needs the finished lse of the rows
  (rescaling a half-finished normaliser is not exact), owns its prototypes and so adds without races;
- `complete_sweep`: both at once on chunks of complete rows, where a [K, row_tile] block fits.

The first two hold at most one [row_tile, tile] block of logits. Rows and prototypes are padded to whole tiles (never is
a tile shrunk to a divisor): padded prototypes get bias -inf, padded rows weigh nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from protojax.ops.checks import accumulation_dtype, product_dtype

Array = jax.Array
# Turns (queries, rows) of one chunk into (queries [R,P], vectors [R,E], scalars [R,F]) to be summed under the softmax:
# weighting and masking happen a chunk at a time, so that no weighted copy of all rows exists.
Prepare = Callable[[Array, Any], tuple[Array, Array, Array]]


class Tiling(NamedTuple):
    """Static options of a sweep. tile: prototypes a block; row_tile: rows a block; matmul_dtype: dtype of the operands
    of matrix products (accumulation is always float32 or float64), None for that of the arguments; path and engine:
    which program runs it and who splits it over devices (see `kernels`); keys_split: the keys, not the rows, are many
    and spread over devices."""

    tile: int = 2048
    row_tile: int | None = None
    matmul_dtype: Any = None
    path: str = "scan"
    engine: Any = None
    keys_split: bool = False


def row_tile_of(options: Tiling, rows: int) -> int:
    """Rows a chunk: at most `rows`, at least 1."""
    # A CPU wants the block of logits in its cache; an accelerator wants few, large products.
    default = 1024 if jax.default_backend() == "cpu" else 4096
    return max(1, min(default if options.row_tile is None else options.row_tile, rows))


def pad_to_multiples(array: Array, sizes: tuple[int | None, ...], fill: float = 0.0) -> Array:
    """`array` with each axis lengthened to the next multiple of its size (None: as it is), by `fill`."""
    widths = [(0, 0 if size is None else -length % size) for length, size in zip(array.shape, sizes, strict=True)]
    return jnp.pad(array, widths, constant_values=fill) if any(after for _, after in widths) else array


def split(array: Array, size: int, fill: float = 0.0) -> Array:
    """[L, ...] -> [ceil(L / size), size, ...], padded with `fill`."""
    array = pad_to_multiples(array, (size, *[None] * (array.ndim - 1)), fill)
    return array.reshape(array.shape[0] // size, size, *array.shape[1:])


def join(blocks: Array, length: int) -> Array:
    """Inverse of `split`: [T, size, ...] -> [length, ...]."""
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], *blocks.shape[2:])[:length]


def dot(left: Array, right: Array, contract: tuple[int, int], operand: Any, accumulate: Any) -> Array:
    """Matrix product over axes `contract`, operands in `operand`, accumulated in `accumulate`.

    Full-precision operands ask for the highest precision: the default is TF32 on GPUs and bfloat16 on TPUs, which puts
    several percent of error into the first moments."""
    precision = lax.Precision.DEFAULT if operand == jnp.bfloat16 else lax.Precision.HIGHEST
    return lax.dot_general(
        left.astype(operand),
        right.astype(operand),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.dtype(accumulate),
    )


def finite_or_zero(lse: Array) -> Array:
    """-inf replaced by 0: rows whose every logit is -inf have no distribution, and exp(-inf - 0) = 0 is not NaN."""
    return jnp.where(lse == -jnp.inf, jnp.zeros((), lse.dtype), lse)


# ------------------------------------------------------------------------------------------------- row sweep
class Book(NamedTuple):
    """Prototypes cut into tiles: keys [T,tile,D], bias [T,tile], values [T,tile,E] and weights [T,tile] or None.
    `attention`: values are the keys (one copy, not two)."""

    keys: Array
    bias: Array
    values: Array | None
    weights: Array | None
    attention: bool


def book(
    prototypes: Array, bias: Array, values: Array | None, weights: Array | None, tile: int, operand: Any, total: Any
) -> Book:
    """Tiles of one codebook, in the dtypes of the sweep; `values is prototypes` means attention."""
    tile, attention = min(tile, prototypes.shape[0]), values is prototypes
    return Book(
        split(prototypes.astype(operand), tile),
        split(bias.astype(total), tile, -jnp.inf),
        None if values is None or attention else split(values.astype(operand), tile),
        None if weights is None else split(weights.astype(total), tile),
        attention,
    )


def row_block(rows: Array, tiles: Book, operand: Any, total: Any) -> tuple[Array, Array, Array]:
    """(lse [R], mean [R,E], scalar [R]) of one chunk of rows: the scan over prototype tiles with online rescaling."""
    use_values = tiles.attention or tiles.values is not None
    width = (tiles.keys if tiles.values is None else tiles.values).shape[2] if use_values else 0

    def body(carry, part):
        top, mass, mean, scalar = carry
        keys, bias, values, weights = part
        logits = dot(rows, keys, (1, 1), operand, total) + bias[None, :]
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        shift = finite_or_zero(new_top)
        rescale = jnp.exp(top - shift)
        chance = jnp.exp(logits - shift[:, None])
        mass = mass * rescale + jnp.sum(chance, axis=1)
        if use_values:
            averaged = keys if tiles.attention else values
            mean = mean * rescale[:, None] + dot(chance, averaged, (1, 0), operand, total)
        if weights is not None:
            # An excluded prototype (weight -inf) without mass contributes 0, not 0 * -inf.
            share = jnp.where(chance == 0.0, jnp.zeros((), total), chance * weights[None, :])
            scalar = scalar * rescale + jnp.sum(share, axis=1)
        return (new_top, mass, mean, scalar), None

    size = rows.shape[0]
    zero = jnp.zeros((size,), total)
    start = (jnp.full((size,), -jnp.inf, total), zero, jnp.zeros((size, width), total), zero)
    (top, mass, mean, scalar), _ = lax.scan(body, start, tuple(tiles[:4]))
    share = 1.0 / jnp.where(mass == 0.0, jnp.ones((), total), mass)
    return finite_or_zero(top) + jnp.log(mass), mean * share[:, None], scalar * share


def row_sweep(
    queries: Array, prototypes: Array, bias: Array, values: Array | None, weights: Array | None, options: Tiling
) -> tuple[Array, Array | None, Array | None]:
    """(lse [N], sum_k r_nk values_k [N,E], sum_k r_nk weights_k [N]) with r_n = softmax_k(q_n . m_k + c_k).

    `values` [K,E] and `weights` [K] may be None (then the result is None); pass `prototypes` itself as values for
    attention. Rows without any finite logit give -inf and zeros. Results have the accumulation dtype."""
    arrays = [queries, prototypes, bias] + [a for a in (values, weights) if a is not None]
    total, operand = accumulation_dtype(*arrays), product_dtype(options.matmul_dtype, queries, prototypes)
    rows = queries.shape[0]
    tiles = book(prototypes, bias, values, weights, options.tile, operand, total)
    chunks = split(queries.astype(operand), row_tile_of(options, rows))
    lse, mean, scalar = lax.map(lambda chunk: row_block(chunk, tiles, operand, total), chunks)
    return (
        join(lse, rows),
        None if values is None else join(mean, rows),
        None if weights is None else join(scalar, rows),
    )


# ---------------------------------------------------------------------------------------------- column sweep
def _products(share: Array, vectors: Array, scalars: Array, kind: Any, total: Any) -> tuple[Array, Array]:
    """share [K,R] @ vectors [R,E], and @ scalars [R,F]."""
    # Matrix-vector products a column: as one product of [tile, R] x [R, 1 or 2] they would cost half of a wide one.
    columns = [
        lax.dot_general(share, scalars[:, i], (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
        for i in range(scalars.shape[1])
    ]
    return dot(share, vectors, (1, 0), kind, total), jnp.stack(columns, axis=1)


def _prepared_widths(prepare: Prepare, queries: Array, rows: Any) -> tuple[int, int, Array]:
    """(E, F, an empty array of the vectors' dtype): what `prepare` makes of these rows, without computing it."""
    _, vectors, scalars = jax.eval_shape(prepare, queries, rows)
    return vectors.shape[1], scalars.shape[1], jnp.zeros((0,), vectors.dtype)


def column_sweep(
    queries: Array, prototypes: Array, bias: Array, lse: Array, rows: Any, prepare: Prepare, options: Tiling
) -> tuple[Array, Array]:
    """(sum_n r_nk vectors_n [K,E], sum_n r_nk scalars_n [K,F]) with r_nk = exp(q_n . m_k + c_k - lse_n).

    `rows` is a tree of arrays [N, ...]; `prepare` makes the vectors and scalars of a chunk from it, and must give zeros
    for zeros (that is what padding holds). Vectors enter products in their own precision unless the policy asks for
    less, scalars always in the accumulation dtype. Rows with lse +inf count nothing."""
    width, number, sample = _prepared_widths(prepare, queries, rows)
    total = accumulation_dtype(queries, prototypes, bias, lse, sample)
    operand = product_dtype(options.matmul_dtype, queries, prototypes)
    length, count = queries.shape[0], prototypes.shape[0]
    tile, row_tile = min(options.tile, count), row_tile_of(options, length)
    kind = product_dtype(options.matmul_dtype, sample)
    # Padded rows take +inf: exp(c_k - 0) may overflow, and inf times a weight of 0 is NaN.
    padded_lse = split(finite_or_zero(lse.astype(total)), row_tile, jnp.inf)
    chunks = (split(queries, row_tile), padded_lse, jax.tree.map(lambda a: split(a, row_tile), rows))

    def block(part):
        keys, tile_bias = part

        def body(carry, chunk):
            chunk_queries, vectors, scalars = prepare(chunk[0], chunk[2])
            # Prototype-major, [tile, row_tile]: both products then run along contiguous axes.
            logits = dot(keys, chunk_queries, (1, 1), operand, total) + tile_bias[:, None]
            share = jnp.exp(logits - chunk[1][None, :])
            return jax.tree.map(jnp.add, carry, _products(share, vectors, scalars.astype(total), kind, total)), None

        start = (jnp.zeros((tile, width), total), jnp.zeros((tile, number), total))
        return lax.scan(body, start, chunks)[0]

    tiles = split(prototypes.astype(operand), tile), split(bias.astype(total), tile, -jnp.inf)
    first, sums = lax.map(block, tiles)
    return join(first, count), join(sums, count)


def complete_sweep(
    queries: Array, prototypes: Array, bias: Array, rows: Any, prepare: Prepare, options: Tiling, parts: tuple[int, ...]
) -> tuple[Array, tuple[Array, ...], Array]:
    """(lse [N], sum_n r_nk vectors_n [K,E], sum_n r_nk scalars_n [K,F]): both sweeps in one, on complete rows.

    Holds [K, row_tile] logits, so that a row's normaliser is finished before its responsibilities are used: two matrix
    products instead of three. It pays on a CPU, where the sums [K,E] stay in cache between chunks. `parts`: the widths,
    E in all, of the arrays that the second result comes in: cutting it afterwards would be a copy of [K,E]."""
    _, number, sample = _prepared_widths(prepare, queries, rows)
    total = accumulation_dtype(queries, prototypes, bias, sample)
    operand = product_dtype(options.matmul_dtype, queries, prototypes)
    length, count = queries.shape[0], prototypes.shape[0]
    kind = product_dtype(options.matmul_dtype, sample)
    # Logits of 2 MB of float32; with few rows a chunk the sums' own traffic would cost more than the saved product, so
    # for many prototypes up to 256 rows while 13 MB hold their logits (keys and sums share a cache with them), and
    # never below 128. Chunks of equal length: little padding. Where their length is ours to choose, whole vector
    # registers: loops along 205 numbers instead of 208 took a tenth of the whole sweep longer.
    fewest = max(128, min(256, 13 * 2**18 // count))
    wanted = options.row_tile if options.row_tile is not None else max(fewest, 2**19 // count)
    chunk_number = max(1, -(-length // wanted))
    row_tile = max(1, -(-length // chunk_number))
    if options.row_tile is None and chunk_number > 1:
        row_tile = -(-row_tile // 16) * 16
    keys, tall_bias = prototypes.astype(operand), bias.astype(total)[:, None]
    largest = jnp.sqrt(jnp.max(jnp.sum(keys.astype(total) ** 2, axis=1)))
    highest = jnp.max(tall_bias)
    cuts = [sum(parts[:i]) for i in range(1, len(parts))]

    def body(carry, chunk):
        chunk_queries, vectors, scalars = prepare(*chunk)
        products = dot(keys, chunk_queries, (1, 1), operand, total)
        # Any shift near the largest logit will do. By Cauchy-Schwarz that one lies within `reach` of `highest`: where
        # this is close enough for float32's exponents (e^60 x K rows fit, and terms of e^-87 and more are kept), the
        # pass over the logits that looks for the maximum is saved.
        reach = largest * jnp.sqrt(jnp.max(jnp.sum(chunk_queries.astype(total) ** 2, axis=1)))
        top = lax.cond(
            (reach < 60.0) & jnp.isfinite(highest),
            lambda _: jnp.full((row_tile,), highest),
            lambda table: finite_or_zero(jnp.max(table + tall_bias, axis=0)),
            products,
        )
        share = jnp.exp(products + tall_bias - top[None, :])
        mass = jnp.sum(share, axis=0)
        inverse = (1.0 / jnp.where(mass == 0.0, jnp.ones((), total), mass))[:, None]
        # Rows are normalised on the [row_tile, E] side, which is smaller than [K, row_tile].
        vectors, scalars = vectors.astype(total) * inverse, scalars.astype(total) * inverse
        found, columns = _products(share, vectors, scalars, kind, total)
        pieces = *jnp.split(found, cuts, axis=1), columns
        return [sums + piece for sums, piece in zip(carry, pieces, strict=True)], top + jnp.log(mass)

    chunks = (split(queries, row_tile), jax.tree.map(lambda a: split(a, row_tile), rows))
    start = [jnp.zeros((count, size), total) for size in (*parts, number)]
    (*first, sums), lse = lax.scan(body, start, chunks)
    return join(lse, length), tuple(first), sums


# ------------------------------------------------------------------------------------------ attend's backward
def attend_backward(
    queries: Array, prototypes: Array, bias: Array, lse: Array, lse_bar: Array, output_bar: Array, options: Tiling
) -> tuple[Array, Array, Array]:
    """Cotangents (queries [N,D], prototypes [K,D], bias [K]) of `attend`, from those of lse [N] and output [N,D].

    With G_n = output_bar_n and delta_n = G_n . output_n folded into lse_bar, the cotangent of a logit is
    r_nk (lse_bar_n + G_n . m_k); the prototypes also gain r_nk G_n as values."""
    total = accumulation_dtype(queries, prototypes, bias)
    operand = product_dtype(options.matmul_dtype, queries, prototypes)
    rows, count = queries.shape[0], prototypes.shape[0]
    tile, row_tile = min(options.tile, count), row_tile_of(options, rows)
    chunks = {
        "q": split(queries.astype(operand), row_tile),
        "l": split(finite_or_zero(lse), row_tile, jnp.inf),
        "a": split(lse_bar.astype(total), row_tile),
        "g": split(output_bar.astype(total), row_tile),
    }
    product = partial(dot, operand=operand, accumulate=total)

    def block(query_bars, part):
        tile_prototypes, tile_bias = part

        def body(carry, chunk):
            prototypes_bar, bias_bar = carry
            values, query_bar = chunk
            logits = product(values["q"], tile_prototypes, (1, 1)) + tile_bias[None, :]
            share = jnp.exp(logits - values["l"][:, None])
            logit_bar = share * (values["a"][:, None] + product(values["g"], tile_prototypes, (1, 1)))
            from_keys = product(logit_bar, values["q"], (0, 0))
            from_values = product(share, values["g"], (0, 0))
            carry = (prototypes_bar + from_keys + from_values, bias_bar + jnp.sum(logit_bar, axis=0))
            return carry, query_bar + product(logit_bar, tile_prototypes, (1, 0))

        start = (jnp.zeros((tile, prototypes.shape[1]), total), jnp.zeros((tile,), total))
        tile_bars, query_bars = lax.scan(body, start, (chunks, query_bars))
        return query_bars, tile_bars

    tiles = split(prototypes.astype(operand), tile), split(bias.astype(total), tile, -jnp.inf)
    query_bars, (prototypes_bar, bias_bar) = lax.scan(block, jnp.zeros(chunks["q"].shape, total), tiles)
    return join(query_bars, rows), join(prototypes_bar, count), join(bias_bar, count)
