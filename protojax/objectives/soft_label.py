"""Losses of classifiers of label distributions: soft cross-entropy and the remedies that were proposed against
collapse.

B samples, C categories, z [B,C] logits after normalisation and temperature, p = softmax(z), t' the smoothed targets.

    l_i = w_i sum_j (1 - p_ij)^gamma t'_ij (ln t'_ij - ln p_ij)          'kl'
          + entropy_weight pen(max(0, H_min - H(p_i)))                    'entropy'     pen(d) = d or d^2
          + maxsup_weight max_j z_ij                                      'maxsup'      only where it exceeds a
          threshold + entropy_matched_weight (H(p_i) - H(t_i))^2                    'matched'
    and, over the batch, spread_weight mean_j max(0, std_i t_ij / 2 - std_i p_ij)        'spread'

A term of weight 0 is not built: 0 * NaN is NaN, and a standard deviation has no gradient where all rows are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Array, Metrics, Objective, PyTree
from protojax.objectives import common
from protojax.ops import simplex
from protojax.schedules import check_choice

FLOOR = 1e-9  # smoothed targets are raised to it, so that ln t' is finite
PENALTIES = ("linear", "quadratic")
WEIGHTINGS = ("none", "sample", "category")


def soft_label(
    *,
    categories: int,
    label_smoothing: float = 0.0,
    entropy_weight: float = 0.0,
    entropy_penalty: str = "quadratic",
    min_entropy: float = 0.0,
    maxsup_weight: float = 0.0,
    maxsup_threshold: float | None = None,
    focal_gamma: float = 0.0,
    class_weighting: str = "none",
    class_weights: tuple[float, ...] = (),
    entropy_matched_weight: float = 0.0,
    spread_weight: float = 0.0,
) -> Objective:
    """The loss of the module's docstring, a mean over unmasked samples.

    label_smoothing eps: t' = (1 - eps) t + eps / C. class_weighting: 'sample', w_i = class_weights[argmax t_i];
    'category', the weights multiply the terms of the sum, which is then no divergence and may be negative. maxsup
    threshold: of the logit after temperature (None: always).

    inputs: student logits [B,C], batch targets [B,C], mask [B]. Metrics: loss, one a term, `cross_entropy`,
    entropies of prediction and target, `active` (share of samples below min_entropy), and largest, smallest logit
    and range.
    Raises ValueError for a weight below 0, smoothing outside [0, 1), an unknown form, or min_entropy above ln C.
    """
    simplex.check_categories(categories)
    weights = {"entropy": entropy_weight, "maxsup": maxsup_weight, "matched": entropy_matched_weight,
               "spread": spread_weight}  # fmt: skip
    for name, value in {**weights, "focal_gamma": focal_gamma}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"soft_label, {name}: expected a number >= 0, got {value!r}.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"soft_label, label_smoothing: expected a number in [0, 1), got {label_smoothing!r}.")
    if entropy_weight and not 0 <= min_entropy <= math.log(categories):
        raise ValueError(
            f"soft_label, min_entropy = {min_entropy!r} can never be met: the entropy of {categories} categories is at "
            f"most ln {categories} = {math.log(categories):.3f}. Give a number in [0, {math.log(categories):.3f}]."
        )
    check_choice("soft_label, entropy_penalty", entropy_penalty, PENALTIES)
    check_choice("soft_label, class_weighting", class_weighting, WEIGHTINGS)
    if class_weighting != "none" and len(class_weights) != categories:
        raise ValueError(
            f"soft_label, class_weights: expected one a category ({categories}), got {len(class_weights)}."
        )
    active = {name: float(weight) for name, weight in weights.items() if weight}

    def smoothed(targets: Array) -> Array:
        soft = (1.0 - label_smoothing) * targets + label_smoothing / categories
        soft = jnp.maximum(soft, FLOOR)
        return soft / jnp.sum(soft, axis=-1, keepdims=True)

    def weighted(targets: Array, terms: Array) -> Array:
        if class_weighting == "none":
            return jnp.sum(terms, axis=-1)
        table = jnp.asarray(class_weights, terms.dtype)
        if class_weighting == "category":
            return jnp.sum(terms * table[None, :], axis=-1)
        return table[jnp.argmax(targets, axis=-1)] * jnp.sum(terms, axis=-1)

    def pieces(inputs: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array], Array]:
        """(value of every term that is built, arrays for metrics, mask)."""
        mask = inputs["mask"]
        keep = mask.astype(bool)[:, None]
        logits = jnp.where(keep, inputs["student"]["logits"], 0.0)
        targets = jnp.where(keep, inputs["batch"]["targets"].astype(logits.dtype), 1.0 / categories)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        goal = smoothed(targets)
        terms = goal * (jnp.log(goal) - log_p)
        if focal_gamma:
            # -expm1 is 1 - p without cancellation; its power has no gradient at 0, where the term is 0 too
            terms = terms * jnp.maximum(-jnp.expm1(log_p), 1e-12) ** focal_gamma
        found = {"kl": common.masked_mean(weighted(targets, terms), mask)}
        h_p, h_t = simplex.entropy(log_p), simplex.entropy(jnp.log(jnp.maximum(targets, FLOOR)))
        short = jnp.maximum(min_entropy - h_p, 0.0)
        if "entropy" in active:
            found["entropy"] = common.masked_mean(short if entropy_penalty == "linear" else short**2, mask)
        top = jnp.max(logits, axis=-1)
        if "maxsup" in active:
            over = top if maxsup_threshold is None else jnp.where(top > maxsup_threshold, top, 0.0)
            found["maxsup"] = common.masked_mean(over, mask)
        if "matched" in active:
            found["matched"] = common.masked_mean((h_p - h_t) ** 2, mask)
        if "spread" in active:
            found["spread"] = _spread(jnp.exp(log_p), targets, mask)
        seen = {"logits": logits, "targets": targets, "log_p": log_p, "h_p": h_p, "h_t": h_t, "short": short}
        return found, seen, mask

    def loss(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        found, seen, mask = pieces(inputs)
        total = found["kl"]
        for name, weight in active.items():
            total = total + weight * found[name]
        logits, kept = seen["logits"], mask.astype(bool)
        mean = lambda values: common.masked_mean(values, mask)  # noqa: E731
        largest = jnp.max(jnp.where(kept, jnp.max(logits, axis=-1), -jnp.inf))
        smallest = jnp.min(jnp.where(kept, jnp.min(logits, axis=-1), jnp.inf))
        empty = ~jnp.any(kept)
        numbers = {
            **found,
            "cross_entropy": mean(-jnp.sum(seen["targets"] * seen["log_p"], axis=-1)),
            "prediction_entropy": mean(seen["h_p"]),
            "target_entropy": mean(seen["h_t"]),
            "active": mean((seen["short"] > 0).astype(logits.dtype)),
            "largest_logit": jnp.where(empty, 0.0, largest),
            "smallest_logit": jnp.where(empty, 0.0, smallest),
            "logit_range": mean(jnp.max(logits, axis=-1) - jnp.min(logits, axis=-1)),
        }
        return total, {"loss": common.once(total, mask), **{k: common.once(v, mask) for k, v in numbers.items()}}

    def terms(params: PyTree, inputs: Mapping[str, Any]) -> dict[str, tuple[Array, Array]]:
        found, _, _ = pieces(inputs)
        one = jnp.ones((), found["kl"].dtype)
        return {name: (active.get(name, 1.0) * one, active.get(name, 1.0) * value) for name, value in found.items()}

    return Objective(frozenset({"student/logits", "batch", "mask"}), common.nothing_learned, loss, terms)


def _spread(predictions: Array, targets: Array, mask: Array) -> Array:
    """mean_j max(0, std t_j / 2 - std p_j) over unmasked rows; std as sqrt(var + 1e-8), which has a gradient at 0."""

    def std(values: Array) -> Array:
        mean = jax.vmap(lambda column: common.masked_mean(column, mask), in_axes=1)(values)
        square = jax.vmap(lambda column: common.masked_mean(column, mask), in_axes=1)((values - mean[None, :]) ** 2)
        return jnp.sqrt(square + 1e-8)

    return jnp.mean(jnp.maximum(0.5 * std(targets) - std(predictions), 0.0))


def sample_weights(argmax_counts: tuple[int, ...], largest: float = 3.0) -> tuple[float, ...]:
    """w_j = min(largest, sqrt(N / N_j)), N_j the training samples whose largest target is j (none: `largest`)."""
    total = sum(argmax_counts)
    return tuple(min(largest, math.sqrt(total / n)) if n else largest for n in argmax_counts)
