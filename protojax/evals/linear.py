"""Linear probes on features computed once: closed-form ridge, and softmax regression over a grid trained at once.

Hyperparameters are chosen on a held-out slice of *train*, never on test; the chosen one is then fitted on all of
train and its last iterate is scored on test.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from protojax.evals.knn import check_labels
from protojax.evals.neighbours import check_rows

RIDGE_DECAYS = tuple(float(d) for d in 10.0 ** np.arange(-6.0, 2.0))
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
DECAYS = (0.0, 1e-5, 1e-3)


class ProbeResult(NamedTuple):
    """accuracy on test, correct bool [Q], chosen hyperparameters, held_out: (hyperparameters, accuracy) of the grid."""

    accuracy: float
    correct: np.ndarray
    chosen: dict[str, float]
    held_out: list[tuple[dict[str, float], float]]


class _Split(NamedTuple):
    fit: np.ndarray
    held: np.ndarray


def _check(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    train, test = check_rows(train, "train features"), check_rows(test, "test features")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train features have width {train.shape[1]}, test {test.shape[1]}; they must agree.")
    train_labels = check_labels(train_labels, len(train), num_classes, "train labels")
    return train, train_labels, test, check_labels(test_labels, len(test), num_classes, "test labels")


def _split(rows: int, held_out: float, seed: int) -> _Split:
    """A seeded random slice of train for choosing. Raises ValueError when either side would be empty."""
    count = round(rows * held_out)
    if not 0 < count < rows:
        raise ValueError(f"held_out = {held_out} of {rows} training rows leaves one side empty; use a share in (0, 1).")
    order = np.random.default_rng(seed).permutation(rows)
    return _Split(np.sort(order[count:]), np.sort(order[:count]))


# --------------------------------------------------------------------------------------------------- ridge
def ridge_weights(
    features: np.ndarray, labels: np.ndarray, decays: Sequence[float], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [G,F,C] and biases [G,C] of ridge regression on one-hot targets, one for each decay, from one
    eigendecomposition.

    Minimises mean_i |W' x_i + b - onehot(y_i)|^2 + decay * s * |W|^2 with s = trace(covariance) / F, so that a decay
    means the same for features of any scale; float64.
    """
    rows, width = features.shape
    mean = features.mean(axis=0, dtype=np.float64)
    centred = features.astype(np.float64) - mean[None, :]
    prior = np.bincount(labels, minlength=num_classes) / rows
    # X' onehot: sums of the rows of each class; centred columns make the prior drop out.
    sums = np.zeros((num_classes, width))
    np.add.at(sums, labels, centred)
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / rows)
    scale = max(float(eigenvalues.sum()) / width, np.finfo(np.float64).tiny)
    rotated = vectors.T @ (sums.T / rows)
    weights = np.stack(
        [vectors @ (rotated / (np.maximum(eigenvalues, 0.0) + d * scale)[:, None]) for d in map(float, decays)]
    )
    return weights, prior[None, :] - np.einsum("f,gfc->gc", mean, weights)


def ridge_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    decays: Sequence[float] = RIDGE_DECAYS,
    held_out: float = 0.1,
    seed: int = 0,
) -> ProbeResult:
    """Closed-form ridge classifier; the decay is chosen on a held-out slice of train (ties: the larger decay).

    train [M,F], test [Q,F]. Raises ValueError for decays that are not positive, labels out of range, other widths.
    """
    if not len(decays) or min(decays) <= 0:
        raise ValueError(f"decays: expected positive numbers, got {tuple(decays)}.")
    train, train_labels, test, test_labels = _check(train, train_labels, test, test_labels, num_classes)
    grid = sorted((float(d) for d in decays), reverse=True)
    split = _split(len(train), held_out, seed)
    weights, biases = ridge_weights(train[split.fit], train_labels[split.fit], grid, num_classes)
    held = [
        float(((train[split.held] @ w + b[None, :]).argmax(axis=1) == train_labels[split.held]).mean())
        for w, b in zip(weights, biases, strict=True)
    ]
    best = int(np.argmax(held))
    weights, biases = ridge_weights(train, train_labels, grid[best : best + 1], num_classes)
    correct = (test @ weights[0] + biases[0][None, :]).argmax(axis=1) == test_labels
    table = [({"decay": d}, a) for d, a in zip(grid, held, strict=True)]
    return ProbeResult(float(correct.mean()), correct, {"decay": grid[best]}, table)


# ------------------------------------------------------------------------------------------------- softmax
@partial(jax.jit, static_argnames=("steps", "batch_size", "num_classes"))
def _train_grid(
    features: jax.Array, labels: jax.Array, rates: jax.Array, decays: jax.Array, key: jax.Array, *,
    steps: int, batch_size: int, num_classes: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Softmax regressions [G,F,C], [G,C]: SGD, Nesterov momentum 0.9, cosine rate, all on the same mini-batches."""
    members, width = rates.shape[0], features.shape[1]
    start = (jnp.zeros((members, width, num_classes), jnp.float32), jnp.zeros((members, num_classes), jnp.float32))

    def loss(params: tuple[jax.Array, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        logits = x @ params[0] + params[1][None, :]
        picked = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)

    def step(carry: Any, t: jax.Array) -> tuple[Any, None]:
        params, velocity = carry
        chosen = jax.random.randint(jax.random.fold_in(key, t), (batch_size,), 0, features.shape[0])
        grads = jax.vmap(jax.grad(loss), in_axes=(0, None, None))(params, features[chosen], labels[chosen])
        grads = (grads[0] + decays[:, None, None] * params[0], grads[1])
        rate = rates * 0.5 * (1.0 + jnp.cos(jnp.pi * t.astype(jnp.float32) / steps))
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        move = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        params = (params[0] - rate[:, None, None] * move[0], params[1] - rate[:, None] * move[1])
        return (params, velocity), None

    zeros = jax.tree.map(jnp.zeros_like, start)
    (params, _), _ = jax.lax.scan(step, (start, zeros), jnp.arange(steps, dtype=jnp.int32))
    return params


def softmax_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    decays: Sequence[float] = DECAYS,
    steps: int = 1000,
    batch_size: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
) -> ProbeResult:
    """Softmax regression on standardised features; every (learning rate, decay) is trained in one compiled loop.

    Columns are standardised by train statistics, batches are drawn with replacement from `seed`. The pair with the
    best held-out accuracy (ties: first in the grid) is trained again on all of train.
    """
    if not len(learning_rates) or min(learning_rates) <= 0 or not len(decays) or min(decays) < 0:
        raise ValueError(
            f"expected positive learning_rates and decays >= 0, got {tuple(learning_rates)} and {tuple(decays)}."
        )
    train, train_labels, test, test_labels = _check(train, train_labels, test, test_labels, num_classes)
    grid = [{"learning_rate": float(r), "decay": float(d)} for r in learning_rates for d in decays]
    split = _split(len(train), held_out, seed)
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-6 * np.maximum(1.0, np.abs(mean)), std, np.inf)  # a constant column says nothing
    train = ((train - mean[None, :]) / scale[None, :]).astype(np.float32)
    test = ((test - mean[None, :]) / scale[None, :]).astype(np.float32)

    def fit(rows: np.ndarray, members: list[dict[str, float]]) -> tuple[np.ndarray, np.ndarray]:
        weights, biases = _train_grid(
            jnp.asarray(train[rows]), jnp.asarray(train_labels[rows], jnp.int32),
            jnp.asarray([m["learning_rate"] for m in members], jnp.float32),
            jnp.asarray([m["decay"] for m in members], jnp.float32), jax.random.key(seed),
            steps=steps, batch_size=min(batch_size, len(rows)), num_classes=num_classes,
        )  # fmt: skip
        return np.asarray(weights), np.asarray(biases)

    weights, biases = fit(split.fit, grid)
    held = [
        float(((train[split.held] @ w + b[None, :]).argmax(axis=1) == train_labels[split.held]).mean())
        for w, b in zip(weights, biases, strict=True)
    ]
    best = int(np.argmax(held))
    weights, biases = fit(np.arange(len(train)), grid[best : best + 1])
    correct = (test @ weights[0] + biases[0][None, :]).argmax(axis=1) == test_labels
    return ProbeResult(float(correct.mean()), correct, grid[best], list(zip(grid, held, strict=True)))
