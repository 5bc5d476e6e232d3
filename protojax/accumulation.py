"""One step over a batch that does not fit at once: the same gradients from micro-batches, for any objective.

The encoder is what costs memory; embeddings are small. So (1) every micro-batch is encoded without keeping activations,
(2) the objective sees the embeddings of the *whole* batch and gives its gradient with respect to them, (3) every
micro-batch is encoded again, now with a backward pass from its rows of that gradient:

    dL/dtheta = sum_m (d e_m / d theta)^T (dL/de)_m

This is exact where an embedding depends on its own image alone, whatever the loss does across rows: CARP's mean
probability and global contrastive terms included (the two passes are Gao et al. 2021, arXiv:2101.06983). It costs one
more forward pass. Batch norm normalises within a micro-batch: results then differ, and `warning` says so.

Micro-batch m of M holds rows m, m + M, m + 2M, ... so that every device keeps its own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Array, Encoder, Key, PyTree

Axes = PyTree  # a tree of int: where the batch axis is, or -1


def batch_axes(tree: PyTree, size: int) -> Axes:
    """Where each array has the batch axis: the first of its first two axes of length `size` (-1: nowhere).

    Raises ValueError when both have that length: such a batch cannot be told from its views.
    """

    def one(leaf: Any) -> int:
        found = [axis for axis in range(min(leaf.ndim, 2)) if leaf.shape[axis] == size]
        if len(found) > 1:
            raise ValueError(
                f"method.micro_batches: an array of shape {tuple(leaf.shape)} has two axes of the batch size {size}; "
                "use another batch size"
            )
        return found[0] if found else -1

    return jax.tree.map(one, tree)


def split(tree: PyTree, axes: Axes, count: int) -> PyTree:
    """Arrays [.., B, ..] -> [M, .., B/M, ..], rows strided; arrays without a batch axis are repeated."""

    def one(leaf: Array, axis: int) -> Array:
        if axis < 0:
            return jnp.broadcast_to(leaf[None], (count, *leaf.shape))
        shape = (*leaf.shape[:axis], leaf.shape[axis] // count, count, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)

    return jax.tree.map(one, tree, axes)


def merge(tree: PyTree, axes: Axes) -> PyTree:
    """The inverse of `split`: arrays [M, .., B/M, ..] -> [.., B, ..]."""

    def one(leaf: Array, axis: int) -> Array:
        if axis < 0:
            return leaf[0]
        moved = jnp.moveaxis(leaf, 0, axis + 1)
        return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])

    return jax.tree.map(one, tree, axes)


def check(count: int, batch_size: int, devices: int) -> None:
    """Raise ValueError unless every device holds equally many rows of every micro-batch."""
    if batch_size % (count * devices):
        raise ValueError(
            f"config.method.micro_batches = {count} does not divide the {batch_size // devices} rows of a device "
            f"(data.batch_size {batch_size} over {devices} devices)."
        )


def warning(stats: PyTree) -> str:
    """What to say about batch norm under accumulation; '' for a network without running moments."""
    if not jax.tree.leaves(stats):
        return ""
    return (
        "method.micro_batches > 1 and the encoder has batch norm: it normalises within a micro-batch, so this is not "
        "the run of the whole batch at once. Everything else is exact."
    )


def forward(
    encoder: Encoder, variables: PyTree, inputs: PyTree, key: Key | None, size: int, count: int
) -> tuple[dict[str, Array], PyTree]:
    """`encoder.apply` in training mode over `count` micro-batches of `size` / count images, one after another.

    Batch-norm moments pass from one to the next. key: each micro-batch folds its number in (drop path).
    """
    parts = split(inputs, batch_axes(inputs, size), count)
    small = jax.tree.map(lambda leaf: leaf[0], parts)
    shapes = jax.eval_shape(lambda v, x: encoder.apply(v, x, True, key)[0], variables, small)
    axes = batch_axes(shapes, size // count)

    def body(stats: PyTree, part: tuple[Array, PyTree]) -> tuple[PyTree, dict[str, Array]]:
        number, images = part
        embeddings, stats = encoder.apply({**variables, "stats": stats}, images, True, _key(key, number))
        return stats, embeddings

    stats, stacked = jax.lax.scan(body, variables["stats"], (jnp.arange(count, dtype=jnp.int32), parts))
    return merge(stacked, axes), stats


def _key(key: Key | None, number: Array) -> Key | None:
    return None if key is None else jax.random.fold_in(key, number)


def value_and_grad(
    encoder: Encoder,
    loss: Callable[[PyTree, dict[str, Array]], tuple[Array, PyTree]],
    params: PyTree,
    stats: PyTree,
    inputs: PyTree,
    key: Key | None,
    size: int,
    count: int,
) -> tuple[tuple[Array, tuple[PyTree, PyTree]], PyTree]:
    """((loss, (aux, batch-norm moments)), gradient), as `jax.value_and_grad(..., has_aux=True)` of the whole step.

    loss(params, embeddings) -> (scalar, aux): its direct gradient in params (heads of the objective, learned
    prototypes) is added to what flows through the embeddings.
    """

    def encode(encoder_params: PyTree, part: PyTree, moments: PyTree, number: Array) -> tuple[PyTree, PyTree]:
        return encoder.apply({"params": encoder_params, "stats": moments}, part, True, _key(key, number))

    parts = split(inputs, batch_axes(inputs, size), count)
    numbers = jnp.arange(count, dtype=jnp.int32)
    embeddings, after = forward(encoder, {"params": params["encoder"], "stats": stats}, inputs, key, size, count)
    (value, aux), (direct, cotangent) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, embeddings)
    cotangents = split(cotangent, batch_axes(embeddings, size), count)

    def body(carry: tuple[PyTree, PyTree], part: tuple[Array, PyTree, PyTree]) -> tuple[tuple[PyTree, PyTree], None]:
        total, moments = carry
        number, images, slope = part
        _, backward, moments = jax.vjp(lambda p: encode(p, images, moments, number), params["encoder"], has_aux=True)
        (gradient,) = backward(slope)
        return (jax.tree.map(jnp.add, total, gradient), moments), None

    zero = jax.tree.map(jnp.zeros_like, params["encoder"])
    (through, _), _ = jax.lax.scan(body, (zero, stats), (numbers, parts, cotangents))
    gradient = {**direct, "encoder": jax.tree.map(jnp.add, direct["encoder"], through)}
    return (value, (aux, after)), gradient
