"""Partly decoupled prototypes: a teacher clustering head with a loss of its own, and a student head learned jointly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from protojax.api import Array, Codebook, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common
from protojax.estimators.learned import head_prototypes
from protojax.ops.lse import soft_cross_entropy
from protojax.ops.unit import unit
from protojax.schedules import Schedule, ScheduleSpec, make_schedule


def capi(
    components: int,
    *,
    target_temperature: float = 0.06,
    prediction_temperature: float = 0.12,
    iterations: int = 3,
    learning_rate: ScheduleSpec = 1e-3,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    usage_rate: float = 0.01,
    engine: common.Engine = common.LOCAL,
) -> Estimator:
    """The *partial* reference, after CAPI (Darcet et al. 2025): K = `components` teacher prototypes W in the state.

    Each step, on unit teacher features x_i with N unmasked rows, Sinkhorn potentials f (uniform column masses, from
    zero) give targets t_i = softmax(x_i . unit(w) / target_temperature + f), and W takes one AdamW step on

        L_C = -1/N sum_i sum_k t_ik ln softmax_k(x_i . unit(w) / prediction_temperature).

    codebooks: target = W; prediction = head, K x D parameters that the encoder's optimiser learns from the objective.
    The gradient of L_C ends at W: features are the teacher's. Where CAPI clusters patches position by position, this
    clusters whatever rows the recipe gives, with one balance over all of them.

    weight_decay is 0 by default: W is read through normalisation, which makes decay a change of the learning rate.
    State: components {prototypes, mu, nu [K,D] (Adam's moments), usage [K]}; shared {updates, total_steps}.
    Raises ValueError or TypeError for any option out of range.
    """
    options = _Options(
        components=common.check_count("capi, components", components),
        target=_positive("target_temperature", target_temperature),
        prediction=_positive("prediction_temperature", prediction_temperature),
        iterations=common.check_count("capi, iterations", iterations),
        rate=make_schedule(learning_rate, what="capi, learning_rate"),
        weight_decay=common.check_share("capi, weight_decay", weight_decay, zero=True),
        adam=optax.scale_by_adam(b1=b1, b2=b2),
        usage_rate=common.check_share("capi, usage_rate", usage_rate),
        engine=engine,
    )
    count = options.components

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        prediction = head_prototypes(head, count)
        none = jnp.zeros((count,), prediction.dtype)
        target, _ = common.fixed_codebooks(unit(S["components"]["prototypes"]), none)
        return target, Codebook(prediction, none)

    return Estimator(
        lambda key, spec: _initial(key, spec, count),
        lambda S, rows: _statistics(S, rows, options),
        lambda S, stats, rows, step, key: _update(S, stats, rows, step, options),
        codebooks,
        lambda key, spec: {"prototypes": common.random_directions(key, count, spec.dim)},
        0,
        common.no_start,
    )


class _Options(NamedTuple):
    """The options of `capi`, checked."""

    components: int
    target: float
    prediction: float
    iterations: int
    rate: Schedule
    weight_decay: float
    adam: optax.GradientTransformation
    usage_rate: float
    engine: common.Engine


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"capi, {name}: expected a positive number, got {value!r}.")
    return float(value)


def _initial(key: Key, spec: EstimatorSpec, count: int) -> PyTree:
    prototypes = common.random_directions(key, count, spec.dim)
    equal = jnp.full((count,), 1.0 / count, prototypes.dtype)
    moments = {"mu": jnp.zeros_like(prototypes), "nu": jnp.zeros_like(prototypes)}
    shared = {**common.shared_start(spec), "updates": jnp.zeros((), jnp.int32)}
    return {"components": {"prototypes": prototypes, **moments, "usage": equal}, "memory": {}, "shared": shared}


def _statistics(S: PyTree, rows: Mapping[str, Array], options: _Options) -> PyTree:
    """Usage and entropy of the batch under the prediction temperature: for the report."""
    features, mask = common.read_rows(rows, "unit")
    prototypes, bias = unit(S["components"]["prototypes"]), jnp.zeros((options.components,), features.dtype)
    queries = features / options.prediction
    moments, lse = options.engine.accumulate(queries, prototypes, bias, features, mask, second="none")
    entropy = jnp.sum(jnp.where(mask, lse, 0.0)) - jnp.sum(moments.first * prototypes) / options.prediction
    return {**common.row_statistics(features, mask), "count": moments.count, "entropy": entropy}


def _clustering_loss(prototypes: Array, features: Array, mask: Array, options: _Options) -> Array:
    """L_C of `capi`, differentiable in the prototypes."""
    keys = unit(prototypes)
    fixed = jax.lax.stop_gradient(keys)
    none = jnp.zeros((options.components,), features.dtype)
    uniform = jnp.full((options.components,), -math.log(options.components), features.dtype)
    potentials = options.engine.balanced_potentials(
        features, fixed, uniform, none, temperature=options.target, iterations=options.iterations, mask=mask
    )
    losses = soft_cross_entropy(features / options.prediction, keys, none, features / options.target, fixed, potentials)
    weight = mask.astype(features.dtype)
    return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def _update(
    S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, options: _Options
) -> tuple[PyTree, Metrics]:
    features, mask = common.read_rows(rows, "unit")
    components, shared = S["components"], S["shared"]
    prototypes = components["prototypes"]
    loss, gradient = jax.value_and_grad(_clustering_loss)(prototypes, features, mask, options)
    state = optax.ScaleByAdamState(count=shared["updates"], mu=components["mu"], nu=components["nu"])
    # optax raises a Python float to an int32 power: promotion is by hand everywhere but there.
    with jax.numpy_dtype_promotion("standard"):
        direction, state = options.adam.update(gradient, state)
    rate = options.rate(common.fraction(S, step))
    usage = stats["count"] / jnp.maximum(stats["rows"], 1.0)
    usage = components["usage"] + options.usage_rate * (usage - components["usage"])
    new = {
        "components": {
            "prototypes": prototypes - rate * (direction + options.weight_decay * prototypes),
            "mu": state.mu,
            "nu": state.nu,
            "usage": usage,
        },
        "memory": S["memory"],
        "shared": {**shared, "updates": state.count},
    }
    info: dict[str, Any] = {
        **common.row_info(stats),
        **common.usage_info(stats["count"], usage, stats["rows"]),
        "conditional_entropy": (jnp.maximum(stats["entropy"], 0.0), stats["rows"]),
        "clustering_loss": loss,
        "rate": rate,
    }
    return common.keep_if_empty(stats["rows"], new, S), common.report(info, stats["rows"])
