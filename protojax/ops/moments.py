"""Sufficient statistics of an E-step: an LSE sweep, then an accumulate sweep that owns its prototypes.

Responsibilities gamma_nk = softmax_k(q_n . m_k + c_k) are never stored. The statistics are sums over rows, so they add
over devices, micro-batches and steps.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from protojax.ops.checks import accumulation_dtype, floating, logit_arguments
from protojax.ops.gaussian import Covariance, expand, gaussian_keys, row_offset
from protojax.ops.kernels import column_sweep, completes_rows, plan, row_sweep
from protojax.ops.sweeps import complete_sweep

Array = jax.Array
Second = Literal["diag", "spherical", "tied", "none"]


class Moments(NamedTuple):
    """count [K]: n_k = sum_n gamma_nk. first [K,D]: sum_n gamma_nk h_n. second: sum_n gamma_nk h_n^2 [K,D] ('diag'),
    sum_n gamma_nk |h_n|^2 [K] ('spherical'), sum_n h_n^2 [D] ('tied': responsibilities sum to one), None ('none')."""

    count: Array  # type: ignore[assignment]
    first: Array
    second: Array | None


def _weigh(features: Array, weight: Array) -> tuple[Array, Array]:
    """(w h, w h^2) of rows [R,D]; rows of weight 0 give exact zeros, whatever they hold."""
    wide = jnp.where(weight[:, None] != 0.0, features.astype(weight.dtype), jnp.zeros((), weight.dtype))
    weighted = wide * weight[:, None]
    return weighted, weighted * wide


def _prepare_with(second: Second, queries: Array, rows: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """What a chunk of rows adds under its responsibilities: vectors [R,E] and scalars [R,F]."""
    features, weight = rows
    queries = jnp.where(weight[:, None] != 0.0, queries, jnp.zeros((), queries.dtype))
    first, square = _weigh(features, weight)
    if second == "diag":
        return queries, jnp.concatenate([first, square], axis=1), weight[:, None]
    if second == "spherical":
        return queries, first, jnp.stack([weight, jnp.sum(square, axis=1)], axis=1)
    return queries, first, weight[:, None]


# One function object a kind, so that tracing caches see the same one every time.
_PREPARE = {second: partial(_prepare_with, second) for second in get_args(Second)}


def accumulate(
    queries: Array,
    prototypes: Array,
    bias: Array,
    features: Array,
    mask: Array,
    *,
    second: Second = "diag",
    tile: int = 2048,
    log_normaliser: Array | None = None,
    row_tile: int | None = None,
    matmul_dtype: DTypeLike | None = None,
) -> tuple[Moments, Array]:
    """(Moments, lse [N]) of responsibilities softmax_k(q_n . m_k + c_k), streamed: never N x K.

    Args:
      queries: [N,P]; prototypes: [K,P]; bias: [K]: natural parameters of the mixture (see `gaussian_scores`).
      features: [N,D], what is averaged. mask: [N], bool, or float row weights; rows of mask 0 count nothing, whatever
        they hold (NaN included), and have lse 0.
      second: which second moment to gather (see `Moments`).
      log_normaliser: [N], LSE_k of the logits when the caller has it already: saves the first of the two sweeps.
      tile, row_tile, matmul_dtype: as in `lse`.

    No gradient is defined through the statistics: they are themselves a gradient (of sum_n lse_n). Raises TypeError and
    ValueError as `lse` does, and for an unknown `second` or rows that disagree."""
    queries, prototypes, bias = logit_arguments(queries, prototypes, bias)
    features = floating("features", features, 2)
    rows = queries.shape[0]
    if features.shape[0] != rows:
        raise ValueError(f"features must have one row a query ({rows}), got shape {features.shape}")
    options = plan(queries, prototypes, bias, tile, row_tile, matmul_dtype)
    total = accumulation_dtype(queries, prototypes, bias, features)
    weight = _row_weights(features, mask, second, total)
    used = weight != 0.0
    prepare = _PREPARE[second]
    if log_normaliser is None and completes_rows(options):
        lse, first, sums = complete_sweep(
            queries, prototypes, bias, (features, weight), prepare, options, _parts(second, features)
        )
    else:
        if log_normaliser is None:
            clean = jnp.where(used[:, None], queries, jnp.zeros((), queries.dtype))
            lse = row_sweep(clean, prototypes, bias, None, None, options)[0].astype(total)
        else:
            lse = floating("log_normaliser", log_normaliser, 1).astype(total)
        if lse.shape != (rows,):
            raise ValueError(f"log_normaliser must hold one value a row ({rows}), got shape {lse.shape}")
        # A masked row holds zeros; 0 as its normaliser may overflow exp: +inf makes it weigh exactly nothing.
        lse = jnp.where(used, lse, jnp.full((), jnp.inf, total))
        vectors, sums = column_sweep(queries, prototypes, bias, lse, (features, weight), prepare, options)
        first = tuple(jnp.split(vectors, len(_parts(second, features)), axis=1))
    found = _moments(second, first, sums, features, weight)
    return found, jnp.where(used, lse, jnp.zeros((), total))


def _row_weights(features: Array, mask: Array, second: str, total: jnp.dtype) -> Array:
    """mask as weights [N], after checking it and the name of the second moment."""
    mask = jnp.asarray(mask)
    if mask.shape != features.shape[:1]:
        raise ValueError(f"mask must have one value a row ({features.shape[0]}), got shape {mask.shape}")
    if second not in _PREPARE:
        raise ValueError(f"second must be 'diag', 'spherical', 'tied' or 'none', got {second!r}")
    return mask.astype(total)


def _parts(second: str, features: Array) -> tuple[int, ...]:
    """Widths of the arrays in a sweep's sums of vectors."""
    return (features.shape[1],) * (2 if second == "diag" else 1)


def _moments(second: str, first: tuple[Array, ...], sums: Array, features: Array, weight: Array) -> Moments:
    """Moments from a sweep's sums [K,D] (twice for 'diag') and [K,F]."""
    squares: Array | None = None
    if second == "diag":
        squares = first[1]
    elif second == "spherical":
        squares = sums[:, 1]
    elif second == "tied":
        squares = jnp.sum(_weigh(features, weight)[1], axis=0)
    return Moments(sums[:, 0], first[0], squares)


def gaussian_moments(
    features: Array,
    means: Array,
    variances: Array,
    log_weights: Array,
    mask: Array,
    *,
    covariance: Covariance = "diag",
    second: Second | None = None,
    beta: float | Array = 1.0,
    tile: int = 2048,
    row_tile: int | None = None,
    matmul_dtype: DTypeLike | None = None,
) -> tuple[Moments, Array]:
    """The E-step of a Gaussian mixture: (Moments, LSE_k beta ln(pi_k N(h_n | mu_k, s2_k)) [N], 0 on masked rows).

    The same as `gaussian_scores` followed by `accumulate` (whose arguments these are; `second` defaults to the one that
    `covariance` needs), except that on a CPU the expanded queries [N,P] are made a chunk of rows at a time: for many
    rows, writing them out costs as much as a product. With beta = 1 the second result is the log-likelihood."""
    how = covariance if second is None else second
    prototypes, bias, expansion = gaussian_keys(
        features, means, variances, log_weights, covariance=covariance, beta=beta
    )
    options = plan(features, prototypes, bias, tile, row_tile, matmul_dtype)
    weight = _row_weights(features, mask, how, accumulation_dtype(features, prototypes))
    used = weight != 0.0
    if not completes_rows(options):
        clean = jnp.where(used[:, None], features, jnp.zeros((), features.dtype))
        found, lse = accumulate(
            expand(clean, expansion),
            prototypes,
            bias,
            clean,
            mask,
            second=how,
            tile=tile,
            row_tile=row_tile,
            matmul_dtype=matmul_dtype,
        )
    else:

        def prepare(chunk, rows):
            clean, vectors, scalars = _PREPARE[how](chunk, rows)
            return expand(clean, expansion), vectors, scalars

        rows = (features, weight)
        lse, first, sums = complete_sweep(features, prototypes, bias, rows, prepare, options, _parts(how, features))
        found = _moments(how, first, sums, features, weight)
        clean = features
    likelihood = lse + row_offset(clean, expansion)
    return found, jnp.where(used, likelihood, jnp.zeros((), likelihood.dtype))
