"""What objectives share: checking their inputs when the recipe is built, and averages over unmasked rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from protojax.api import Array, EstimatorSpec, Key, Objective, PyTree
from protojax.ops.checks import accumulation_dtype
from protojax.ops.unit import unit

# Why an input may be missing, where the reason is worth saying.
_HINTS = {
    "head/prototypes": (
        "prototypes are not learned in a decoupled arm, so that a term on them would have no gradient: "
        "remove the term, or choose an estimator with a head ('learned', 'capi')"
    ),
    "student/tokens": "patch embeddings come with the term 'ibot' and a backbone that has patches (a vit_*)",
    "teacher": "the objective compares with a teacher: the recipe needs one",
}


def input_names(inputs: Mapping[str, Any] | Iterable[str]) -> frozenset[str]:
    """Names of what `inputs` holds, with '/' for what lies inside: {'head': {'prototypes': x}} gives 'head' and
    'head/prototypes'. Empty mappings hold nothing and have no name. An iterable of names is taken as it is."""
    if not isinstance(inputs, Mapping):
        return frozenset(inputs)
    names: set[str] = set()
    for key, value in inputs.items():
        inside = input_names(value) if isinstance(value, Mapping) else frozenset()
        if value is None or (isinstance(value, Mapping) and not inside):
            continue
        names |= {str(key)} | {f"{key}/{name}" for name in inside}
    return frozenset(names)


def check_inputs(objective: Objective, available: Mapping[str, Any] | Iterable[str]) -> None:
    """Raise ValueError, with both lists, unless everything that `objective.requires` is in `available` (a mapping as
    `loss` gets it, of arrays or shapes, or an iterable of names)."""
    names = input_names(available)
    missing = sorted(objective.requires - names)
    if not missing:
        return
    hints = [f"{name}: {_HINTS[name]}" for name in missing if name in _HINTS]
    raise ValueError(
        f"the objective needs inputs that the recipe does not give: missing {missing}; required "
        f"{sorted(objective.requires)}; available {sorted(names)}." + "".join(f" {hint}." for hint in hints)
    )


def nothing_learned(key: Key, spec: EstimatorSpec) -> PyTree:
    """No parameters of its own."""
    return {}


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of values [B] over unmasked rows; 0 when no row is left. Masked values may be NaN."""
    kept = jnp.where(mask.astype(bool), values, jnp.zeros((), values.dtype))
    return jnp.sum(kept) / jnp.maximum(jnp.sum(mask.astype(values.dtype)), 1.0)


def unit_rows(features: Array, mask: Array) -> Array:
    """Unit rows of features [V,B,D], float32 at least; masked images are zero whatever they held (a NaN that met the
    normalisation would come back in its gradient)."""
    kept = jnp.where(mask.astype(bool)[None, :, None], features, jnp.zeros((), features.dtype))
    return unit(kept.astype(accumulation_dtype(features)))


def once(value: Array | float, mask: Array) -> tuple[Array, Array]:
    """A metric (sum, count) that counts once if any row is unmasked."""
    present = jnp.any(mask.astype(bool)).astype(jnp.result_type(float))
    return jnp.asarray(value, present.dtype) * present, present


def whole(what: str, value: int, least: int) -> int:
    """`value` as an integer of at least `least`; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what}: expected an integer of at least {least}, got {value!r}.")
    return value


def positive(what: str, value: float) -> float:
    """`value` as a positive float; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{what}: expected a positive number, got {value!r}.")
    return float(value)
