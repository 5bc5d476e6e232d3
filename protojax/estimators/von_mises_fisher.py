"""Online EM of a von Mises-Fisher mixture: Gaussians of the sphere, with weights and concentrations of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import Array, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common, seeding, spherical
from protojax.ops.unit import unit
from protojax.schedules import Schedule, ScheduleSpec, check_choice, make_schedule


def von_mises_fisher(
    components: int,
    *,
    concentration: str = "shared",
    max_concentration: float = 1000.0,
    features: str = "unit",
    eta: ScheduleSpec = 0.05,
    weights: str = "learned",
    weight_floor: float = 1e-2,
    center: bool = True,
    center_rate: float = 0.01,
    usage_rate: float = 0.01,
    start: str = "kmeans++",
    start_rows: int | None = None,
    engine: common.Engine = common.LOCAL,
) -> Estimator:
    """Mixture of K = `components` von Mises-Fisher distributions, moved one EM step a batch.

    Rows are x_i = unit(h_i - c), c the running mean of the features as read. The state holds the running mean resultant
    vectors m_k = r_k mu_k (|mu_k| = 1): direction and concentration in one array. With gamma_ik proportional to
    pi_k exp(ln C(kappa_k) + kappa_k mu_k . x_i), n_k = sum_i gamma_ik and N unmasked rows,

        a_k = 1 - (1 - eta)^(n_k K / N);   m_k <- m_k + a_k (sum_i gamma_ik x_i / n_k - m_k),

    so that a component forgets by its own evidence, and pi is a running mean of n_k / N with rate eta. Concentrations
    are those of Banerjee et al. (2005), kappa(r) = r (D - r^2) / (1 - r^2), with `log_normaliser` to match.

    Options, each with its reason:
      concentration: 'shared' (r = sum_k pi_k r_k: all components compete on cosine alone), or 'each' (wide and narrow
        groups; a component with one row becomes a needle, hence the limit).
      max_concentration: largest kappa, the inverse of a temperature in units of cosine.
      features: 'unit' or 'raw', as the objective reads them: the centre is in these units.
      eta: learning rate, a schedule over the run.
      weights: 'learned' (pi, never below weight_floor / K on reading: a component that lost its rows can come back) or
        'uniform' (no rich-get-richer through the prior).
      center: subtract the running mean (rate `center_rate`): a common direction would make all rows look alike.
      usage_rate: of the running mean of n_k / N that is reported.
      start: 'kmeans++' or 'sample' on `start_rows` teacher rows (default 2 K), with the concentration of these rows
        around their nearest seed; or 'random' directions with r = 1/2.

    State: components {mean [K,D] (m_k), log_weight [K], usage [K]}; shared {center, updates, total_steps}. Raises
    ValueError or TypeError for any option out of range.
    """
    count = common.check_count("von_mises_fisher, components", components)
    options = _Options(
        components=count,
        shared=check_choice("von_mises_fisher, concentration", concentration, ("shared", "each")) == "shared",
        largest=_concentration(max_concentration),
        reading=common.check_reading("von_mises_fisher", features),
        eta=make_schedule(eta, what="von_mises_fisher, eta"),
        learned=check_choice("von_mises_fisher, weights", weights, ("learned", "uniform")) == "learned",
        weight_floor=common.check_share("von_mises_fisher, weight_floor", weight_floor),
        center=bool(center),
        center_rate=common.check_share("von_mises_fisher, center_rate", center_rate),
        usage_rate=common.check_share("von_mises_fisher, usage_rate", usage_rate),
        start=check_choice("von_mises_fisher, start", start, seeding.METHODS),
        engine=engine,
    )
    wanted = 2 * count if start_rows is None else common.check_count("von_mises_fisher, start_rows", start_rows)
    data = start != "random"
    return Estimator(
        lambda key, spec: _initial(key, spec, options),
        lambda S, rows: spherical.statistics(S, rows, options.reading, lambda s: _keys(s, options), options.engine),
        lambda S, stats, rows, step, key: _update(S, stats, rows, step, options),
        spherical.codebooks,
        common.no_head,
        wanted if data else 0,
        (lambda S, rows, key: _start(S, rows, key, options)) if data else common.no_start,
    )


class _Options(NamedTuple):
    """The options of `von_mises_fisher`, checked."""

    components: int
    shared: bool
    largest: float
    reading: str
    eta: Schedule
    learned: bool
    weight_floor: float
    center: bool
    center_rate: float
    usage_rate: float
    start: str
    engine: common.Engine


def _concentration(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"von_mises_fisher, max_concentration: expected a positive number, got {value!r}.")
    return float(value)


# -------------------------------------------------------------------------------------------- the distribution
def concentration_of(resultant: Array, dim: int) -> Array:
    """kappa(r) = r (D - r^2) / (1 - r^2) (Banerjee et al. 2005, eq. 4.4), for mean resultant lengths r in [0, 1)."""
    square = resultant * resultant
    return resultant * (dim - square) / (1.0 - square)


def log_normaliser(resultant: Array, dim: int) -> Array:
    """ln C of the density C exp(kappa mu . x) on the unit sphere in D >= 2 dimensions, at kappa = kappa(r).

    d ln C / d kappa = -A_D(kappa), the mean resultant length. With the approximate inverse kappa(r) of A_D that the
    M-step uses, the integral is closed and needs no Bessel function:

        ln C = ln C(0) - r kappa(r) + r^2 / 2 - (D - 1) / 2 ln(1 - r^2),   ln C(0) = ln Gamma(D/2) - ln 2 - D/2 ln pi.

    E-step and M-step then agree on one likelihood. Against the exact normaliser it is at most 0.16 nats too large, for
    every D and kappa, so that components of different width are compared to that.
    """
    square = resultant * resultant
    uniform = math.lgamma(dim / 2) - math.log(2.0) - dim / 2 * math.log(math.pi)
    spread = 0.5 * square - 0.5 * (dim - 1) * jnp.log1p(-square)
    return uniform - resultant * concentration_of(resultant, dim) + spread


def _largest_resultant(concentration: float, dim: int) -> float:
    """The r at which kappa(r) = concentration, by bisection: kappa(r) rises."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = middle * (dim - middle**2) < concentration * (1.0 - middle**2)
        low, high = (middle, high) if below else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------------ state
def _initial(key: Key, spec: EstimatorSpec, options: _Options) -> PyTree:
    means = 0.5 * common.random_directions(key, options.components, spec.dim)
    equal = jnp.full((options.components,), -math.log(options.components), means.dtype)
    return spherical.initial(spec, means, log_weight=equal)


def _log_weights(S: PyTree, options: _Options) -> Array:
    stored = S["components"]["log_weight"]
    if not options.learned:
        return jnp.full_like(stored, -math.log(options.components))
    stored = jnp.maximum(stored, math.log(options.weight_floor / options.components))
    return stored - jax.nn.logsumexp(stored)


def _keys(S: PyTree, options: _Options) -> spherical.Keys:
    """kappa_k mu_k, ln C(kappa_k) + ln pi_k: what the E-step scores rows against."""
    mean, log_weight = S["components"]["mean"], _log_weights(S, options)
    dim = mean.shape[1]
    resultant = jnp.sqrt(jnp.sum(mean * mean, axis=1))
    if options.shared:
        resultant = jnp.full_like(resultant, 1.0) * jnp.sum(jnp.exp(log_weight) * resultant)
    resultant = jnp.clip(resultant, 0.0, _largest_resultant(options.largest, dim))
    keys = concentration_of(resultant, dim)[:, None] * unit(mean)
    return spherical.Keys(keys, log_normaliser(resultant, dim) + log_weight, 1.0)


def _update(
    S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, options: _Options
) -> tuple[PyTree, Metrics]:
    eta, components = options.eta(common.fraction(S, step)), S["components"]
    count, number = stats["count"], jnp.maximum(stats["rows"], 1.0)
    share = count / number
    forget = -jnp.expm1(share * options.components * jnp.log1p(-eta))
    new = spherical.follow(S, stats, options.usage_rate, options.center_rate if options.center else None)
    new["components"] = {
        **new["components"],
        "mean": spherical.moved(components["mean"], count, stats["first"], forget, 1e-30),
        "log_weight": jnp.logaddexp(jnp.log1p(-eta) + components["log_weight"], jnp.log(eta) + jnp.log(share)),
    }
    how = _keys(S, options)
    features, mask = common.read_rows(rows, options.reading)
    # sum_i H_i = sum_i LSE_k l_ik - sum_ik gamma_ik l_ik; the last sum is linear in the statistics.
    entropy = stats["log_evidence"] - jnp.sum(stats["first"] * how.keys) - jnp.sum(count * how.bias)
    info = {
        **spherical.information(S, new, stats),
        "conditional_entropy": (jnp.maximum(entropy, 0.0), stats["rows"]),
        "log_likelihood": (stats["log_evidence"], stats["rows"]),
        "max_responsibility": common.max_responsibility(
            lambda h: (spherical.centered(S, h), how.keys, how.bias), features, mask
        ),
        "concentration": jnp.sum(jnp.sqrt(jnp.sum(how.keys * how.keys, axis=1)) * share),
        "eta": eta,
    }
    return common.keep_if_empty(stats["rows"], new, S), common.report(info, stats["rows"])


def _start(S: PyTree, rows: Mapping[str, Array], key: Key, options: _Options) -> PyTree:
    features, mask = common.read_rows(rows, options.reading)
    new, seeds = spherical.seeded(S, features, mask, key, options.start, options.center)
    # Unit rows around a seed: |x - seed|^2 = 2 - 2 cos, so that half the scatter is what the mean cosine lacks.
    resultant = jnp.clip(1.0 - 0.5 * jnp.sum(seeds.variance), 0.1, 0.999)
    new["components"]["mean"] = resultant * unit(seeds.means)
    return common.keep_if_empty(jnp.sum(mask.astype(features.dtype)), new, S)
