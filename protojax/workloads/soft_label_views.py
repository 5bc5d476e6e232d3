"""Augmentation of tables and stars of neighbours, after standardisation: (key, inputs) -> inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Key

View = Callable[[Key, dict[str, Any]], dict[str, Any]]
STRATUM = 5  # neighbours of neighbouring distance: one of five is dropped, so 80% stay


def identity() -> View:
    """Inputs as they are."""
    return lambda key, inputs: inputs


def noise(
    *,
    feature_std: float = 0.01,
    feature_probability: float = 0.8,
    neighbour_probability: float = 0.5,
    edge_noise: float = 0.02,
    edge_probability: float = 0.3,
) -> View:
    """Each sample with its own probability: Gaussian noise on its features; of every five neighbours next to one
    another in distance one is dropped; edge features times 1 + edge_noise n, of which distances (the third) stay >= 0.

    Raises ValueError for a probability outside [0, 1] or a negative amount.
    """
    for name, value in (("feature_probability", feature_probability), ("edge_probability", edge_probability),
                        ("neighbour_probability", neighbour_probability)):  # fmt: skip
        if not 0 <= value <= 1:
            raise ValueError(f"views 'noise', {name}: expected a number in [0, 1], got {value!r}.")
    if feature_std < 0 or edge_noise < 0:
        raise ValueError(f"views 'noise': expected amounts >= 0, got {feature_std!r} and {edge_noise!r}.")

    def view(key: Key, inputs: dict[str, Any]) -> dict[str, Any]:
        keys = jax.random.split(key, 6)
        out = dict(inputs)
        if "features" in inputs:
            x = inputs["features"]
            moved = jax.random.bernoulli(keys[0], feature_probability, x.shape[:1])[:, None]
            out["features"] = x + jnp.where(moved, feature_std, 0.0) * jax.random.normal(keys[1], x.shape, x.dtype)
        if "edges" in inputs:
            edges, mask = inputs["edges"], inputs["neighbour_mask"].astype(bool)
            moved = jax.random.bernoulli(keys[2], edge_probability, mask.shape[:1])[:, None, None]
            edges = edges * (
                1.0 + jnp.where(moved, edge_noise, 0.0) * jax.random.normal(keys[3], edges.shape, edges.dtype)
            )
            out["edges"] = edges.at[:, :, 2].max(0.0)
            dropped = _dropped(keys[4], inputs["edges"][:, :, 2], mask)
            chosen = jax.random.bernoulli(keys[5], neighbour_probability, mask.shape[:1])[:, None]
            out["neighbour_mask"] = mask & ~(dropped & chosen)
        return out

    return view


def _dropped(key: Key, distance: jax.Array, mask: jax.Array) -> jax.Array:
    """bool [B,S]: one of every STRATUM neighbours, by distance; masked ones stand last."""
    rank = jnp.argsort(jnp.argsort(jnp.where(mask, distance, jnp.inf), axis=1), axis=1)
    strata = -(-mask.shape[1] // STRATUM)
    place = jax.random.randint(key, (mask.shape[0], strata), 0, STRATUM)
    return jnp.take_along_axis(place, rank // STRATUM, axis=1) == rank % STRATUM


VIEWS: dict[str, Callable[..., View]] = {"identity": identity, "noise": noise}
