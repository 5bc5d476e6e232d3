"""Symmetric contrastive losses of nested embeddings over the global batch, streamed: no B x B array.

Letters: B pairs, D width, P prefixes d_1 < ... < d_P <= D. With x^d = unit(x[:d]) the logits of prefix d are
l^d_ij = (image^d_i . text^d_j) / T. Raw products of a longer prefix are those of the shorter one plus a block, so that
all P prefixes cost one D-wide product. Rows are cut into groups (one a device) and these into tiles; a tile of rows
meets all columns, and only row and column normalisers [P,B] are kept. The backward pass rebuilds the tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from protojax.ops.checks import accumulation_dtype, floating, positive, product_dtype
from protojax.ops.kernels import current_engine, replicated

Array = jax.Array

ROOM = 2**24  # elements of a tile's tables, all prefixes together: 64 MiB each in float32


class _Setting(NamedTuple):
    """Static: ascending widths, groups of rows, rows of a group in a tile, dtypes of products and of the rest."""

    widths: tuple[int, ...]
    groups: int
    rows: int
    operand: str
    total: str


class ContrastiveLosses(NamedTuple):
    """losses [P], in the order of `widths`: (mean row + mean column cross-entropy) / 2, in nats. chance: scalar, the
    loss of embeddings that do not depend on their input, mean_i ln(1 + negatives of i). pairs: how many counted."""

    losses: Array
    chance: Array
    pairs: Array


def check_widths(widths: Sequence[int], dim: int) -> tuple[int, ...]:
    """Ascending prefix widths. Raises ValueError for one outside 2..dim, or one given twice."""
    given = tuple(int(w) for w in widths)
    bad = [w for w in given if not 2 <= w <= dim]
    if not given or bad or len(set(given)) != len(given):
        what = f"{bad} lie outside 2..{dim}" if bad else "one is given twice" if given else "none is given"
        raise ValueError(f"prefix widths must be distinct numbers in 2..D = {dim}, got {list(given)}: {what}")
    return tuple(sorted(given))


def nested_contrastive(
    image: Array,
    text: Array,
    *,
    widths: Sequence[int],
    sharpness: Array | float,
    caption_id: Array | None = None,
    mask: Array | None = None,
    tile: int | None = None,
    matmul_dtype: DTypeLike | None = None,
) -> ContrastiveLosses:
    """nce_d = (1 / 2n) sum_i [LSE_j l^d_ij - l^d_ii] + [LSE_j l^d_ji - l^d_ii] for every prefix width d (InfoNCE,
    Oord et al. 2018, both directions as in CLIP, Radford et al. 2021), each prefix renormalised.

    Args:
      image, text: [B,D], any length (rows are normalised here; a zero row stays zero). widths: distinct, in 2..D.
      sharpness: 1 / T, scalar; differentiable.
      caption_id: [B] int; pairs i != j of equal id are no negatives of each other and leave both denominators.
      mask: [B] bool; rows of False count nothing and are nobody's negative (they may hold anything, NaN included).
      tile: rows that meet all columns at once; default: all of them for small B, else as many as keep P x tile x B
        below 2^24, so that memory grows with B and never with B x B.
      matmul_dtype: dtype of product operands (bfloat16 on accelerators); sums and everything else are float32
        (float64 for float64 inputs).

    Text is gathered once, at full width, whatever the number of prefixes. Raises ValueError for shapes that disagree,
    widths out of range and fewer than 2 pairs (the loss of one pair is 0 by definition); TypeError for other dtypes.
    """
    image, text = floating("image", image, 2), floating("text", text, 2)
    pairs, dim = image.shape
    if image.shape != text.shape:
        raise ValueError(f"image and text must be [B,D] of the same pairs, got {image.shape} and {text.shape}")
    if pairs < 2:
        raise ValueError("a batch of one pair has no negatives: the contrastive loss is 0 by definition; use B >= 2")
    widths = check_widths(widths, dim)
    valid = jnp.ones((pairs,), bool) if mask is None else mask.astype(bool)
    ids = jnp.arange(pairs, dtype=jnp.int32) if caption_id is None else caption_id.astype(jnp.int32)
    if ids.shape != (pairs,) or valid.shape != (pairs,):
        raise ValueError(f"caption_id and mask must be [{pairs}], got {ids.shape} and {valid.shape}")
    total = accumulation_dtype(image, text)
    setting = _setting(widths, pairs, tile, product_dtype(matmul_dtype, image, text), total)
    x, y = (jnp.where(valid[:, None], a, jnp.zeros((), a.dtype)).astype(total) for a in (image, text))
    y = replicated(y)
    left, right = inverse_norms(x, widths), inverse_norms(y, widths)
    left = left * jnp.asarray(sharpness, total)
    rows, columns = _normalisers(x, y, left, right, ids, valid, setting)
    matching = _prefix_sums(x * y, widths) * left * right
    weight = valid.astype(total)
    count = jnp.sum(weight)
    share = weight / jnp.maximum(count, 1.0)
    losses = jnp.sum((0.5 * (rows + columns) - matching) * share[None, :], axis=1)
    return ContrastiveLosses(losses, jnp.sum(share * jnp.log(1.0 + negatives(ids, valid).astype(total))), count)


def inverse_norms(x: Array, widths: Sequence[int]) -> Array:
    """1 / ||x[:, :d]|| [P,B] for ascending widths d; 0 for a zero prefix, whose gradient is 0 too.

    Squares are taken of x divided by its largest entry, so that they neither overflow nor underflow."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=1))
    largest = jnp.where(largest > 0.0, largest, jnp.ones_like(largest))
    squares = _prefix_sums(jnp.square(x / largest[:, None]), widths)
    empty = squares == 0.0
    inverse = lax.rsqrt(jnp.where(empty, jnp.ones_like(squares), squares))
    return jnp.where(empty, jnp.zeros_like(inverse), inverse) / largest[None, :]


def negatives(ids: Array, valid: Array) -> Array:
    """Number of valid j with another id than i, [B] int32, by sorting (no B x B comparison)."""
    last = jnp.iinfo(ids.dtype).max
    own = jnp.where(valid, ids, last)
    ordered, used = jnp.sort(own), jnp.sum(valid, dtype=jnp.int32)
    same = (jnp.searchsorted(ordered, own, side="right") - jnp.searchsorted(ordered, own, side="left")).astype(
        jnp.int32
    )
    # An id that happens to be the largest number shares its place with the padding: take that out again.
    padding = jnp.where(own == last, ids.shape[0] - used, 0)
    return jnp.where(valid, used - (same - padding), 0)


def _setting(widths: tuple[int, ...], pairs: int, tile: int | None, operand: Any, total: Any) -> _Setting:
    engine = current_engine()
    groups = jax.device_count() if engine is None else engine.devices
    groups = groups if pairs % groups == 0 else 1
    tile = max(8, ROOM // (len(widths) * pairs)) if tile is None else positive("tile", tile)
    return _Setting(widths, groups, max(1, min(tile, pairs) // groups), jnp.dtype(operand).name, jnp.dtype(total).name)


def _prefix_sums(values: Array, widths: Sequence[int]) -> Array:
    """sum_{c < d} values[:, c] [P,B] for ascending widths d."""
    starts = (0, *widths[:-1])
    return jnp.cumsum(jnp.stack([jnp.sum(values[:, a:b], axis=1) for a, b in zip(starts, widths, strict=True)]), axis=0)


# ------------------------------------------------------------------------------------------------ tiles of rows
class _Rows(NamedTuple):
    """What a tile needs of its rows; leading axes [G,R] (and [G,R,D], [P,G,R])."""

    vectors: Array
    scale: Array
    ids: Array
    valid: Array
    position: Array


def _grouped(x: Array, left: Array, ids: Array, valid: Array, setting: _Setting) -> tuple[_Rows, int]:
    """Rows by group [G, B / G up to whole tiles, ...] and the number of tiles. Row b of group g is g B / G + b, so that
    a batch that is split over devices stays where it is."""
    pairs, groups = x.shape[0], setting.groups
    own = pairs // groups
    tiles = -(-own // setting.rows)
    more = tiles * setting.rows - own

    def fold(array: Array, axis: int, fill: Any) -> Array:
        array = array.reshape(*array.shape[:axis], groups, own, *array.shape[axis + 1 :])
        widths = [(0, 0)] * array.ndim
        widths[axis + 1] = (0, more)
        return jnp.pad(array, widths, constant_values=fill)

    position = jnp.arange(pairs, dtype=jnp.int32)
    return _Rows(fold(x, 0, 0), fold(left, 1, 0), fold(ids, 0, 0), fold(valid, 0, False), fold(position, 0, -1)), tiles


def _slice(rows: _Rows, index: Array, size: int) -> _Rows:
    cut = lambda array, axis: lax.dynamic_slice_in_dim(array, index * size, size, axis)  # noqa: E731
    return _Rows(cut(rows.vectors, 1), cut(rows.scale, 2), *(cut(a, 1) for a in rows[2:]))


def _product(spec: str, a: Array, b: Array, setting: _Setting) -> Array:
    operand, total = jnp.dtype(setting.operand), jnp.dtype(setting.total)
    precision = lax.Precision.DEFAULT if operand == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum(spec, a.astype(operand), b.astype(operand), precision=precision, preferred_element_type=total)


def _tile_logits(tile: _Rows, y: Array, right: Array, ids: Array, valid: Array, setting: _Setting):
    """Yields (raw products [G,R,B], logits [G,R,B] with -inf where a pair does not count) of each prefix, ascending."""
    own = tile.position[:, :, None] == jnp.arange(y.shape[0], dtype=jnp.int32)[None, None, :]
    apart = (tile.ids[:, :, None] != ids[None, None, :]) & tile.valid[:, :, None] & valid[None, None, :]
    counted, start, raw = own | apart, 0, None
    for p, width in enumerate(setting.widths):
        block = _product("grd,bd->grb", tile.vectors[:, :, start:width], y[:, start:width], setting)
        raw, start = block if raw is None else raw + block, width
        yield raw, jnp.where(counted, raw * tile.scale[p][:, :, None] * right[p][None, None, :], -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _normalisers(
    x: Array, y: Array, left: Array, right: Array, ids: Array, valid: Array, setting: _Setting
) -> tuple[Array, Array]:
    """(LSE over columns [P,B], LSE over rows [P,B]) of logits left_i right_j x_i . y_j, streamed over tiles of rows."""
    rows, tiles = _grouped(x, left, ids, valid, setting)
    total, count = jnp.dtype(setting.total), len(setting.widths)

    def one(carry, index):
        tile, normalisers, top, mass = _slice(rows, index, setting.rows), [], [], []
        for p, (_, logits) in enumerate(_tile_logits(tile, y, right, ids, valid, setting)):
            # Every row holds its own pair, so only the padding of a tile has no finite logit.
            peak = jnp.max(logits, axis=2, keepdims=True)
            safe = jnp.where(jnp.isfinite(peak), peak, 0.0)
            normalisers.append(safe[:, :, 0] + jnp.log(jnp.sum(jnp.exp(logits - safe), axis=2)))
            best = jnp.maximum(carry[0][p], jnp.max(logits, axis=1))
            shift = jnp.where(jnp.isfinite(best), best, 0.0)
            old = carry[1][p] * jnp.exp(carry[0][p] - shift)
            top.append(best)
            mass.append(old + jnp.sum(jnp.exp(logits - shift[:, None, :]), axis=1))
        return (jnp.stack(top), jnp.stack(mass)), jnp.stack(normalisers)

    shape = (count, setting.groups, y.shape[0])
    start = (jnp.full(shape, -jnp.inf, total), jnp.zeros(shape, total))
    (top, mass), found = lax.scan(one, start, jnp.arange(tiles))
    return _joined(found, x.shape[0], setting), jax.nn.logsumexp(top + jnp.log(mass), axis=1)


def _joined(found: Array, pairs: int, setting: _Setting) -> Array:
    """Tiles [T,P,G,R] -> [P,B]."""
    ordered = jnp.moveaxis(found, 0, 2)  # [P,G,T,R]
    count, groups = ordered.shape[:2]
    return ordered.reshape(count, groups, -1)[:, :, : pairs // groups].reshape(count, pairs)


def _forward(x, y, left, right, ids, valid, setting):
    found = _normalisers(x, y, left, right, ids, valid, setting)
    return found, (x, y, left, right, ids, valid, *found)


def _backward(setting, residuals, cotangents):
    x, y, left, right, ids, valid, row_lse, column_lse = residuals
    rows, tiles = _grouped(x, left, ids, valid, setting)
    total, size = jnp.dtype(setting.total), setting.rows
    by_row = [_grouped(x, a, ids, valid, setting)[0].scale for a in (cotangents[0], row_lse)]
    starts = (0, *setting.widths[:-1])

    def one(carry, index):
        tile = _slice(rows, index, size)
        bar, lse = (lax.dynamic_slice_in_dim(a, index * size, size, 2) for a in by_row)
        slopes, left_bar, right_bar = [], [], []
        for p, (raw, logits) in enumerate(_tile_logits(tile, y, right, ids, valid, setting)):
            row = bar[p][:, :, None] * jnp.exp(logits - lse[p][:, :, None])
            column = cotangents[1][p][None, None, :] * jnp.exp(logits - column_lse[p][None, None, :])
            slope = row + column
            left_bar.append(jnp.sum(slope * raw * right[p][None, None, :], axis=2))
            right_bar.append(jnp.sum(slope * raw * tile.scale[p][:, :, None], axis=1))
            slopes.append(slope * tile.scale[p][:, :, None] * right[p][None, None, :])
        # A block of columns belongs to its own prefix and to every longer one.
        x_bar, y_bar, running = [], [], None
        for slope, a, b in zip(reversed(slopes), reversed(starts), reversed(setting.widths), strict=True):
            running = slope if running is None else running + slope
            x_bar.append(_product("grb,bd->grd", running, y[:, a:b], setting))
            y_bar.append(_product("grb,grd->gbd", running, tile.vectors[:, :, a:b], setting))
        whole = [jnp.concatenate(parts[::-1], axis=2) for parts in (x_bar, y_bar)]
        return (carry[0] + whole[1], carry[1] + jnp.stack(right_bar)), (whole[0], jnp.stack(left_bar))

    used = setting.widths[-1]
    start = (
        jnp.zeros((setting.groups, y.shape[0], used), total),
        jnp.zeros((len(setting.widths), setting.groups, y.shape[0]), total),
    )
    (y_bar, right_bar), (x_bar, left_bar) = lax.scan(one, start, jnp.arange(tiles))
    x_bar = _joined(jnp.moveaxis(x_bar, 3, 1), x.shape[0], setting).T  # tiles [T,D,G,R] -> [D,B] -> [B,D]
    unused = ((0, 0), (0, x.shape[1] - used))
    bars = (jnp.pad(x_bar, unused), jnp.pad(jnp.sum(y_bar, axis=0), unused))
    return (*bars, _joined(left_bar, x.shape[0], setting), jnp.sum(right_bar, axis=1), None, None)


_normalisers.defvjp(_forward, _backward)


# ---------------------------------------------------------------------------------------------------- sigmoid
def nested_sigmoid(
    image: Array,
    text: Array,
    *,
    widths: Sequence[int],
    sharpness: Array | float,
    bias: Array | float,
    caption_id: Array | None = None,
    mask: Array | None = None,
    tile: int | None = None,
) -> ContrastiveLosses:
    """SigLIP's loss of every prefix (Zhai et al. 2023, eq. 1): -(1/n) sum_ij ln sigmoid(z_ij (l^d_ij + bias)), z = 1 on
    the diagonal and -1 off it; pairs i != j of equal `caption_id` leave the sum.

    chance is the least that a constant logit reaches, (1/n) sum_i [ln(m_i) + (m_i - 1) ln(m_i / (m_i - 1))] with m_i =
    1 + negatives of i (all m equal: the sigmoid is then 1/m everywhere; with duplicates it is a lower bound). Tiles of
    rows are rebuilt in the backward pass. Arguments and errors as in `nested_contrastive`."""
    image, text = floating("image", image, 2), floating("text", text, 2)
    pairs, dim = image.shape
    if image.shape != text.shape:
        raise ValueError(f"image and text must be [B,D] of the same pairs, got {image.shape} and {text.shape}")
    if pairs < 2:
        raise ValueError("a batch of one pair has no negatives; use B >= 2")
    widths = check_widths(widths, dim)
    total = accumulation_dtype(image, text)
    valid = jnp.ones((pairs,), bool) if mask is None else mask.astype(bool)
    ids = jnp.arange(pairs, dtype=jnp.int32) if caption_id is None else caption_id.astype(jnp.int32)
    setting = _setting(widths, pairs, tile, product_dtype(None, image, text), total)
    x, y = (jnp.where(valid[:, None], a, jnp.zeros((), a.dtype)).astype(total) for a in (image, text))
    y = replicated(y)
    left, right = inverse_norms(x, widths) * jnp.asarray(sharpness, total), inverse_norms(y, widths)
    rows, tiles = _grouped(x, left, ids, valid, setting)
    offset = jnp.asarray(bias, total)

    @jax.checkpoint
    def one(sums, index):
        tile_rows = _slice(rows, index, setting.rows)
        own = tile_rows.position[:, :, None] == jnp.arange(pairs, dtype=jnp.int32)[None, None, :]
        parts = []
        for _, logits in _tile_logits(tile_rows, y, right, ids, valid, setting):
            counted = jnp.isfinite(logits) & tile_rows.valid[:, :, None]
            score = jnp.where(counted, logits, 0.0) + offset
            parts.append(jnp.sum(jnp.where(counted, jax.nn.softplus(jnp.where(own, -score, score)), 0.0)))
        return sums + jnp.stack(parts), None

    sums, _ = lax.scan(one, jnp.zeros((len(widths),), total), jnp.arange(tiles))
    weight = valid.astype(total)
    count = jnp.sum(weight)
    share = weight / jnp.maximum(count, 1.0)
    others = negatives(ids, valid).astype(total)
    spread = jnp.where(others > 0.0, others * jnp.log1p(1.0 / jnp.maximum(others, 1.0)), 0.0)
    return ContrastiveLosses(sums / jnp.maximum(count, 1.0), jnp.sum(share * (jnp.log1p(others) + spread)), count)
