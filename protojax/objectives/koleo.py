"""KoLeo: on features, to spread what prototypes can tell apart; on prototypes, the published remedy for joint ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Array, Metrics, Objective, PyTree
from protojax.objectives import common
from protojax.ops.checks import accumulation_dtype
from protojax.ops.unit import unit


def koleo(*, tile: int = 1024) -> Objective:
    """-mean_{v,b} ln min_{j != b} ||h_vb - h_vj|| on the unit features of the student's views, each view among the
    unmasked rows of the global batch (KoLeo: Sablayrolles et al. 2019; in self-supervision: DINOv2, Oquab et al. 2024).

    The Kozachenko-Leonenko estimate of the features' differential entropy, up to constants. Consistency contracts what
    two views of an image share, and with it what any codebook that follows the features can tell apart; this pushes
    each image from its nearest neighbour in the batch. DINOv2 has it on the backbone's output; here it is on the
    head's, where the prototypes are. Neighbours are found in tiles of `tile` rows and carry no gradient of their own;
    coincident rows count as a distance of 1e-8 and are not parted.

    inputs: student image [V,B,D], mask [B]. With fewer than two unmasked rows the term is zero. Metrics: loss, nearest
    (mean distance). Raises ValueError for a tile below 1.
    """
    common.whole("koleo, tile", tile, 1)

    def loss(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        mask = inputs["mask"].astype(bool)
        views = common.unit_rows(inputs["student"]["image"], mask)
        distance = jnp.stack([_distance(view, tile, mask) for view in views])
        paired = mask & (jnp.sum(mask) > 1)
        value = -common.masked_mean(jnp.mean(jnp.log(distance), axis=0), paired)
        nearest = common.masked_mean(jnp.mean(distance, axis=0), paired)
        return value, {"loss": common.once(value, paired), "nearest": common.once(nearest, paired)}

    return Objective(frozenset({"student/image", "mask"}), common.nothing_learned, loss)


def koleo_proto(*, tile: int = 1024) -> Objective:
    """-(1/K) sum_k ln min_{j != k} ||w_k - w_j|| on the unit prototypes of the prediction codebook (KoLeo-Proto).

    The Kozachenko-Leonenko estimate of their differential entropy: each prototype is pushed from its nearest
    neighbour. The neighbours are found in tiles of `tile` rows (tile x K similarities at a time, K x K never); only the
    K pairs found carry a gradient. Coincident prototypes count as a distance of 1e-8 and are not parted by this term.

    inputs: prediction, mask [B], and 'head/prototypes': where no optimiser moves the prototypes the term's gradient is
    exactly zero, so that building it into a decoupled arm is an error. Metrics: loss, nearest (mean distance).
    """
    common.whole("koleo_proto, tile", tile, 1)

    def loss(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        mask = inputs["mask"]
        distance = neighbour_distance(inputs["prediction"].prototypes, tile)
        present = jnp.any(mask.astype(bool)).astype(distance.dtype)
        value = -present * jnp.mean(jnp.log(distance))
        return value, {"loss": common.once(value, mask), "nearest": common.once(jnp.mean(distance), mask)}

    return Objective(frozenset({"prediction", "mask", "head/prototypes"}), common.nothing_learned, loss)


def neighbour_distance(prototypes: Array, tile: int = 1024) -> Array:
    """min_{j != k} ||w_k - w_j|| [K] of unit rows, at least 1e-8, differentiable. Raises ValueError for K < 2."""
    count = prototypes.shape[0]
    if count < 2:
        raise ValueError(f"koleo_proto: expected at least 2 prototypes, got {count}: one has no neighbour.")
    return _distance(unit(prototypes.astype(accumulation_dtype(prototypes))), tile)


def _distance(rows: Array, tile: int, mask: Array | None = None) -> Array:
    """Distance [N] of each unit row to its nearest other one (mask [N]: among these), at least 1e-8."""
    among = jnp.ones(rows.shape[:1], bool) if mask is None else mask
    neighbour = _nearest(jax.lax.stop_gradient(rows), min(tile, rows.shape[0]), among)
    square = jnp.sum((rows - rows[neighbour]) ** 2, axis=1)
    return jnp.sqrt(jnp.maximum(square, 1e-16))


def _nearest(rows: Array, tile: int, among: Array) -> Array:
    """Index [N] of the row of largest inner product among these [N] bool, itself excepted."""
    count = rows.shape[0]
    tiles = -(-count // tile)
    padded = jnp.pad(rows, ((0, tiles * tile - count), (0, 0))).reshape(tiles, tile, rows.shape[1])
    column = jnp.arange(count)

    def search(part: tuple[Array, Array]) -> Array:
        block, first = part
        similarity = jnp.matmul(block, rows.T, precision="highest")
        own = column[None, :] == (first + jnp.arange(tile))[:, None]
        return jnp.argmax(jnp.where(own | ~among[None, :], -jnp.inf, similarity), axis=1)

    return jax.lax.map(search, (padded, jnp.arange(tiles) * tile)).reshape(-1)[:count]
