"""Partly decoupled prototypes: a teacher clustering head with a loss of its own, and a student head learned jointly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from protojax.api import Array, Codebook, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common
from protojax.estimators.learned import head_prototypes
from protojax.ops.lse import soft_cross_entropy
from protojax.ops.unit import unit
from protojax.schedules import ScheduleSpec, make_schedule


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
    count = common.check_count("capi, components", components)
    iterations = common.check_count("capi, iterations", iterations)
    for name, value in (("target", target_temperature), ("prediction", prediction_temperature)):
        if not value > 0:
            raise ValueError(f"capi, {name}_temperature: expected a positive number, got {value!r}.")
    common.check_share("capi, usage_rate", usage_rate)
    rate_at = make_schedule(learning_rate, what="capi, learning_rate")
    adam = optax.scale_by_adam(b1=b1, b2=b2)

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        prototypes = common.random_directions(key, count, spec.dim)
        equal = jnp.full((count,), 1.0 / count, prototypes.dtype)
        moments = {"mu": jnp.zeros_like(prototypes), "nu": jnp.zeros_like(prototypes)}
        shared = {**common.shared_start(spec), "updates": jnp.zeros((), jnp.int32)}
        return {"components": {"prototypes": prototypes, **moments, "usage": equal}, "memory": {}, "shared": shared}

    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        features, mask = common.read_rows(rows, "unit")
        prototypes, bias = unit(S["components"]["prototypes"]), jnp.zeros((count,), features.dtype)
        queries = features / prediction_temperature
        moments, lse = engine.accumulate(queries, prototypes, bias, features, mask, second="none")
        logits = jnp.sum(moments.first * prototypes) / prediction_temperature
        entropy = jnp.sum(jnp.where(mask, lse, 0.0)) - logits
        return {**common.row_statistics(features, mask), "count": moments.count, "entropy": entropy}

    def clustering_loss(prototypes: Array, features: Array, mask: Array) -> Array:
        keys = unit(prototypes)
        fixed = jax.lax.stop_gradient(keys)
        none = jnp.zeros((count,), features.dtype)
        potentials = engine.balanced_potentials(
            features,
            fixed,
            jnp.full((count,), -jnp.log(float(count)), features.dtype),
            none,
            temperature=target_temperature,
            iterations=iterations,
            mask=mask,
        )
        losses = soft_cross_entropy(
            features / prediction_temperature, keys, none, features / target_temperature, fixed, potentials
        )
        weight = mask.astype(features.dtype)
        return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1.0)

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        features, mask = common.read_rows(rows, "unit")
        components, shared = S["components"], S["shared"]
        loss, gradient = jax.value_and_grad(clustering_loss)(components["prototypes"], features, mask)
        state = optax.ScaleByAdamState(count=shared["updates"], mu=components["mu"], nu=components["nu"])
        # optax raises a Python float to an int32 power: promotion is by hand everywhere but there.
        with jax.numpy_dtype_promotion("standard"):
            direction, state = adam.update(gradient, state)
        rate = rate_at(common.fraction(S, step))
        moved = components["prototypes"] - rate * (direction + weight_decay * components["prototypes"])
        usage = stats["count"] / jnp.maximum(stats["rows"], 1.0)
        usage = components["usage"] + usage_rate * (usage - components["usage"])
        new = {
            "components": {"prototypes": moved, "mu": state.mu, "nu": state.nu, "usage": usage},
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

    def head(key: Key, spec: EstimatorSpec) -> PyTree:
        return {"prototypes": common.random_directions(key, count, spec.dim)}

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        prediction = head_prototypes(head, count)
        none = jnp.zeros((count,), prediction.dtype)
        target, _ = common.fixed_codebooks(unit(S["components"]["prototypes"]), none)
        return target, Codebook(prediction, none)

    return Estimator(init, statistics, update, codebooks, head, 0, common.no_start)
