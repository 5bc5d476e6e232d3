"""The array programs behind `OnlineGaussianMixture`: E-step, M-step and assignments on blocks of rows of few shapes.

Rows come in blocks of 16, 64, 256, 1024 or 4096, the last one padded and masked: a program is compiled once for each
size, whatever the number of rows, and nothing on the device grows with it. The mathematics is that of
`estimators.mixture_step` and `ops`; what is added is the absolute `reg_covar` of scikit-learn, which enters on reading
and never the running variance, so that it is not added again at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from protojax.api import Array, Key, PyTree
from protojax.estimators import common, seeding
from protojax.estimators import mixture_step as em
from protojax.ops import lse, moments, sweeps
from protojax.ops.gaussian import Covariance, Scores, gaussian_scores

SMALLEST, LARGEST = 16, 4096
KEPT_BYTES = 2**28  # rows up to this size stay on the device between iterations of EM
BLOCK_ENTRIES = 2**22  # entries of a block of logits or of rows: 16 MiB in float32


class Plan(NamedTuple):
    """What programs are compiled for, besides shapes: the engine's switches, `reg_covar`, prototypes a tile."""

    options: em.Options
    reg_covar: float
    tile: int


class Parameters(NamedTuple):
    """A mixture as users read it: means [K,D], variances ([K,D], [K] or [D] by covariance), log_weights [K]."""

    means: Array
    variances: Array
    log_weights: Array


# ------------------------------------------------------------------------------------------------------ blocks
def padded_size(rows: int) -> int:
    """The least 16 * 4^j that holds `rows`: few sizes, so few compilations."""
    size = SMALLEST
    while size < rows:
        size *= 4
    return size


def block_size(rows: int, entries: int) -> int:
    """Rows a block for `rows` rows that need `entries` numbers each: at most LARGEST, and about BLOCK_ENTRIES."""
    size = min(padded_size(rows), LARGEST)
    while size > SMALLEST and size * entries > BLOCK_ENTRIES:
        size //= 4
    return size


def padded(rows: np.ndarray, size: int) -> tuple[Array, Array]:
    """(features [size,D], mask [size]) on the device; rows beyond those given are zeros that count nothing."""
    features = np.zeros((size, rows.shape[1]), rows.dtype)
    features[: len(rows)] = rows
    return jnp.asarray(features), jnp.asarray(np.arange(size) < len(rows))


class Blocks:
    """The rows of a host array [N,D] as device blocks; small arrays are copied to the device once, others each time."""

    def __init__(self, rows: np.ndarray, dtype: Any):
        self.rows, self.dtype = rows, np.dtype(dtype)
        self.size = block_size(len(rows), 2 * rows.shape[1])
        self.kept: list[tuple[Array, Array]] | None = None

    def block(self, start: int) -> tuple[Array, Array]:
        """The block whose first row is `start`."""
        return padded(np.asarray(self.rows[start : start + self.size], self.dtype), self.size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        starts = range(0, len(self.rows), self.size)
        if len(self.rows) * self.rows.shape[1] * self.dtype.itemsize > KEPT_BYTES:
            return (self.block(start) for start in starts)
        if self.kept is None:
            self.kept = [self.block(start) for start in starts]
        return iter(self.kept)


# ------------------------------------------------------------------------------------------------------ EM
def _parameters(S: PyTree, plan: Plan) -> Parameters:
    """Means relative to the state's centre."""
    means, variances, log_weights = em.parameters(S, plan.options)
    return Parameters(means, variances + plan.reg_covar, log_weights)


def _scores(S: PyTree, features: Array, plan: Plan) -> Scores:
    parts = _parameters(S, plan)
    return gaussian_scores(features, *parts, covariance=plan.options.covariance, beta=S["shared"]["beta"])


def _centred(S: PyTree, features: Array, mask: Array) -> Array:
    return jnp.where(mask[:, None], features - S["shared"]["center"][None, :], jnp.zeros((), features.dtype))


@partial(jax.jit, static_argnames="plan")
def published(S: PyTree, plan: Plan) -> Parameters:
    """The mixture in the coordinates of the data."""
    parts = _parameters(S, plan)
    return parts._replace(means=parts.means + S["shared"]["center"][None, :])


@partial(jax.jit, static_argnames="plan")
def _block_statistics(S: PyTree, features: Array, mask: Array, plan: Plan) -> dict[str, Array]:
    features = _centred(S, features, mask)
    queries, prototypes, bias, offset = _scores(S, features, plan)
    sums, evidence = moments.accumulate(
        queries, prototypes, bias, features, mask, second=plan.options.covariance, tile=plan.tile
    )
    evidence = jnp.sum(jnp.where(mask, evidence + offset, jnp.zeros((), evidence.dtype)))
    return {**common.row_statistics(features, mask), **sums._asdict(), "log_evidence": evidence}


@jax.jit
def _add(left: PyTree, right: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, left, right)


def statistics(S: PyTree, blocks: Blocks, plan: Plan) -> dict[str, Array]:
    """Sufficient statistics of all rows under the state S, and 'log_evidence' sum_i LSE_k(beta ln(pi_k N_ik))."""
    total: dict[str, Array] | None = None
    for features, mask in blocks:
        part = _block_statistics(S, features, mask, plan)
        if total is not None:
            # Wait for the block before: otherwise dispatch runs ahead and all rows end up in memory.
            jax.block_until_ready(total["rows"])
        total = part if total is None else _add(total, part)
    assert total is not None
    return total


@partial(jax.jit, static_argnames="plan")
def m_step(S: PyTree, stats: dict[str, Array], eta: Array, plan: Plan) -> tuple[PyTree, Array]:
    """(new state, mean log-likelihood of the rows under the old one; under annealing the free energy of it)."""
    bound = stats["log_evidence"] / (stats["rows"] * S["shared"]["beta"])
    return em.m_step(S, stats, eta, plan.options), bound


@partial(jax.jit, static_argnames="plan")
def revive(S: PyTree, features: Array, mask: Array, key: Key, plan: Plan) -> tuple[PyTree, Array]:
    """(state, how many): dead components moved onto badly explained rows of one block."""

    def likelihood(rows: Array) -> Array:
        queries, prototypes, bias, offset = _scores(S, rows, plan)
        return lse.lse(queries, prototypes, bias, tile=plan.tile) + offset

    return em.revive(S, _centred(S, features, mask), mask, likelihood, key, plan.options)


# ------------------------------------------------------------------------------------------------------ start
@partial(jax.jit, static_argnames=("count", "method"))
def _seeds(features: Array, mask: Array, key: Key, count: int, method: str) -> seeding.Seeds:
    return seeding.seed_components(features, mask, count, key, method)


def seeds(sample: np.ndarray, key: Key, count: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """(means [K,D], variance [D]) of `seeding.seed_components` on the rows of sample [M,D], in its dtype."""
    # Which rows are drawn needs no float64, which an accelerator would pay for dearly; in units of the largest entry no
    # squared distance leaves the range of float32.
    scale = np.maximum(np.max(np.abs(sample)), np.finfo(sample.dtype).tiny)
    with jax.enable_x64(False):
        rows, mask = padded((sample / scale).astype(np.float32), padded_size(len(sample)))
        found = _seeds(rows, mask, key, count, method)
    means, variance = (np.asarray(part).astype(sample.dtype) for part in found)
    return means * scale, variance * scale * scale


@partial(jax.jit, static_argnames=("shared_variance", "plan"))
def initial_state(parts: Parameters, center: Array, shared_variance: bool, plan: Plan) -> dict[str, Any]:
    """State around means [K,D] (relative to center [D]), log-weights [K] and raw variances: one [D] for all components
    with `shared_variance`, otherwise of the covariance's shape."""
    S = em.initial(parts.means, plan.options, {})
    if shared_variance:
        S = em.with_variance(S, parts.variances, plan.options)
    else:
        where = "shared" if plan.options.covariance == "tied" else "components"
        S[where]["variance"] = parts.variances
    S["components"]["log_weight"] = parts.log_weights
    # Components and rows live relative to a fixed origin among the data: squares of far-off rows would cancel.
    S["shared"]["center"] = center
    return S


# ------------------------------------------------------------------------------------------------- assignments
def _nearest(queries: Array, prototypes: Array, bias: Array, tile: int) -> Array:
    """argmax_k (q_n . m_k + c_k) [N] int32, a tile of prototypes at a time; ties go to the lowest index."""
    tile, dtype = min(tile, prototypes.shape[0]), queries.dtype

    def body(carry: tuple[Array, Array], part: tuple[Array, Array, Array]):
        best, index = carry
        keys, tile_bias, first = part
        logits = sweeps.dot(queries, keys, (1, 1), dtype, dtype) + tile_bias[None, :]
        top, at = jnp.max(logits, axis=1), jnp.argmax(logits, axis=1).astype(jnp.int32) + first
        better = top > best
        return (jnp.where(better, top, best), jnp.where(better, at, index)), None

    keys, tile_bias = sweeps.split(prototypes, tile), sweeps.split(bias, tile, -jnp.inf)
    first = tile * jnp.arange(keys.shape[0], dtype=jnp.int32)
    start = (jnp.full(queries.shape[:1], -jnp.inf, dtype), jnp.zeros(queries.shape[:1], jnp.int32))
    return jax.lax.scan(body, start, (keys, tile_bias, first))[0][1]


@partial(jax.jit, static_argnames=("covariance", "tile"))
def labels(features: Array, parts: Parameters, covariance: Covariance, tile: int) -> Array:
    """argmax_k of the responsibilities [N] int32."""
    queries, prototypes, bias, _ = gaussian_scores(features, *parts, covariance=covariance)
    return _nearest(queries, prototypes, bias, tile)


@partial(jax.jit, static_argnames=("covariance", "tile"))
def log_likelihood(features: Array, parts: Parameters, covariance: Covariance, tile: int) -> Array:
    """ln sum_k pi_k N(h_n | mu_k, s2_k) [N]."""
    queries, prototypes, bias, offset = gaussian_scores(features, *parts, covariance=covariance)
    return lse.lse(queries, prototypes, bias, tile=tile) + offset


@partial(jax.jit, static_argnames=("covariance", "tile"))
def responsibilities(features: Array, parts: Parameters, covariance: Covariance, tile: int) -> Array:
    """softmax_k of the logits [N,K], for the user who asked for them: the caller keeps N small."""
    queries, prototypes, bias, _ = gaussian_scores(features, *parts, covariance=covariance)
    logits = sweeps.dot(queries, prototypes, (1, 1), queries.dtype, queries.dtype) + bias[None, :]
    return jax.nn.softmax(logits, axis=1)


def by_blocks(
    program: Callable[..., Array], rows: np.ndarray, result: np.ndarray, parts: Parameters, plan: Plan, columns: int
) -> np.ndarray:
    """`result` [N,...] filled with program(block, ...) block by block; `columns` is how wide a row's logits are."""
    size = block_size(len(rows), max(columns, 2 * rows.shape[1]))
    for start in range(0, len(rows), size):
        features, _ = padded(np.asarray(rows[start : start + size], parts.means.dtype), size)
        part = program(features, parts, covariance=plan.options.covariance, tile=plan.tile)
        stop = min(start + size, len(rows))
        result[start:stop] = np.asarray(part)[: stop - start]
    return result
