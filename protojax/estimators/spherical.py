"""What estimators of directions share: centred unit rows, hard shares, a start from data, the numbers of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import Array, Codebook, EstimatorSpec, Key, PyTree
from protojax.estimators import common, seeding
from protojax.ops.unit import unit

# Temperature at which a softmax over cosines is a hard assignment: a lead of 0.001 leaves exp(-10) to all others.
# Sharper still and float32 logits (1 / temperature large) would be coarser than the shares that they decide.
HARD = 1e-4
# Fewer than this many rows are what the softmax left over, no assignment.
LEAST = 1e-3


class Keys(NamedTuple):
    """Logits of a centred unit row x: scale * (x . keys_k) + bias_k. keys [K,D], bias [K], scale []."""

    keys: Array
    bias: Array
    scale: Array | float


def initial(spec: EstimatorSpec, means: Array, **components: Array) -> PyTree:
    """State around means [K,D] with equal usage, centre 0; `components`: further arrays [K]."""
    count, dim = means.shape
    zero = jnp.zeros((), means.dtype)
    equal = jnp.full((count,), 1.0 / count, means.dtype)
    return {
        "components": {"mean": means, "usage": equal, **components},
        "memory": {},
        "shared": {**common.shared_start(spec), "center": jnp.zeros((dim,), means.dtype), "updates": zero},
    }


def centered(S: PyTree, features: Array) -> Array:
    """x_i = unit(h_i - c) [N,D]."""
    return unit(features - S["shared"]["center"][None, :])


def hard_keys(S: PyTree) -> Keys:
    """Nearest prototype by cosine."""
    prototypes = unit(S["components"]["mean"])
    return Keys(prototypes, jnp.zeros(prototypes.shape[:1], prototypes.dtype), 1.0 / HARD)


def statistics(
    S: PyTree, rows: Mapping[str, Array], reading: str, keys_of: Callable[[PyTree], Keys], engine: common.Engine
) -> dict[str, Array]:
    """`common.row_statistics` of the rows as read, 'count' n_k [K] and 'first' sum_i gamma_ik x_i [K,D] of the centred
    ones, 'log_evidence' sum_i LSE_k l_ik."""
    features, mask = common.read_rows(rows, reading)
    x, how = centered(S, features), keys_of(S)
    moments, lse = engine.accumulate(x * how.scale, how.keys, how.bias, x, mask, second="none")
    evidence = jnp.sum(jnp.where(mask, lse, jnp.zeros((), lse.dtype)))
    plain = common.row_statistics(features, mask)
    return {**plain, "count": moments.count, "first": moments.first, "log_evidence": evidence}


def moved(mean: Array, count: Array, first: Array, rate: Array, least: float) -> Array:
    """mean_k + rate_k (first_k / count_k - mean_k) if a component has more than `least` rows, as it was elsewhere."""
    seen = count > least
    target = first / jnp.where(seen, count, jnp.ones((), count.dtype))[:, None]
    return jnp.where(seen[:, None], mean + jnp.broadcast_to(rate, count.shape)[:, None] * (target - mean), mean)


def follow(S: PyTree, stats: Mapping[str, Array], usage_rate: float, center_rate: float | None) -> PyTree:
    """Running means of the batch: usage of the components, centre of the features (None: it stays)."""
    components, shared = S["components"], S["shared"]
    rows = jnp.maximum(stats["rows"], 1.0)
    usage = components["usage"] + usage_rate * (stats["count"] / rows - components["usage"])
    center = shared["center"]
    if center_rate is not None:
        center = common.running(center, stats["feature_sum"] / rows, center_rate, shared["updates"])
    shared = {**shared, "center": center, "updates": shared["updates"] + 1.0}
    return {**S, "components": {**components, "usage": usage}, "shared": shared}


def seeded(
    S: PyTree, features: Array, mask: Array, key: Key, method: str, center: bool
) -> tuple[PyTree, seeding.Seeds]:
    """(state whose centre is the mean of the unmasked rows and whose means are seeds among them, the seeds)."""
    sums = common.row_statistics(features, mask)
    shared = {**S["shared"], "updates": jnp.ones((), features.dtype)}
    if center:
        shared["center"] = sums["feature_sum"] / jnp.maximum(sums["rows"], 1.0)
    S = {**S, "shared": shared}
    seeds = seeding.seed_components(centered(S, features), mask, S["components"]["mean"].shape[0], key, method)
    return {**S, "components": {**S["components"], "mean": seeds.means}}, seeds


def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
    """unit(mean_k) with bias -c . unit(mean_k): the logits are those of centred features."""
    prototypes = unit(S["components"]["mean"])
    return common.fixed_codebooks(prototypes, -(prototypes @ S["shared"]["center"]))


def information(S: PyTree, new: PyTree, stats: Mapping[str, Array]) -> dict[str, Any]:
    """Usage, the features' common direction, and 'own_cosine': mean cosine of a row to what it was assigned to."""
    prototypes = unit(S["components"]["mean"])
    return {
        **common.row_info(stats),
        **common.usage_info(stats["count"], new["components"]["usage"], stats["rows"]),
        "own_cosine": (jnp.sum(stats["first"] * prototypes), stats["rows"]),
    }


def lloyd(S: PyTree, features: Array, mask: Array, sweeps: int, engine: common.Engine) -> PyTree:
    """The state after `sweeps` sweeps of spherical k-means over features [M,D] (as read): every row goes to its nearest
    prototype, every prototype with rows becomes their mean."""
    x = centered(S, features)
    whole = jnp.ones((), x.dtype)

    def sweep(_, mean: Array) -> Array:
        prototypes = unit(mean)
        bias = jnp.zeros(prototypes.shape[:1], prototypes.dtype)
        moments, _ = engine.accumulate(x / HARD, prototypes, bias, x, mask, second="none")
        return moved(mean, moments.count, moments.first, whole, LEAST)

    mean = jax.lax.fori_loop(0, sweeps, sweep, S["components"]["mean"])
    return {**S, "components": {**S["components"], "mean": mean}}
