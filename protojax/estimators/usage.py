"""Usage of sub-prompts within each class: a running share that prices whoever wins too much.

Statistics are sums over examples, so that masks, shards and micro-batches are free:

    n_c = sum_b [y_b = c],   R_ck = sum_{b: y_b = c} g_bk
    rho_c = 1 - 2^(-1 / (half_life N_c)),   a_c = (1 - rho_c)^n_c
    usage_c' = a_c usage_c + (1 - a_c) R_c / n_c          (unchanged where n_c = 0)

The half-life is in epochs of the class itself, N_c its training images: a batch holds none or one image of most
classes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def usage_start(classes: int, count: int) -> Array:
    """1/K everywhere, [C,K]."""
    return jnp.full((classes, count), 1.0 / count, jnp.result_type(float))


def usage_statistics(assignment: Array, labels: Array, mask: Array, classes: int) -> dict[str, Array]:
    """{'count' n_c [C], 'mass' R_ck [C,K]} of assignments [B,K] and labels [B]; masked rows count nothing."""
    weight = mask.astype(assignment.dtype)
    kept = jnp.where(mask[:, None], assignment, jnp.zeros((), assignment.dtype)) * weight[:, None]
    labels = jnp.where(mask, labels, jnp.zeros((), labels.dtype))
    mass = jnp.zeros((classes, assignment.shape[1]), assignment.dtype).at[labels].add(kept)
    return {"count": jnp.zeros((classes,), assignment.dtype).at[labels].add(weight), "mass": mass}


def usage_update(usage: Array, statistics: dict[str, Array], class_counts: Array, half_life: float) -> Array:
    """usage' [C,K], see above. class_counts [C]: training images N_c of each class."""
    count, mass = statistics["count"], statistics["mass"]
    size = jnp.maximum(class_counts.astype(usage.dtype), 1.0)
    keep = jnp.exp2(-count / (half_life * size))  # (1 - rho_c)^n_c
    share = mass / jnp.maximum(count, 1.0)[:, None]
    mixed = keep[:, None] * usage + (1.0 - keep[:, None]) * share
    return jnp.where((count > 0)[:, None], mixed, usage)
