"""The terms of the mixture of prompts, one by one: pure functions of the image's own class.

r [B,K] responsibilities, prompts [B,K,D] those of the image's class, weight [B] what each image counts (0: masked).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from protojax.ops.prompts import entropy

Array = jax.Array

FORMS = ("mean_square", "hinge")


def weighted_mean(values: Array, weight: Array) -> Array:
    """sum_b w_b v_b / sum_b w_b; 0 when nothing has weight. Masked values may be NaN."""
    kept = jnp.where(weight > 0, values, jnp.zeros((), values.dtype))
    return jnp.sum(kept * weight) / jnp.maximum(jnp.sum(weight), jnp.finfo(values.dtype).tiny)


def mixture(similarity: Array, assignment: Array, weight: Array) -> Array:
    """- mean_b sum_k g_bk s_bk: each prompt moves to the images that it owns. `assignment` carries no gradient."""
    return -weighted_mean(jnp.sum(assignment * similarity, axis=1), weight)


def diversity(prompts: Array, class_weight: Array, *, form: str = "mean_square", margin: float | None = None) -> Array:
    """Mean over pairs k < l of a class and over classes of cos^2, or of max(0, cos - margin)^2 ('hinge').

    class_weight [B] sums to one over the images of each class, so that every class present counts once. Raises
    ValueError for an unknown form and a hinge without margin.
    """
    if form not in FORMS:
        raise ValueError(f"diversity_form: expected one of {list(FORMS)}, got {form!r}.")
    if form == "hinge" and margin is None:
        raise ValueError("diversity_form='hinge' needs diversity_margin: cosines below it cost nothing.")
    count = prompts.shape[1]
    if count < 2:
        return jnp.zeros((), prompts.dtype)
    cosine = jnp.einsum("bkd,bld->bkl", prompts, prompts)
    excess = cosine if form == "mean_square" else jnp.maximum(cosine - (margin or 0.0), 0.0)
    off = 1.0 - jnp.eye(count, dtype=prompts.dtype)
    return weighted_mean(jnp.sum(excess**2 * off[None], axis=(1, 2)) / (count * (count - 1)), class_weight)


def mean_entropy(r: Array, weight: Array) -> Array:
    """mean_b H(r_b) in nats: 0 when every image is decided, ln K when none is."""
    return weighted_mean(entropy(r), weight)


def min_usage(r: Array, weight: Array, threshold: float) -> Array:
    """Mean over k with u_k < threshold of (threshold - u_k)^2, plus 0.1 mean_k (u_k - 1/K)^2, u the usage of the batch
    over images of any class: kept for reproduction, since index k means nothing across classes."""
    count = r.shape[1]
    kept = jnp.where(weight[:, None] > 0, r, jnp.zeros((), r.dtype))
    usage = jnp.sum(kept * weight[:, None], axis=0) / jnp.maximum(jnp.sum(weight), jnp.finfo(r.dtype).tiny)
    short = jnp.maximum(threshold - usage, 0.0) ** 2
    below = jax.lax.stop_gradient(jnp.sum((usage < threshold).astype(r.dtype)))
    return jnp.sum(short) / jnp.maximum(below, 1.0) + 0.1 * jnp.mean((usage - 1.0 / count) ** 2)


def classification(scores: Array, labels: Array, weight: Array, temperature: float) -> Array:
    """Mean cross-entropy of softmax_c(scores / temperature) at the true class."""
    logits = scores / temperature
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return weighted_mean(jax.nn.logsumexp(logits, axis=1) - chosen, weight)
