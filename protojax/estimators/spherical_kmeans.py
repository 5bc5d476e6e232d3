"""Spherical online k-means: each row moves its nearest prototype and no other."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from protojax.api import Array, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common, seeding, spherical
from protojax.schedules import ScheduleSpec, check_choice, make_schedule


def spherical_kmeans(
    components: int,
    *,
    features: str = "unit",
    rate: ScheduleSpec = 0.01,
    center: bool = True,
    center_rate: float = 0.01,
    usage_rate: float = 0.01,
    start: str = "kmeans++",
    start_rows: int | None = None,
    engine: common.Engine = common.LOCAL,
) -> Estimator:
    """K = `components` means of hard assignments by cosine, with step sizes by own count (MacQueen 1967; Zhong 2005).

    Rows are x_i = unit(h_i - c), c the running mean of the features as read. With n_k the rows of the batch whose
    nearest prototype is unit(m_k), xbar_k their mean, and C_k the rows that k has had so far:

        a_k = max(n_k / (C_k + n_k), 1 - (1 - rate)^n_k);   m_k <- m_k + a_k (xbar_k - m_k);   C_k <- C_k + n_k.

    The assignment is a softmax at temperature 1e-4 through the streamed sweep (never N x K): exact for rows whose best
    cosine leads by 0.001, shared where rounding would decide. Nothing revives a prototype that no row is nearest to.

    Options, each with its reason:
      features: 'unit' or 'raw', as the objective reads them: the centre is in these units.
      rate: least weight of a row of its own. 0: plain running means (1 / count), which stop moving while the encoder
        does not; 1: the batch replaces the past, so that a full batch makes one sweep of Lloyd's algorithm.
      center: subtract the running mean (rate `center_rate`): a common direction would make all rows look alike.
      usage_rate: of the running mean of n_k / N that is reported.
      start: 'kmeans++' or 'sample' on `start_rows` teacher rows (default 2 K), each seed counting as one row, or
        'random' directions, which count as none.

    State: components {mean [K,D], count [K], usage [K]}; shared {center, updates, total_steps}. Raises ValueError or
    TypeError for any option out of range.
    """
    count = common.check_count("spherical_kmeans, components", components)
    reading = common.check_reading("spherical_kmeans", features)
    rate_at = make_schedule(rate, what="spherical_kmeans, rate")
    center_rate = common.check_share("spherical_kmeans, center_rate", center_rate)
    usage_rate = common.check_share("spherical_kmeans, usage_rate", usage_rate)
    check_choice("spherical_kmeans, start", start, seeding.METHODS)
    wanted = 2 * count if start_rows is None else common.check_count("spherical_kmeans, start_rows", start_rows)

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        means = common.random_directions(key, count, spec.dim)
        return spherical.initial(spec, means, count=jnp.zeros((count,), means.dtype))

    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        return spherical.statistics(S, rows, reading, spherical.hard_keys, engine)

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        own, past, least = stats["count"], S["components"]["count"], rate_at(common.fraction(S, step))
        seen = jnp.where(own > spherical.LEAST, own, jnp.ones((), own.dtype))
        forget = jnp.maximum(seen / (past + seen), -jnp.expm1(seen * jnp.log1p(-least)))
        mean = spherical.moved(S["components"]["mean"], own, stats["first"], forget, spherical.LEAST)
        new = spherical.follow(S, stats, usage_rate, center_rate if center else None)
        new["components"] = {**new["components"], "mean": mean, "count": past + own}
        info = {**spherical.information(S, new, stats), "rate": least}
        return common.keep_if_empty(stats["rows"], new, S), common.report(info, stats["rows"])

    def start_from(S: PyTree, rows: Mapping[str, Array], key: Key) -> PyTree:
        read, mask = common.read_rows(rows, reading)
        new, _ = spherical.seeded(S, read, mask, key, start, center)
        new["components"]["count"] = jnp.ones((count,), read.dtype)
        return common.keep_if_empty(jnp.sum(mask.astype(read.dtype)), new, S)

    data = start != "random"
    return Estimator(
        init, statistics, update, spherical.codebooks, common.no_head, wanted if data else 0,
        start_from if data else common.no_start,
    )  # fmt: skip
