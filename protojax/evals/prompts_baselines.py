"""What mixtures of prompts are held against on the same features: spherical k-means and a linear probe."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from protojax.evals.kmeans import plus_plus
from protojax.evals.linear import softmax_loss

RATE, EPOCHS, BATCH = 1e-3, 100, 256
ITERATIONS = 100


def spherical_kmeans(rows: np.ndarray, clusters: int, *, seed: int = 0, restarts: int = 5) -> np.ndarray:
    """Unit centres float64 [clusters,D] of unit rows [M,D] that maximise sum_i max_k <x_i, centre_k> (Dhillon and
    Modha 2001): Lloyd's steps from k-means++, the best of several starts.

    A cluster that loses all rows keeps its centre. Raises ValueError for clusters outside 1..M.
    """
    if not 1 <= clusters <= len(rows):
        raise ValueError(f"clusters: expected a number in 1..{len(rows)}, the rows, got {clusters}.")
    rows = rows.astype(np.float64)
    generator = np.random.default_rng(seed)
    best, kept = -np.inf, rows[:clusters]
    for _ in range(restarts):
        centres = plus_plus(rows, clusters, generator)
        chosen = np.full(len(rows), -1)
        for _ in range(ITERATIONS):
            cosine = rows @ centres.T
            before, chosen = chosen, cosine.argmax(axis=1)
            if (chosen == before).all():
                break
            sums = np.zeros_like(centres)
            np.add.at(sums, chosen, rows)
            norms = np.linalg.norm(sums, axis=1, keepdims=True)
            centres = np.where(norms > 0, sums / np.where(norms > 0, norms, 1.0), centres)
        value = float((rows @ centres.T).max(axis=1).sum())
        if value > best:
            best, kept = value, centres
    return kept


def class_centres(images: np.ndarray, labels: np.ndarray, classes: int, count: int, *, seed: int = 0) -> np.ndarray:
    """`spherical_kmeans` of each class: unit centres float32 [C,K,D]. A class of fewer images than K repeats its last
    centre. Every class needs an image."""
    out = np.empty((classes, count, images.shape[1]), np.float32)
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(classes + 1))
    for c in range(classes):
        rows = images[order[edges[c] : edges[c + 1]]]
        found = spherical_kmeans(rows, min(count, len(rows)), seed=seed)
        out[c] = found[np.minimum(np.arange(count), len(found) - 1)]
    return out


@partial(jax.jit, static_argnames=("classes", "steps", "batch"))
def _adam(rows: jax.Array, labels: jax.Array, key: jax.Array, *, classes: int, steps: int, batch: int) -> tuple[
    jax.Array, jax.Array]:  # fmt: skip
    adam = optax.adam(RATE)

    def step(carry: tuple, t: jax.Array) -> tuple[tuple, None]:
        params, moments = carry
        chosen = jax.random.randint(jax.random.fold_in(key, t), (batch,), 0, rows.shape[0])
        gradient = jax.grad(softmax_loss)(params, rows[chosen], labels[chosen])
        with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
            updates, moments = adam.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), None

    zeros = (jnp.zeros((rows.shape[1], classes), jnp.float32), jnp.zeros((classes,), jnp.float32))
    (params, _), _ = jax.lax.scan(step, (zeros, adam.init(zeros)), jnp.arange(steps, dtype=jnp.int32))
    return params


def adam_probe(rows: np.ndarray, labels: np.ndarray, *, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights [D,C] and biases [C] of softmax regression on rows [M,D] by Adam: rate 1e-3, 100 epochs, batches of 256
    drawn with replacement, from zero. Nothing is chosen, so that nothing is looked at."""
    batch = min(BATCH, len(rows))
    steps = max(1, round(EPOCHS * len(rows) / batch))
    weights, biases = _adam(jnp.asarray(rows, jnp.float32), jnp.asarray(labels, jnp.int32), jax.random.key(seed),
                            classes=classes, steps=steps, batch=batch)  # fmt: skip
    return np.asarray(weights), np.asarray(biases)
