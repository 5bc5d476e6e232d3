"""Spherical mixture with a balanced E-step: entropic optimal transport over a memory of teacher features.

With an ordinary E-step a component that answers for nothing gets no data and stays dead, and nothing in EM brings it
back. Here the responsibilities are the transport plan that gives component k the mass prior_k of the *memory*: every
component must take its share of recent features, so that none can die, and K may exceed the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import OFF, Array, Codebook, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common, restructure, seeding, spherical
from protojax.ops.unit import unit
from protojax.schedules import Schedule, ScheduleSpec, check_choice, make_schedule

SWEEPS = 8  # over the memory, while a row stays in it
MEMORY = 4  # rows a component, where no memory is given


def turnover(memory: int, rows: int) -> int:
    """Steps between two sweeps with `every=0`, for batches of so many rows."""
    return max(1, memory // (SWEEPS * rows))


class _Options(NamedTuple):
    """The switches of `balanced`, checked."""

    components: int
    memory: int
    reading: str
    temperature: Schedule
    rate: Schedule
    iterations: int
    every: int
    exponent: float
    estimated: bool
    prior_floor: float
    split_merge: int
    merge_within: float
    adapt: int
    restructure_from: float
    center: bool
    center_rate: float
    usage_rate: float
    start: str
    start_sweeps: int
    engine: common.Engine


def balanced(
    components: int,
    *,
    memory: int | None = None,
    features: str = "unit",
    temperature: ScheduleSpec = 0.01,
    rate: ScheduleSpec = 0.2,
    iterations: int = 3,
    every: int = 1,
    prior: str = "power",
    prior_exponent: float = 0.0,
    prior_floor: float = 0.25,
    split_merge: int = 0,
    merge_within: float = 0.025,
    adapt: int = 0,
    restructure_from: float = 0.2,
    center: bool = True,
    center_rate: float = 0.01,
    usage_rate: float = 0.01,
    start: str = "kmeans++",
    start_sweeps: int = 0,
    engine: common.Engine = common.LOCAL,
) -> Estimator:
    """K = `components` means, moved by balanced responsibilities over a ring of the last M teacher features.

    Rows are x_i = unit(h_i - c) with c the running mean of the features as read. At each step the batch enters the
    memory; `iterations` Sinkhorn iterations, warm-started from the last step's potentials f, bring

        gamma_ik = softmax_k(x_i . unit(mu_k) / temperature + f_k),   sum_i gamma_ik -> M prior_k,

    and mu_k <- mu_k + rate * M' / M * (sum_i gamma_ik x_i / sum_i gamma_ik - mu_k), M' <= M the rows that the memory
    holds (while it fills, its few rows must not pull all components onto themselves).

    `statistics` are sums over the rows of the *batch* under the current potentials: what the estimator reports. The
    sweep over the memory is in `update`, since a memory is not a sum over rows.

    Options, each with its reason:
      memory: M, default 4 K; at least 2 K: with fewer rows components cannot each own some. Twice as many rows keep
        means apart that share few (docs/results/diversity_omniglot.md), at the same cost with `every=0`.
      features: 'unit' or 'raw', as the objective reads them: the centre is in these units.
      temperature: entropy of the plan, in units of cosine. Blunt plans (0.05) blur the means together; 0.01 kept 90% of
        components apart in trials. A schedule may anneal it; while plans are blunt, an encoder that looks at the
        codebook learns little (docs/results/diversity_omniglot.md).
      rate: how far means go to their evidence; the encoder drifts, so the old is forgotten in 1 / rate sweeps.
      every: sweep the memory every so many steps; a sweep costs M K D, whatever the batch. 0: every max(1, M / (8 N))
        steps, so that a row is swept over about eight times while it is in the memory: with M = 4 K the cost of a step
        then grows with K, not with its square, and does not depend on how the same images are cut into batches.
      prior: 'power': prior_k proportional to (k + 1)^-prior_exponent, 0 is uniform. Equal shares cut the classes of the
        head into many pieces and press those of the tail into one component with others; a power law gives components
        of every size, whatever the data's own law. 'estimated': the data's: prior_k is the running mean (rate
        `usage_rate`) of sum_i softmax_k(x_i . unit(mu_k) / temperature) / N, without potentials, but never below
        prior_floor / K before it is normalised: without a floor it is the plain mixture again, whose weak die.
      split_merge: components a sweep, at most, that repeat another one (within cosine distance `merge_within`) and
        become badly explained rows of the memory instead. Balance keeps all components alive, not distinct: two may
        share one place between them. `restructure.split_and_merge` has the rule.
      adapt: components a sweep, at most, that are switched off, and as many on, so that K is what the memory gives
        evidence for, `components` at most ("how many prototypes do I need?"): `restructure.adapt` has the rule, a BIC.
        More memory can justify more components. Only with equal masses, and not beside split_merge.
      restructure_from: fraction of the run before which neither acts: annealing begins with all components together.
      start: 'kmeans++' or 'sample' on M teacher rows, which also fill the memory; 'random': directions, empty memory.
      start_sweeps: EM sweeps (rate 1, the first temperature) over these rows before the first step. Seeds are single
        rows; after a few sweeps a mean is the mean of what it answers for.

    State: components {mean [K,D], potential [K] (temperature * f: comparable while the temperature anneals),
    log_prior [K], usage [K]; mass [K] with the estimated prior, active bool [K] with adapt}; memory {features [M,D]
    as read, written [M] (step, -1 empty)}; shared {center, cursor, temperature, updates, total_steps}. Raises
    ValueError or TypeError for any option out of range.
    """
    count = common.check_count("balanced, components", components)
    size = MEMORY * count if memory is None else common.check_count("balanced, memory", memory)
    if size < 2 * count:
        raise ValueError(
            f"balanced, memory: expected at least 2 x components = {2 * count} rows, so that each component can own "
            f"some, got {size}."
        )
    options = _Options(
        components=count,
        memory=size,
        reading=common.check_reading("balanced", features),
        temperature=make_schedule(temperature, what="balanced, temperature"),
        rate=make_schedule(rate, what="balanced, rate"),
        iterations=common.check_count("balanced, iterations", iterations),
        every=common.check_count("balanced, every", every, 0),
        exponent=_exponent(prior_exponent),
        estimated=check_choice("balanced, prior", prior, ("power", "estimated")) == "estimated",
        prior_floor=common.check_share("balanced, prior_floor", prior_floor),
        split_merge=common.check_count("balanced, split_merge", split_merge, 0),
        merge_within=common.check_share("balanced, merge_within", merge_within),
        adapt=common.check_count("balanced, adapt", adapt, 0),
        restructure_from=common.check_share("balanced, restructure_from", restructure_from, zero=True),
        center=bool(center),
        center_rate=common.check_share("balanced, center_rate", center_rate),
        usage_rate=common.check_share("balanced, usage_rate", usage_rate),
        start=check_choice("balanced, start", start, seeding.METHODS),
        start_sweeps=common.check_count("balanced, start_sweeps", start_sweeps, 0),
        engine=engine,
    )
    if options.estimated and options.exponent:
        raise ValueError(f"balanced: prior='estimated' takes no prior_exponent, got {options.exponent}.")
    if options.adapt and (options.estimated or options.exponent or options.split_merge):
        raise ValueError("balanced: adapt needs equal masses and no split_merge; leave prior and split_merge out.")
    return _build(options)


def _exponent(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"balanced, prior_exponent: expected a finite number of at least 0, got {value!r}.")
    return float(value)


def _build(options: _Options) -> Estimator:
    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        features, mask = common.read_rows(rows, options.reading)
        centered = spherical.centered(S, features)
        queries, prototypes, bias = _scores(S, centered)
        moments, lse = options.engine.accumulate(queries, prototypes, bias, centered, mask, second="none")
        logits = jnp.sum(moments.first * prototypes) / S["shared"]["temperature"] + jnp.sum(moments.count * bias)
        plain = common.row_statistics(features, mask)
        stats = {**plain, "count": moments.count, "entropy": jnp.sum(jnp.where(mask, lse, 0.0)) - logits}
        if options.estimated:
            free, _ = options.engine.accumulate(
                queries, prototypes, jnp.zeros_like(bias), centered, mask, second="none"
            )
            stats["free"] = free.count
        return stats

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        features, mask = common.read_rows(rows, options.reading)
        count = stats["rows"]
        temperature, rate = options.temperature(common.fraction(S, step)), options.rate(common.fraction(S, step))
        new = remember(S, features, mask, step)
        new = {**new, "shared": {**new["shared"], "temperature": temperature}}
        if options.estimated:
            new = {**new, "components": _with_estimated_prior(new["components"], stats, options)}
        late = common.fraction(S, step) >= options.restructure_from
        every = options.every or turnover(options.memory, features.shape[0])
        if every == 1:
            new, swept = _sweep(new, rate, options, late, key)
        else:
            nothing = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype),
                jax.eval_shape(lambda s: _sweep(s, rate, options, late, key)[1], new),
            )
            new, swept = jax.lax.cond(
                jnp.asarray(step) % every == 0,
                lambda s: _sweep(s, rate, options, late, key),
                lambda s: (s, nothing),
                new,
            )
        new = spherical.follow(new, stats, options.usage_rate, options.center_rate if options.center else None)
        held = jnp.mean((new["memory"]["written"] >= 0).astype(features.dtype))
        info: dict[str, Any] = {
            **common.row_info(stats),
            **common.usage_info(stats["count"], new["components"]["usage"], count, new["components"].get("active")),
            "conditional_entropy": (jnp.maximum(stats["entropy"], 0.0), count),
            "max_responsibility": common.max_responsibility(
                lambda x: _scores(S, x), spherical.centered(S, features), mask
            ),
            "memory_fill": held,
            "temperature": temperature,
            "rate": rate,
        }
        info |= {k: v if every == 1 else (v, jnp.asarray(step) % every == 0) for k, v in swept.items()}
        return common.keep_if_empty(count, new, S), common.report(info, count)

    def start(S: PyTree, rows: Mapping[str, Array], key: Key) -> PyTree:
        features, mask = common.read_rows(rows, options.reading)
        sums = common.row_statistics(features, mask)
        new = remember(S, features, mask, jnp.zeros((), jnp.int32))
        if options.center:
            center = sums["feature_sum"] / jnp.maximum(sums["rows"], 1.0)
            new["shared"] = {**new["shared"], "center": center, "updates": jnp.ones((), features.dtype)}
        seeds = seeding.seed_components(spherical.centered(new, features), mask, options.components, key, options.start)
        new["components"] = {**new["components"], "mean": seeds.means}
        whole = jnp.ones((), features.dtype)
        new = jax.lax.fori_loop(0, options.start_sweeps, lambda _, s: _sweep(s, whole, options)[0], new)
        return common.keep_if_empty(sums["rows"], new, S)

    data = options.start != "random"
    return Estimator(
        lambda key, spec: _initial(key, spec, options),
        statistics,
        update,
        _codebooks if options.adapt else spherical.codebooks,
        common.no_head,
        options.memory if data else 0,
        start if data else common.no_start,
    )


def _initial(key: Key, spec: EstimatorSpec, options: _Options) -> PyTree:
    dtype = common.float_dtype()
    zero = jnp.zeros((), dtype)
    prior = jax.nn.log_softmax(-options.exponent * jnp.log(jnp.arange(1, options.components + 1).astype(dtype)))
    more = {"mass": jnp.exp(prior)} if options.estimated else {}
    more |= {"active": jnp.ones((options.components,), bool)} if options.adapt else {}
    return {
        "components": {
            "mean": common.random_directions(key, options.components, spec.dim),
            "potential": jnp.zeros((options.components,), dtype),
            "log_prior": prior,
            "usage": jnp.exp(prior),
            **more,
        },
        "memory": empty_memory(options.memory, spec.dim),
        "shared": {
            **common.shared_start(spec),
            "center": jnp.zeros((spec.dim,), dtype),
            "cursor": jnp.zeros((), jnp.int32),
            "temperature": options.temperature(zero),
            "updates": zero,
        },
    }


def empty_memory(size: int, dim: int) -> PyTree:
    """The ring before its first row: features [size,dim], written [size] (the step; -1: empty)."""
    return {"features": jnp.zeros((size, dim), common.float_dtype()), "written": jnp.full((size,), -1, jnp.int32)}


def remember(S: PyTree, features: Array, mask: Array, step: Array | int) -> PyTree:
    """The state with the unmasked rows of features [N,D] written over the oldest of the ring (the last M if N > M)."""
    memory, cursor = S["memory"], S["shared"]["cursor"]
    size = memory["features"].shape[0]
    rank = jnp.cumsum(mask.astype(jnp.int32)) - 1
    number = rank[-1] + 1
    kept = mask & (rank >= number - size)
    place = jnp.where(kept, (cursor + rank) % size, size)  # out of range: dropped
    stamp = jnp.broadcast_to(jnp.asarray(step, jnp.int32), place.shape)
    memory = {
        "features": memory["features"].at[place].set(features, mode="drop"),
        "written": memory["written"].at[place].set(stamp, mode="drop"),
    }
    return {**S, "memory": memory, "shared": {**S["shared"], "cursor": (cursor + number) % size}}


def _scores(S: PyTree, centered: Array) -> tuple[Array, Array, Array]:
    temperature = S["shared"]["temperature"]
    return centered / temperature, unit(S["components"]["mean"]), S["components"]["potential"] / temperature


def _with_estimated_prior(components: PyTree, stats: PyTree, options: _Options) -> PyTree:
    """Components whose prior follows the mass that they would have without potentials."""
    share = stats["free"] / jnp.maximum(stats["rows"], 1.0)
    mass = components["mass"] + options.usage_rate * (share - components["mass"])
    raised = jnp.maximum(mass, options.prior_floor / options.components)
    return {**components, "mass": mass, "log_prior": jnp.log(raised / jnp.sum(raised))}


def _codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
    """Those of `spherical`, without the components that are off."""
    book, _ = spherical.codebooks(S, head)
    off = jnp.full((), OFF, book.bias.dtype)
    return common.fixed_codebooks(book.prototypes, jnp.where(S["components"]["active"], book.bias, off))


def _sweep(
    S: PyTree, rate: Array, options: _Options, late: Array | None = None, key: Key | None = None
) -> tuple[PyTree, dict[str, Array]]:
    """(state after one balanced E- and M-step over the memory; 'balance_error', the total-variation distance of its
    usage to the prior, and what the restructuring did). late: whether components may be restructured; None: never."""
    components, temperature = S["components"], S["shared"]["temperature"]
    valid = S["memory"]["written"] >= 0
    features = spherical.centered(S, S["memory"]["features"])
    prototypes, log_prior = unit(components["mean"]), components["log_prior"]
    potentials = options.engine.balanced_potentials(
        features,
        prototypes,
        log_prior,
        components["potential"] / temperature,
        temperature=temperature,
        iterations=options.iterations,
        mask=valid,
    )
    queries = features / temperature
    moments, _ = options.engine.accumulate(queries, prototypes, potentials, features, valid, second="none")
    number = jnp.sum(valid.astype(features.dtype))
    seen = moments.count > 1e-30
    target = moments.first / jnp.where(seen, moments.count, jnp.ones((), features.dtype))[:, None]
    step = jnp.where(seen[:, None], target - components["mean"], jnp.zeros((), features.dtype))
    new = {
        **components,
        "mean": components["mean"] + rate * (number / valid.shape[0]) * step,
        "potential": potentials * temperature,
    }
    usage = moments.count / jnp.maximum(number, 1.0)
    info = {"balance_error": 0.5 * jnp.sum(jnp.abs(usage - jnp.exp(log_prior)))}
    if late is not None and (options.split_merge or options.adapt):
        new, done = _restructured(new, moments, restructure.Memory(features, valid), late, key, options)
        info |= done
    return {**S, "components": new}, info


def _restructured(
    components: PyTree, moments: Any, rows: restructure.Memory, late: Array, key: Key | None, options: _Options
) -> tuple[PyTree, dict[str, Array]]:
    """(components, counts of what was done), as they are before `late`."""
    assert key is not None

    def moved(components: PyTree) -> tuple[PyTree, dict[str, Array]]:
        if options.adapt:
            return restructure.adapt(components, moments.count, moments.first, rows, key, options.adapt)
        new, number = restructure.split_and_merge(components, rows, key, options.split_merge, options.merge_within)
        return new, {"moved": number}

    names = ("merged", "born") if options.adapt else ("moved",)
    zero = jnp.zeros((), rows.x.dtype)
    return jax.lax.cond(late, moved, lambda same: (same, dict.fromkeys(names, zero)), components)
