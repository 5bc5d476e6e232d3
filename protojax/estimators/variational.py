"""Online variational Bayes for the weights of a mixture: components that the data do not need lose their share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.special import digamma

from protojax.api import Array, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common, seeding, spherical
from protojax.estimators import mixture_step as em
from protojax.ops.gaussian import gaussian_scores
from protojax.schedules import Schedule, ScheduleSpec, check_choice, make_schedule


def variational(
    components: int,
    *,
    prior: float = 0.01,
    population: int | None = None,
    features: str = "unit",
    eta: ScheduleSpec = 0.05,
    variance_floor: float = 1e-4,
    center: bool = True,
    center_rate: float = 0.01,
    usage_rate: float = 0.01,
    start: str = "kmeans++",
    start_rows: int | None = None,
    engine: common.Engine = common.LOCAL,
) -> Estimator:
    """Gaussian mixture with q(pi) = Dirichlet(alpha), K = `components` at most, by stochastic variational inference.

    Rows are x_i = h_i - c, c the running mean. With n_k = sum_i gamma_ik over the N unmasked rows of a batch and the
    population P that the posterior speaks for (Hoffman et al. 2013; Bishop 2006, section 10.2),

        gamma_ik proportional to exp(psi(alpha_k)) N(x_i | mu_k, s2),
        alpha_k = prior + P w_k,   w_k <- w_k + eta (n_k / N - w_k).

    exp(psi(a)) is about a - 1/2 for large a and exp(-1/a) for small ones: less than in proportion, and nothing at all
    when a small `prior` stands alone. So the weak lose to the strong, and components that the data do not need end with
    no weight. Means and the one diagonal variance are point estimates, running sums of the same statistics with the
    same forgetting (`mixture_step.m_step`, uniform), held as means so that nothing underflows. What has lost its weight
    keeps its last direction: count the components that are alive, not the prototypes.

    Options, each with its reason:
      prior: alpha_0 of the symmetric Dirichlet. Below 1 sparse weights are likelier; 1 / K approaches a Dirichlet
        process; large ones keep every component.
      population: P, in rows; pruning is the stronger the smaller. None: the rows of the whole run, since an estimator
        is not told the size of the data set, which is the textbook's choice.
      features: 'unit' or 'raw', as the objective reads them.
      eta: learning rate of all natural parameters, a schedule over the run. A fixed one forgets, as a drifting encoder
        asks for; Robbins-Monro decay is ('exponential', ...) or any other schedule that falls.
      variance_floor: smallest variance, as a share of the features' mean variance.
      center: subtract the running mean (rate `center_rate`). usage_rate: of the reported running mean of n_k / N.
      start: 'kmeans++' or 'sample' on `start_rows` teacher rows (default 2 K), or 'random' directions.

    State: components {mean [K,D], log_weight [K] (ln w), usage [K]}; shared {variance [D], center [D], population,
    scale, beta, updates, total_steps}. Raises ValueError or TypeError for any option out of range.
    """
    count = common.check_count("variational, components", components)
    step_options = em.Options(
        components=count,
        covariance="tied",
        uniform=True,
        learned=True,
        weight_rate=None,
        weight_floor=0.0,
        variance_floor=common.check_share("variational, variance_floor", variance_floor, zero=True),
        center=bool(center),
        center_rate=common.check_share("variational, center_rate", center_rate),
        price=0.0,
        usage_rate=common.check_share("variational, usage_rate", usage_rate),
        revive=0,
        revive_below=1.0,
    )
    options = _Options(
        em=step_options,
        prior=_prior(prior),
        population=None if population is None else common.check_count("variational, population", population),
        reading=common.check_reading("variational", features),
        eta=make_schedule(eta, what="variational, eta"),
        start=check_choice("variational, start", start, seeding.METHODS),
        engine=engine,
    )
    wanted = 2 * count if start_rows is None else common.check_count("variational, start_rows", start_rows)
    data = start != "random"
    return Estimator(
        lambda key, spec: _initial(key, spec, options),
        lambda S, rows: _statistics(S, rows, options),
        lambda S, stats, rows, step, key: _update(S, stats, rows, step, options),
        spherical.codebooks,
        common.no_head,
        wanted if data else 0,
        (lambda S, rows, key: _start(S, rows, key, options)) if data else common.no_start,
    )


class _Options(NamedTuple):
    """The options of `variational`, checked."""

    em: em.Options
    prior: float
    population: int | None
    reading: str
    eta: Schedule
    start: str
    engine: common.Engine


def _prior(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"variational, prior: expected a positive number, got {value!r}.")
    return float(value)


def _initial(key: Key, spec: EstimatorSpec, options: _Options) -> PyTree:
    means = common.random_directions(key, options.em.components, spec.dim)
    S = em.initial(means, options.em, common.shared_start(spec))
    rows = max(spec.rows * spec.total_steps, 1) if options.population is None else options.population
    more = {"beta": jnp.ones((), means.dtype), "population": jnp.asarray(float(rows), means.dtype)}
    return {**S, "shared": {**S["shared"], **more}}


def _concentrations(S: PyTree, options: _Options) -> Array:
    """alpha [K] of the posterior Dirichlet."""
    return options.prior + S["shared"]["population"] * jnp.exp(S["components"]["log_weight"])


def _expected(S: PyTree, options: _Options) -> PyTree:
    """The state as the E-step sees it: E[ln pi_k] = psi(alpha_k) - psi(sum alpha) for ln pi_k."""
    alpha = _concentrations(S, options)
    log_weight = digamma(alpha) - digamma(jnp.sum(alpha))
    return {**S, "components": {**S["components"], "log_weight": log_weight}}


def _read(S: PyTree, rows: Mapping[str, Array], options: _Options) -> tuple[Array, Array]:
    features, mask = common.read_rows(rows, options.reading)
    return features - S["shared"]["center"][None, :], mask


def _statistics(S: PyTree, rows: Mapping[str, Array], options: _Options) -> PyTree:
    features, mask = _read(S, rows, options)
    moments, evidence = options.engine.gaussian_moments(
        features, *em.parameters(_expected(S, options), options.em), mask, covariance="tied", beta=1.0
    )
    return {**common.row_statistics(features, mask), **moments._asdict(), "log_evidence": jnp.sum(evidence)}


def _update(
    S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, options: _Options
) -> tuple[PyTree, Metrics]:
    features, mask = _read(S, rows, options)
    eta, seen = options.eta(common.fraction(S, step)), _expected(S, options)
    new = em.m_step(S, stats, eta, options.em)
    info = em.information(seen, new, stats, options.em)
    alpha = _concentrations(new, options)
    info |= {
        "eta": eta,
        # Components that hold more of the posterior's rows than their prior.
        "kept": jnp.sum((alpha > 2.0 * options.prior + 1.0).astype(alpha.dtype)),
        "max_responsibility": common.max_responsibility(
            lambda x: gaussian_scores(x, *em.parameters(seen, options.em), covariance="tied")[:3], features, mask
        ),
    }
    return common.keep_if_empty(stats["rows"], new, S), common.report(info, stats["rows"])


def _start(S: PyTree, rows: Mapping[str, Array], key: Key, options: _Options) -> PyTree:
    features, mask = common.read_rows(rows, options.reading)
    return em.start(S, features, mask, key, options.start, options.em)
