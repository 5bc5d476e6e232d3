"""The M-step of the online Gaussian mixture, as pure functions of its state. See `mixture.mixture` for the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import Array, Key, PyTree
from protojax.estimators import common, seeding
from protojax.ops.gaussian import Covariance


class Options(NamedTuple):
    """The switches of `mixture`, checked."""

    components: int
    covariance: Covariance
    uniform: bool
    learned: bool
    weight_rate: float | None
    weight_floor: float
    variance_floor: float
    center: bool
    center_rate: float
    price: float
    usage_rate: float
    revive: int
    revive_below: float


# ---------------------------------------------------------------------------------------------------- state
def initial(means: Array, options: Options, shared: Mapping[str, Array]) -> PyTree:
    """State around means [K,D], with the variance of a random unit vector's entries (1 / D) and equal weights."""
    count, dim = means.shape
    zero = jnp.zeros((), means.dtype)
    variance = jnp.full((dim,), 1.0 / dim, means.dtype)
    equal = jnp.full((count,), 1.0 / count, means.dtype)
    S = {
        "components": {"mean": means, "log_weight": jnp.log(equal), "usage": equal},
        "memory": {},
        "shared": {**shared, "center": jnp.zeros((dim,), means.dtype), "scale": zero, "updates": zero, "beta": zero},
    }
    return with_variance(S, variance, options)


def with_variance(S: PyTree, variance: Array, options: Options) -> PyTree:
    """The state with the same variance [D] for all components, in the form that the covariance asks for."""
    count = options.components
    if options.covariance == "tied":
        return {**S, "shared": {**S["shared"], "variance": variance}}
    each = (
        jnp.broadcast_to(variance[None, :], (count, variance.shape[0]))
        if options.covariance == "diag"
        else jnp.full((count,), 1.0, variance.dtype) * jnp.mean(variance)
    )
    return {**S, "components": {**S["components"], "variance": each}}


def stored_variance(S: PyTree, options: Options) -> Array:
    return S["shared" if options.covariance == "tied" else "components"]["variance"]


def floor(S: PyTree, options: Options) -> Array:
    """Smallest variance in use: a share of the features' mean variance, and never quite zero."""
    return jnp.maximum(options.variance_floor * S["shared"]["scale"], 1e-12)


def parameters(S: PyTree, options: Options) -> tuple[Array, Array, Array]:
    """(means [K,D], variances, log-weights [K]) as the E-step uses them: floors, prior and price applied."""
    components = S["components"]
    variances = jnp.maximum(stored_variance(S, options), floor(S, options))
    log_weights = components["log_weight"] if options.learned else jnp.zeros_like(components["log_weight"])
    if options.learned and not options.uniform and options.weight_floor > 0:
        log_weights = jnp.maximum(log_weights, math.log(options.weight_floor / options.components))
    log_weights = log_weights - jax.nn.logsumexp(log_weights)
    if options.price:
        usage = jnp.maximum(components["usage"] * options.components, 1e-3)
        log_weights = log_weights - options.price * jnp.log(usage)
    return components["mean"], variances, log_weights


# --------------------------------------------------------------------------------------------------- M-step
class Rates(NamedTuple):
    """forget [K]: a_k, how far a component moves to its evidence. log_weight [K]: new ln pi_k (or log-mass)."""

    forget: Array
    log_weight: Array


def forgetting(log_weight: Array, share: Array, eta: Array, options: Options) -> Rates:
    """a_k from share [K] = n_k / N, by own evidence or by time."""
    log_share = jnp.log(share)
    rate = eta if options.weight_rate is None or options.uniform else jnp.asarray(options.weight_rate, eta.dtype)
    weight = jnp.logaddexp(jnp.log1p(-rate) + log_weight, jnp.log(rate) + log_share)
    if options.uniform:
        # Raw sums S0 <- (1 - eta) S0 + eta n/N and S1 likewise, divided: the mean moves by eta (n/N) / S0_new.
        forget = jnp.exp(jnp.log(eta) + log_share - weight)
    else:
        forget = -jnp.expm1(share * options.components * jnp.log1p(-eta))
    return Rates(jnp.where(share > 0, forget, jnp.zeros((), share.dtype)), weight)


def m_step(S: PyTree, stats: Mapping[str, Array], eta: Array, options: Options) -> PyTree:
    """One M-step with forgetting from the statistics of one batch; N = stats['rows'] > 0 is assumed."""
    components, shared = S["components"], S["shared"]
    rows = jnp.maximum(stats["rows"], 1.0)
    counts, first = stats["count"], stats["first"]
    share = counts / rows
    rates = forgetting(components["log_weight"], share, eta, options)

    # Counts this small are no evidence that float32 sums could weigh: such a component stays.
    seen = counts > 1e-30
    safe = jnp.where(seen, counts, jnp.ones((), counts.dtype))
    forget = jnp.where(seen, rates.forget, jnp.zeros((), counts.dtype))
    batch_mean = jnp.where(seen[:, None], first / safe[:, None], components["mean"])
    step = batch_mean - components["mean"]
    mean = components["mean"] + forget[:, None] * step

    variance = stored_variance(S, options)
    # Pooling two groups whose means differ by `step` adds a (1 - a) step^2 to the weighted variances (Chan et al.).
    between = (1.0 - forget)[:, None] * step * step
    if options.covariance == "tied":
        within = stats["second"] - jnp.sum(jnp.where(seen, counts, 0.0)[:, None] * batch_mean * batch_mean, axis=0)
        pooled = jnp.maximum(within, 0.0) / rows + jnp.sum(share[:, None] * between, axis=0)
        variance = variance + eta * (pooled - variance)
    elif options.covariance == "diag":
        within = jnp.maximum(stats["second"] / safe[:, None] - batch_mean * batch_mean, 0.0)
        variance = variance + forget[:, None] * (within + between - variance)
    else:
        within = jnp.maximum(stats["second"] / safe - jnp.sum(batch_mean * batch_mean, axis=1), 0.0) / mean.shape[1]
        variance = variance + forget * (within + jnp.mean(between, axis=1) - variance)

    usage = components["usage"] + options.usage_rate * (share - components["usage"])
    new_components = {**components, "mean": mean, "log_weight": rates.log_weight, "usage": usage}
    batch_center = stats["feature_sum"] / rows
    center = shared["center"]
    if options.center:
        center = running(center, center + batch_center, options, shared)
    scale = (stats["square_sum"] / rows - jnp.sum(batch_center**2)) / mean.shape[1]
    new_shared = {
        **shared,
        "center": center,
        "scale": running(shared["scale"], jnp.maximum(scale, 0.0), options, shared),
        "updates": shared["updates"] + 1.0,
    }
    if options.covariance == "tied":
        new_shared["variance"] = variance
    else:
        new_components["variance"] = variance
    return {**S, "components": new_components, "shared": new_shared}


def running(average: Array, value: Array, options: Options, shared: Mapping[str, Array]) -> Array:
    return common.running(average, value, options.center_rate, shared["updates"])


# -------------------------------------------------------------------------------------------- start, revival
def start(S: PyTree, features: Array, mask: Array, key: Key, method: str, options: Options) -> PyTree:
    """The state with components seeded on the unmasked rows of features [M,D] (uncentred)."""
    rows = jnp.sum(mask.astype(features.dtype))
    weight = mask.astype(features.dtype)[:, None]
    mean = jnp.sum(features * weight, axis=0) / jnp.maximum(rows, 1.0)
    center = mean if options.center else jnp.zeros_like(mean)
    scale = jnp.sum(weight * (features - mean[None, :]) ** 2) / (jnp.maximum(rows, 1.0) * features.shape[1])
    centered = jnp.where(mask[:, None], features - center[None, :], jnp.zeros((), features.dtype))
    seeds = seeding.seed_components(centered, mask, options.components, key, method)
    new = {
        **S,
        "components": {**S["components"], "mean": seeds.means},
        "shared": {**S["shared"], "center": center, "scale": scale, "updates": jnp.ones((), features.dtype)},
    }
    return common.keep_if_empty(rows, with_variance(new, seeds.variance, options), S)


def revive(
    S: PyTree, features: Array, mask: Array, likelihood: Callable[[Array], Array], key: Key, options: Options
) -> tuple[PyTree, Array]:
    """(state, how many): components of least usage, if below revive_below / K, take badly explained rows as means.

    Candidates are 8 random rows for each possible revival, so that one outlier does not collect all of them; among
    these the least likely are taken. A revived component starts with the usage and weight of a fair share (it is not
    dead again in the next step) and with the average variance.
    """
    number = min(options.revive, options.components, features.shape[0])
    candidates = min(8 * number, features.shape[0])
    order = jnp.argsort(jnp.where(mask, jax.random.uniform(key, mask.shape, features.dtype), 2.0))[:candidates]
    badness = jnp.where(mask[order], -likelihood(features[order]), -jnp.inf)
    badness, worst = jax.lax.top_k(badness, number)
    components = S["components"]
    least, which = jax.lax.top_k(-components["usage"], number)
    dead = (-least < options.revive_below / options.components) & (badness > -jnp.inf)
    index = jnp.where(dead, which, options.components)  # out of range: dropped
    rows = features[order][worst]
    fair = jnp.full((number,), 1.0 / options.components, features.dtype)
    new = {
        **components,
        "mean": components["mean"].at[index].set(rows, mode="drop"),
        "usage": components["usage"].at[index].set(fair, mode="drop"),
        "log_weight": components["log_weight"].at[index].set(jnp.log(fair), mode="drop"),
    }
    if "variance" in components:
        average = jnp.mean(components["variance"], axis=0)
        spread = jnp.broadcast_to(average[None], (number, *average.shape))
        new["variance"] = components["variance"].at[index].set(spread, mode="drop")
    return {**S, "components": new}, jnp.sum(dead.astype(features.dtype))


# -------------------------------------------------------------------------------------------------- reports
def information(S: PyTree, new: PyTree, stats: Mapping[str, Array], options: Options) -> dict:
    """Numbers worth looking at. The mean conditional entropy needs no N x K array: with l_ik the logits,
    sum_i H_i = sum_i LSE_k l_ik - sum_ik gamma_ik l_ik, and the last sum is linear in the statistics."""
    means, variances, log_weights = parameters(S, options)
    beta, rows, dim = S["shared"]["beta"], stats["rows"], means.shape[1]
    counts, first = stats["count"], stats["first"]
    known = jnp.where(counts > 0, log_weights, jnp.zeros((), counts.dtype))
    cross = 2.0 * means * first - counts[:, None] * means * means
    if options.covariance == "tied":
        log_scale = jnp.full((options.components,), 1.0, counts.dtype) * jnp.sum(jnp.log(variances))
        squares = jnp.sum((stats["second"] - jnp.sum(cross, axis=0)) / variances)
    elif options.covariance == "diag":
        log_scale = jnp.sum(jnp.log(variances), axis=1)
        squares = jnp.sum((stats["second"] - cross) / variances)
    else:
        log_scale = dim * jnp.log(variances)
        squares = jnp.sum((stats["second"] - jnp.sum(cross, axis=1)) / variances)
    normaliser = jnp.sum(counts * (known - 0.5 * (log_scale + dim * math.log(2.0 * math.pi))))
    entropy = stats["log_evidence"] - beta * (normaliser - 0.5 * squares)
    at_floor = stored_variance(new, options) <= floor(new, options)
    tiny = math.log(float(jnp.finfo(counts.dtype).tiny))
    return {
        **common.row_info(stats, S["shared"]["center"]),
        **common.usage_info(counts, new["components"]["usage"], rows),
        "conditional_entropy": (jnp.maximum(entropy, 0.0), rows),
        "log_likelihood": (stats["log_evidence"] / jnp.maximum(beta, 1e-12), rows),
        "floor_share": jnp.mean(at_floor.astype(counts.dtype)),
        "underflow_share": jnp.mean((new["components"]["log_weight"] < tiny).astype(counts.dtype)),
        "beta": beta,
    }
