"""Initial components from data: distinct rows far from one another, and how widely rows scatter around them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import Array, Key

METHODS = ("kmeans++", "sample", "random")


class Seeds(NamedTuple):
    """means [K,D]: seed rows, slightly jittered so that no two are equal. variance [D]: scatter of the rows around
    their nearest seed, sum_i (h_i - seed)_d^2 / (N - K) (of all rows around their mean when N <= K)."""

    means: Array
    variance: Array


def seed_components(features: Array, mask: Array, count: int, key: Key, method: str) -> Seeds:
    """Choose `count` seeds among the unmasked rows of features [M,D].

    'kmeans++' (Arthur & Vassilvitskii 2007): each next seed is drawn with probability proportional to its squared
    distance from the nearest seed so far. 'sample': distinct rows at random, over again when there are fewer rows than
    components. Components that start equal receive equal responsibilities and never part, hence the jitter (1% of the
    features' standard deviation). O(M K D) time, O(M D) memory, one row at a time.
    """
    key_rows, key_jitter, key_first = jax.random.split(key, 3)
    weight = mask.astype(features.dtype)
    rows = jnp.sum(weight)
    order = jnp.argsort(jnp.where(mask, jax.random.uniform(key_first, mask.shape, features.dtype), 2.0)).astype(
        jnp.int32
    )
    draws = jax.random.uniform(key_rows, (count,), features.dtype)
    known = jnp.maximum(rows, 1.0).astype(jnp.int32)

    def choose(k: Array, distance: Array) -> Array:
        if method == "sample":
            return order[k % known]
        # Equal rows leave nothing but zeros: a floor falls back to a uniform draw.
        chance = weight * (distance + 1e-12 * jnp.max(distance) + jnp.finfo(features.dtype).tiny)
        total = jnp.cumsum(chance)
        drawn = jnp.searchsorted(total, draws[k] * total[-1], side="right")
        return jnp.where(k == 0, order[0], jnp.minimum(drawn, mask.shape[0] - 1))

    def body(k: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        chosen, distance, nearest = carry
        row = choose(k, distance)
        new = jnp.sum((features - features[row][None, :]) ** 2, axis=1)
        closer = new < distance
        return chosen.at[k].set(row), jnp.where(closer, new, distance), jnp.where(closer, k, nearest)

    far = jnp.full(mask.shape, jnp.finfo(features.dtype).max / 4, features.dtype)
    start = (jnp.zeros((count,), jnp.int32), far, jnp.zeros(mask.shape, jnp.int32))
    chosen, _, nearest = jax.lax.fori_loop(0, count, body, start)
    seeds = features[chosen]

    mean = jnp.sum(features * weight[:, None], axis=0) / jnp.maximum(rows, 1.0)
    total = jnp.sum(weight[:, None] * (features - mean[None, :]) ** 2, axis=0) / jnp.maximum(rows, 1.0)
    within = jnp.sum(weight[:, None] * (features - seeds[nearest]) ** 2, axis=0)
    variance = jnp.where(rows > count, within / jnp.maximum(rows - count, 1.0), total)
    noise = jax.random.normal(key_jitter, seeds.shape, features.dtype)
    return Seeds(seeds + 0.01 * jnp.sqrt(total)[None, :] * noise, variance)
