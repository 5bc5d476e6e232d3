"""A weighted sum of objectives is an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Array, EstimatorSpec, Key, Metrics, Objective, PyTree
from protojax.objectives import common
from protojax.schedules import Schedule, ScheduleSpec, is_constant, make_schedule


def combine(*, total_steps: int | None = None, **terms: tuple[ScheduleSpec, Objective]) -> Objective:
    """sum_name weight_name * loss_name, given as name=(weight, objective).

    weight: a number or a schedule over the run (which needs `total_steps`). The result requires what any term does;
    its parameters are {name: the term's}; each term gets a key of its own, which does not depend on the order or on
    the other terms' number. Metrics: 'loss' (the sum), and each term's under 'name/'. Its `terms` are the weighted
    terms, and 'name/inner' for those of a term that has its own.

    Raises ValueError for no term, a schedule without total_steps; TypeError for anything but (weight, objective).
    """
    if not terms:
        raise ValueError("combine: expected at least one name=(weight, objective), got none.")
    weights: dict[str, Schedule] = {}
    objectives: dict[str, Objective] = {}
    for name, term in sorted(terms.items()):
        if not isinstance(term, tuple) or len(term) != 2 or not isinstance(term[1], Objective):
            raise TypeError(f"combine, {name}: expected (weight, objective), got {term!r}.")
        if total_steps is None and not is_constant(term[0]):
            raise ValueError(f"combine, {name}: a schedule as weight needs total_steps, got {term[0]!r}.")
        weights[name] = make_schedule(term[0], total_steps or 1, what=f"combine, weight of {name}")
        objectives[name] = term[1]
    moving = any(not is_constant(weight) for weight, _ in terms.values())

    def own_key(key: Key, name: str) -> Key:
        # Folding the name in byte by byte: the key of a term is the same whatever stands beside it.
        for byte in name.encode():
            key = jax.random.fold_in(key, byte)
        return key

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        params = {name: objective.init(own_key(key, name), spec) for name, objective in objectives.items()}
        return {name: value for name, value in params.items() if value}

    def loss(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        total = jnp.zeros((), jnp.result_type(float))
        metrics: Metrics = {}
        for name, objective in objectives.items():
            own = dict(inputs)
            if "key" in inputs:
                own["key"] = own_key(inputs["key"], name)
            value, numbers = objective.loss(params.get(name, {}), own)
            weight = weights[name](inputs["step"] if moving else 0)
            total = total + weight * value.astype(total.dtype)
            metrics.update({f"{name}/{metric}": number for metric, number in numbers.items()})
        metrics["loss"] = common.once(total, inputs["mask"])
        return total, metrics

    def parts(params: PyTree, inputs: Mapping[str, Any]) -> dict[str, tuple[Array, Array]]:
        found: dict[str, tuple[Array, Array]] = {}
        for name, objective in objectives.items():
            own = dict(inputs)
            if "key" in inputs:
                own["key"] = own_key(inputs["key"], name)
            weight = weights[name](inputs["step"] if moving else 0)
            if objective.terms is None:
                value, _ = objective.loss(params.get(name, {}), own)
                found[name] = weight, weight * value.astype(weight.dtype)
                continue
            for inner, (inner_weight, value) in objective.terms(params.get(name, {}), own).items():
                found[f"{name}/{inner}"] = weight * inner_weight, weight * value.astype(weight.dtype)
        return found

    several = len(objectives) > 1 or any(objective.terms for objective in objectives.values())
    requires = frozenset().union(*(objective.requires for objective in objectives.values())) | {"mask"}
    needed = requires | ({"step"} if moving else frozenset())
    return Objective(needed, init, loss, parts if several else None)
