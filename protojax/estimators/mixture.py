"""Online EM of a Gaussian mixture on teacher features: the decoupled estimator of the paper, and its switches.

Source: Arteaga et al., "Why Prototypes Collapse" (ICLR 2026), after Cappé & Moulines (2009), Celaya & Agostini (2015)
and Ueda & Nakano (1998). The M-step is in `mixture_step`; this file says what is carried and when.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

import jax.numpy as jnp

from protojax.api import Array, Codebook, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common, seeding
from protojax.estimators import mixture_step as em
from protojax.ops.gaussian import Covariance, gaussian_scores
from protojax.ops.unit import unit
from protojax.schedules import ScheduleSpec, check_choice, make_schedule


def mixture(
    components: int,
    *,
    covariance: Covariance = "tied",
    features: str = "raw",
    eta: ScheduleSpec = 0.05,
    beta: ScheduleSpec = 1.0,
    forgetting: str = "responsibility",
    weights: str = "learned",
    weight_rate: float | None = None,
    weight_floor: float = 1e-2,
    variance_floor: float = 1e-4,
    center: bool = True,
    center_rate: float = 0.01,
    price: float = 0.0,
    usage_rate: float = 0.01,
    start: str = "kmeans++",
    start_rows: int | None = None,
    revive: int = 0,
    revive_below: float = 0.1,
    assignment: str = "cosine",
    engine: common.Engine = common.LOCAL,
) -> Estimator:
    """Gaussian mixture of K = `components`, moved one EM step a batch, never by a gradient.

    Features are x_i = h_i - c, c their running mean (0 without `center`). With statistics n_k = sum_i gamma_ik,
    m1_k = sum_i gamma_ik x_i, m2_k likewise of squares, N the number of unmasked rows and gamma_ik proportional to
    (pi_k N(x_i | mu_k, s2_k))^beta:

        a_k = 1 - (1 - eta)^(n_k K / N);   mu_k <- mu_k + a_k (m1_k / n_k - mu_k);   variances likewise.

    Running means are stored, never raw sums: a component without data stays as it is, to the last bit.

    Options, each with its reason:
      covariance: 'tied' (one diagonal for all: K D parameters less to estimate, cheapest E-step), 'spherical', 'diag'.
      features: 'raw' or 'unit'; as the objective reads them (`common.check_reading`).
      eta, beta: learning rate and inverse temperature, schedules over the run. beta < 1 early keeps responsibilities
        soft while means are bad; too soft pulls all means to the data mean.
      forgetting: 'responsibility' (above: a component forgets by its own evidence), or 'uniform' (Cappé & Moulines:
        S <- (1 - eta) S + eta s, held as log-mass and means so that nothing underflows, and exactly equal to raw
        sums): the mass of a component without data falls as (1 - eta)^t, and pi with it. The failing arm.
      weights: 'learned' (pi by its own running mean, rate `weight_rate`, eta if None; never below weight_floor / K on
        reading, except under uniform forgetting) or 'uniform' (pi = 1/K: no rich-get-richer through the prior).
      variance_floor: smallest variance, as a share of the features' mean variance: scale-free.
      center: subtract the running mean: features often share a large common direction, and the cosine then compares
        that alone. Components live relative to the centre and so move along with it.
      price: the E-step uses ln pi_k - price * ln(K usage_k), usage the running mean (rate `usage_rate`) of mean
        responsibilities: much-used components become dear, unused ones cheap.
      start: 'kmeans++' or 'sample' on `start_rows` teacher rows (default 2 K), or 'random' directions.
      revive: components a step, at most, that are moved onto the worst explained rows of the batch once their usage
        is below revive_below / K. 0: never.
      assignment: what the losses see. 'cosine': unit(mu_k), bias -c . unit(mu_k). 'posterior' (tied only, where it is
        linear in h): mu_k / s2 and ln pi_k - |mu_k|^2_{1/s2} / 2, not unit rows.
      engine: the sweeps; a sharded one may be passed in.

    State: components {mean [K,D], variance [K,D] or [K] (tied: shared [D]), log_weight [K], usage [K]}; shared {center
    [D], scale, beta, updates, total_steps}. Raises ValueError or TypeError for any option out of range.
    """
    count = common.check_count("mixture, components", components)
    options = em.Options(
        components=count,
        covariance=cast(Covariance, check_choice("mixture, covariance", covariance, get_args(Covariance))),
        uniform=check_choice("mixture, forgetting", forgetting, ("responsibility", "uniform")) == "uniform",
        learned=check_choice("mixture, weights", weights, ("learned", "uniform")) == "learned",
        weight_rate=None if weight_rate is None else common.check_share("mixture, weight_rate", weight_rate),
        weight_floor=common.check_share("mixture, weight_floor", weight_floor, zero=True),
        variance_floor=common.check_share("mixture, variance_floor", variance_floor, zero=True),
        center=bool(center),
        center_rate=common.check_share("mixture, center_rate", center_rate),
        price=float(price),
        usage_rate=common.check_share("mixture, usage_rate", usage_rate),
        revive=common.check_count("mixture, revive", revive, 0),
        revive_below=common.check_share("mixture, revive_below", revive_below),
    )
    check_choice("mixture, start", start, seeding.METHODS)
    check_choice("mixture, assignment", assignment, ("cosine", "posterior"))
    if assignment == "posterior" and covariance != "tied":
        raise ValueError(
            f"mixture: assignment='posterior' needs covariance='tied', got {covariance!r}: otherwise the posterior is "
            "quadratic in the features and no codebook of [K, D] can hold it."
        )
    wanted = 2 * count if start_rows is None else common.check_count("mixture, start_rows", start_rows)
    return _build(
        options, common.check_reading("mixture", features), make_schedule(eta, what="mixture, eta"),
        make_schedule(beta, what="mixture, beta"), start, wanted, assignment, engine,
    )  # fmt: skip


def _build(
    options: em.Options, reading: str, eta_at: Any, beta_at: Any, start: str, wanted: int, assignment: str, engine: Any
) -> Estimator:
    """The functions behind `mixture`, after its options were checked."""

    def read(S: PyTree, rows: Mapping[str, Array]) -> tuple[Array, Array]:
        features, mask = common.read_rows(rows, reading)
        return features - S["shared"]["center"][None, :], mask

    def scores(S: PyTree, features: Array):
        means, variances, log_weights = em.parameters(S, options)
        beta = S["shared"]["beta"]
        return gaussian_scores(features, means, variances, log_weights, covariance=options.covariance, beta=beta)

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        S = em.initial(common.random_directions(key, options.components, spec.dim), options, common.shared_start(spec))
        S["shared"]["beta"] = beta_at(jnp.zeros((), common.float_dtype()))
        return S

    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        features, mask = read(S, rows)
        moments, evidence = engine.gaussian_moments(
            features, *em.parameters(S, options), mask, covariance=options.covariance, beta=S["shared"]["beta"]
        )
        return {**common.row_statistics(features, mask), **moments._asdict(), "log_evidence": jnp.sum(evidence)}

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        features, mask = read(S, rows)
        eta = eta_at(common.fraction(S, step))
        new = em.m_step(S, stats, eta, options)
        new["shared"]["beta"] = beta_at(common.fraction(S, step + 1))
        info = em.information(S, new, stats, options)
        if options.revive:

            def likelihood(candidates: Array) -> Array:
                queries, prototypes, bias, offset = scores(S, candidates)
                return common.lse_ops.lse(queries, prototypes, bias) + offset

            new, revived = em.revive(new, features, mask, likelihood, key, options)
            info["revived"] = revived
        info["eta"] = eta
        info["max_responsibility"] = common.max_responsibility(lambda x: scores(S, x)[:3], features, mask)
        return common.keep_if_empty(stats["rows"], new, S), common.report(info, stats["rows"])

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        means, variances, log_weights = em.parameters(S, options)
        center = S["shared"]["center"]
        if assignment == "cosine":
            prototypes = unit(means)
            return common.fixed_codebooks(prototypes, -(prototypes @ center))
        prototypes = means / variances[None, :]
        return common.fixed_codebooks(
            prototypes, log_weights - 0.5 * jnp.sum(prototypes * means, axis=1) - prototypes @ center
        )

    def start_from(S: PyTree, rows: Mapping[str, Array], key: Key) -> PyTree:
        features, mask = common.read_rows(rows, reading)
        return em.start(S, features, mask, key, start, options)

    data = start != "random"
    return Estimator(
        init, statistics, update, codebooks, common.no_head, wanted if data else 0,
        start_from if data else common.no_start,
    )  # fmt: skip
