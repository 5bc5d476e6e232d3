"""Periodic k-means over a memory of teacher features (DeepCluster-v2): prototypes stand still between clusterings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import Array, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common, seeding, spherical
from protojax.estimators.balanced import empty_memory, remember
from protojax.schedules import check_choice


def periodic_kmeans(
    components: int,
    *,
    memory: int | None = None,
    every: int = 100,
    sweeps: int = 10,
    restart: str = "sample",
    features: str = "unit",
    center: bool = True,
    usage_rate: float = 0.01,
    start: str = "kmeans++",
    engine: common.Engine = common.LOCAL,
) -> Estimator:
    """K = `components` prototypes from spherical k-means over the last M teacher features, every `every` steps
    (Caron et al. 2018; DeepCluster-v2 in Caron et al. 2020, appendix).

    Rows of the memory are x_i = unit(h_i - c), c their mean. `sweeps` times each row goes to its nearest prototype and
    each prototype becomes the mean of its rows (one without rows stays). In between neither the prototypes nor c move:
    the objective has a fixed target, but one that the encoder drifts away from.

    Options, each with its reason:
      memory: M, default 4 K and at least K: fewer rows than clusters cannot be clustered.
      every: steps between clusterings, at steps every - 1, 2 every - 1, ... (published: one epoch).
      restart: where a clustering begins. 'sample': rows of the memory at random, as published; 'kmeans++': rows far
        from one another; 'warm': the prototypes that were, so that each keeps its identity and dead ones stay dead.
      features: 'unit' or 'raw', as the objective reads them. center: subtract the memory's mean.
      usage_rate: of the running mean of n_k / N (hard assignments of the batch) that is reported.
      start: 'kmeans++' or 'sample' on M teacher rows, which also fill the memory; 'random': directions, which stay
        until the first clustering.

    State: components {mean, usage}; memory {features [M,D] as read, written [M] (step, -1 empty)}; shared {center,
    cursor, updates, total_steps}. Raises ValueError or TypeError for any option out of range.
    """
    count = common.check_count("periodic_kmeans, components", components)
    size = 4 * count if memory is None else common.check_count("periodic_kmeans, memory", memory)
    if size < count:
        raise ValueError(
            f"periodic_kmeans, memory: expected at least as many rows as components ({count}), got {size}: fewer rows "
            "than clusters cannot be clustered."
        )
    options = _Options(
        components=count,
        memory=size,
        every=common.check_count("periodic_kmeans, every", every),
        sweeps=common.check_count("periodic_kmeans, sweeps", sweeps),
        restart=check_choice("periodic_kmeans, restart", restart, ("warm", "sample", "kmeans++")),
        reading=common.check_reading("periodic_kmeans", features),
        center=bool(center),
        usage_rate=common.check_share("periodic_kmeans, usage_rate", usage_rate),
        start=check_choice("periodic_kmeans, start", start, seeding.METHODS),
        engine=engine,
    )
    data = start != "random"
    return Estimator(
        lambda key, spec: _initial(key, spec, options),
        lambda S, rows: spherical.statistics(S, rows, options.reading, spherical.hard_keys, options.engine),
        lambda S, stats, rows, step, key: _update(S, stats, rows, step, key, options),
        spherical.codebooks,
        common.no_head,
        size if data else 0,
        (lambda S, rows, key: _start(S, rows, key, options)) if data else common.no_start,
    )


class _Options(NamedTuple):
    """The options of `periodic_kmeans`, checked."""

    components: int
    memory: int
    every: int
    sweeps: int
    restart: str
    reading: str
    center: bool
    usage_rate: float
    start: str
    engine: common.Engine


def _initial(key: Key, spec: EstimatorSpec, options: _Options) -> PyTree:
    S = spherical.initial(spec, common.random_directions(key, options.components, spec.dim))
    S["memory"] = empty_memory(options.memory, spec.dim)
    S["shared"]["cursor"] = jnp.zeros((), jnp.int32)
    return S


def _clustered(S: PyTree, key: Key, method: str, options: _Options) -> PyTree:
    """The state after one clustering of the memory, from 'warm' prototypes or from new seeds."""
    rows, valid = S["memory"]["features"], S["memory"]["written"] >= 0
    if method == "warm":
        new = S
        if options.center:
            sums = common.row_statistics(rows, valid)
            mean = sums["feature_sum"] / jnp.maximum(sums["rows"], 1.0)
            new = {**S, "shared": {**S["shared"], "center": mean}}
    else:
        new, _ = spherical.seeded(S, rows, valid, key, method, options.center)
        new["shared"]["updates"] = S["shared"]["updates"]
    return spherical.lloyd(new, rows, valid, options.sweeps, options.engine)


def _update(
    S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key, options: _Options
) -> tuple[PyTree, Metrics]:
    features, mask = common.read_rows(rows, options.reading)
    due = (jnp.asarray(step) + 1) % options.every == 0
    new = spherical.follow(remember(S, features, mask, step), stats, options.usage_rate, None)
    new = jax.lax.cond(due, lambda s: _clustered(s, key, options.restart, options), lambda s: s, new)
    info = {
        **spherical.information(S, new, stats),
        "memory_fill": jnp.mean((new["memory"]["written"] >= 0).astype(features.dtype)),
        "clustered": due.astype(features.dtype),
    }
    return common.keep_if_empty(stats["rows"], new, S), common.report(info, stats["rows"])


def _start(S: PyTree, rows: Mapping[str, Array], key: Key, options: _Options) -> PyTree:
    features, mask = common.read_rows(rows, options.reading)
    new = _clustered(remember(S, features, mask, jnp.zeros((), jnp.int32)), key, options.start, options)
    return common.keep_if_empty(jnp.sum(mask.astype(features.dtype)), new, S)
