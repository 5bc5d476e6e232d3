"""What estimators share: how rows are read, the engine that sweeps over prototypes, the numbers that they report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import Array, Codebook, EstimatorSpec, Key, Metrics, PyTree
from protojax.ops import lse as lse_ops
from protojax.ops import moments, transport
from protojax.ops.unit import unit
from protojax.schedules import check_choice

READINGS = ("raw", "unit")


class Engine(NamedTuple):
    """The sweeps over prototypes that an estimator calls: signatures of `ops.moments.accumulate`,
    `ops.transport.balanced_potentials` and `ops.moments.gaussian_moments`. A sharded engine has the same ones and
    returns the same numbers."""

    accumulate: Callable[..., tuple[moments.Moments, Array]]
    balanced_potentials: Callable[..., Array]
    gaussian_moments: Callable[..., tuple[moments.Moments, Array]] = moments.gaussian_moments


LOCAL = Engine(moments.accumulate, transport.balanced_potentials)


# ------------------------------------------------------------------------------------------------- checking
def check_reading(what: str, features: str) -> str:
    """How feature rows are read: 'raw' as they come, 'unit' normalised first. It must be how the objective reads
    them (CARP without temperature: raw; DINO and CARP with one: unit), since the codebook's bias is in its units."""
    return check_choice(f"{what}, features", features, READINGS)


def check_count(what: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least`; TypeError or ValueError naming the option."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what}: expected an integer, got {type(value).__name__} {value!r}.")
    if value < least:
        raise ValueError(f"{what}: expected an integer of at least {least}, got {value}.")
    return value


def check_share(what: str, value: float, *, zero: bool = False) -> float:
    """`value` in (0, 1], or [0, 1] with `zero`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what}: expected a number, got {type(value).__name__} {value!r}.")
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{what}: expected a number in {'[0, 1]' if zero else '(0, 1]'}, got {value}.")
    return float(value)


# ----------------------------------------------------------------------------------------------------- rows
def float_dtype() -> jnp.dtype:
    """dtype of estimator state: float32, or float64 under x64."""
    return jnp.dtype(jnp.result_type(float))


def read_rows(rows: Mapping[str, Array], reading: str) -> tuple[Array, Array]:
    """(features [N,D] in the state's dtype, unit rows if asked; mask [N] bool). No gradient; masked rows become zero,
    whatever they held."""
    features, mask = jax.lax.stop_gradient(rows["features"]), rows["mask"].astype(bool)
    if features.ndim != 2 or mask.shape != features.shape[:1]:
        raise ValueError(
            f"rows: expected features [N, D] and mask [N], got {features.shape} and {mask.shape}; "
            "flatten views and tokens into rows first."
        )
    features = features.astype(float_dtype())
    features = jnp.where(mask[:, None], features, jnp.zeros((), features.dtype))
    return (unit(features) if reading == "unit" else features), mask


def row_statistics(features: Array, mask: Array) -> dict[str, Array]:
    """Sums over unmasked rows: 'rows' N, 'feature_sum' [D], 'square_sum' sum_i |h_i|^2."""
    weight = mask.astype(features.dtype)
    kept = features * weight[:, None]
    return {"rows": jnp.sum(weight), "feature_sum": jnp.sum(kept, axis=0), "square_sum": jnp.sum(kept * features)}


def random_directions(key: Key, count: int, dim: int) -> Array:
    """[count, dim] independent uniform unit vectors."""
    return unit(jax.random.normal(key, (count, dim), float_dtype()))


def keep_if_empty(rows: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new`, or `old` leaf by leaf when no row was unmasked: an empty batch is no evidence, also against the past."""
    seen = rows > 0
    return jax.tree.map(lambda n, o: jnp.where(seen, n, o), new, old)


def running(average: Array, value: Array, rate: float | Array, updates: Array) -> Array:
    """Running mean with rate max(rate, 1 / (updates + 1)): a plain mean at first, so that the initial value has no
    weight, then an exponential one."""
    rate = jnp.maximum(jnp.asarray(rate, average.dtype), 1.0 / (updates + 1.0))
    return average + rate * (value - average)


def fraction(S: PyTree, step: Array | int) -> Array:
    """Share of the run that lies behind `step`."""
    return jnp.asarray(step).astype(float_dtype()) / S["shared"]["total_steps"]


def shared_start(spec: EstimatorSpec) -> dict[str, Array]:
    """The replicated state that every estimator with schedules carries."""
    return {"total_steps": jnp.asarray(max(spec.total_steps, 1), float_dtype())}


# -------------------------------------------------------------------------------------------------- reports
def describe(S: PyTree) -> dict[str, Array]:
    """What evaluations may know about any estimator of this package: 'usage' [K] (its own, EMA of the mean
    responsibility), 'center' [D] (mean feature that it subtracts) and 'active' bool [K] (prototypes that are not
    switched off), where it has them."""
    components = S["components"]
    found = {
        "usage": components.get("usage"),
        "center": S["shared"].get("center"),
        "active": components.get("active"),
    }
    return {name: value for name, value in found.items() if value is not None}


def perplexity(shares: Array) -> Array:
    """exp(-sum_k s_k ln s_k) of shares [K] that sum to one: 1 = one component does everything, K = all work alike."""
    safe = jnp.where(shares > 0, shares, jnp.ones((), shares.dtype))
    return jnp.exp(-jnp.sum(shares * jnp.log(safe)))


def report(values: Mapping[str, Array | tuple[Array, Array]], rows: Array) -> Metrics:
    """Metrics 'estimator/NAME' -> (sum, count): a plain value counts once, and nothing counts for an empty batch."""
    present = (rows > 0).astype(float_dtype())
    out: Metrics = {}
    for name, value in values.items():
        total, count = value if isinstance(value, tuple) else (value, jnp.ones((), present.dtype))
        total = jnp.where(present > 0, jnp.asarray(total, present.dtype), jnp.zeros((), present.dtype))
        out[f"estimator/{name}"] = (total, jnp.asarray(count, present.dtype) * present)
    return out


def row_info(stats: Mapping[str, Array], center: Array | None = None) -> dict[str, Array]:
    """'common_direction': |mean h|^2 / mean |h|^2, the share of the features' energy in one common direction (1: a
    cone so narrow that all rows look alike). `center`: what had been subtracted before the statistics were taken."""
    rows = jnp.maximum(stats["rows"], 1.0)
    mean, energy = stats["feature_sum"] / rows, stats["square_sum"] / rows
    if center is not None:
        energy = energy + 2.0 * jnp.sum(center * mean) + jnp.sum(center * center)
        mean = mean + center
    return {"common_direction": jnp.sum(mean * mean) / jnp.maximum(energy, jnp.finfo(mean.dtype).tiny)}


def usage_info(counts: Array, usage: Array, rows: Array, active: Array | None = None) -> dict[str, Array]:
    """Marginal usage of this batch and of the past: perplexities, and the share of components whose usage is below
    1 / (10 K). active bool [K]: those that are on, of which K then is the number."""
    batch = counts / jnp.maximum(jnp.sum(counts), jnp.finfo(counts.dtype).tiny)
    if active is not None:
        number = jnp.maximum(jnp.sum(active.astype(usage.dtype)), 1.0)
        idle = jnp.sum((active & (usage < 0.1 / number)).astype(usage.dtype)) / number
        return {**usage_info(counts, usage, rows), "dead_share": idle, "active": number}
    dead = usage < 0.1 / usage.shape[0]
    return {
        "batch_perplexity": perplexity(batch),
        "usage_perplexity": perplexity(usage / jnp.maximum(jnp.sum(usage), jnp.finfo(usage.dtype).tiny)),
        "dead_share": jnp.mean(dead.astype(usage.dtype)),
    }


def max_responsibility(
    scores: Callable[[Array], tuple[Array, Array, Array]], features: Array, mask: Array, sample: int = 64
) -> tuple[Array, Array]:
    """(sum, count) over at most about `sample` rows of max_k of the responsibilities of scores(features).

    The largest logit is read off a sharpened log-sum-exp, LSE(1000 l) / 1000, which exceeds it by at most
    ln(K) / 1000 (1% at K = 65,536): the sweep has no maximum of its own and needs none for so small a sample.
    """
    stride = max(1, features.shape[0] // sample)
    features, mask = features[::stride], mask[::stride]
    queries, prototypes, bias = scores(features)
    sharp = 1000.0
    top = lse_ops.lse(queries * sharp, prototypes, bias * sharp) / sharp
    largest = jnp.minimum(jnp.exp(top - lse_ops.lse(queries, prototypes, bias)), 1.0)
    weight = mask.astype(largest.dtype)
    return jnp.sum(jnp.where(mask, largest, jnp.zeros((), largest.dtype))), jnp.sum(weight)


# ------------------------------------------------------------------------------------------------ codebooks
def fixed_codebooks(prototypes: Array, bias: Array) -> tuple[Codebook, Codebook]:
    """The same codebook for teacher and student, cut off from every gradient: the decoupled regime."""
    book = Codebook(jax.lax.stop_gradient(prototypes), jax.lax.stop_gradient(bias))
    return book, book


def no_head(key: Key, spec: EstimatorSpec) -> PyTree:
    """Nothing for the optimiser to learn."""
    return {}


def no_start(S: PyTree, rows: Mapping[str, Array], key: Key) -> PyTree:
    """No initialisation from data."""
    return S
