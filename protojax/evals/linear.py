"""Linear probes on features computed once: closed-form ridge, softmax regression over a grid trained at once, and the
same regression solved to its minimum by L-BFGS.

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
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from protojax.evals.knn import check_labels
from protojax.evals.neighbours import check_rows

RIDGE_DECAYS = tuple(float(d) for d in 10.0 ** np.arange(-6.0, 2.0))
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
DECAYS = (0.0, 1e-5, 1e-3)
LOGISTIC_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


class ProbeResult(NamedTuple):
    """accuracy on test, correct bool [Q], chosen hyperparameters, held_out: (hyperparameters, accuracy) of the grid,
    scores [Q,C] of the test rows: logits, or for ridge the regression's values."""

    accuracy: float
    correct: np.ndarray
    chosen: dict[str, float]
    held_out: list[tuple[dict[str, float], float]]
    scores: np.ndarray


class Split(NamedTuple):
    """Rows of train, int64 ascending: those that are fitted, and those that choose."""

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


def held_out_split(rows: int, held_out: float, seed: int) -> Split:
    """A seeded random slice of train for choosing. Raises ValueError when either side would be empty."""
    count = round(rows * held_out)
    if not 0 < count < rows:
        raise ValueError(f"held_out = {held_out} of {rows} training rows leaves one side empty; use a share in (0, 1).")
    order = np.random.default_rng(seed).permutation(rows)
    return Split(np.sort(order[count:]), np.sort(order[:count]))


def _result(
    scores: np.ndarray, labels: np.ndarray, chosen: dict[str, float], table: list[tuple[dict[str, float], float]]
) -> ProbeResult:
    correct = scores.argmax(axis=1) == labels
    return ProbeResult(float(correct.mean()), correct, chosen, table, scores)


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both float64, columns of mean 0 and standard deviation 1 by the statistics of train; a constant column is 0."""
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-6 * np.maximum(1.0, np.abs(mean)), std, np.inf)  # a constant column says nothing
    return (train - mean[None, :]) / scale[None, :], (test - mean[None, :]) / scale[None, :]


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
    split = held_out_split(len(train), held_out, seed)
    weights, biases = ridge_weights(train[split.fit], train_labels[split.fit], grid, num_classes)
    held = [
        float(((train[split.held] @ w + b[None, :]).argmax(axis=1) == train_labels[split.held]).mean())
        for w, b in zip(weights, biases, strict=True)
    ]
    best = int(np.argmax(held))
    weights, biases = ridge_weights(train, train_labels, grid[best : best + 1], num_classes)
    table = [({"decay": d}, a) for d, a in zip(grid, held, strict=True)]
    return _result(test @ weights[0] + biases[0][None, :], test_labels, {"decay": grid[best]}, table)


# ------------------------------------------------------------------------------------------------- softmax
def softmax_loss(params: tuple[jax.Array, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy of softmax(x W + b) with params (W [F,C], b [C]) on rows x [B,F] of labels y [B]."""
    logits = x @ params[0] + params[1][None, :]
    picked = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


@partial(jax.jit, static_argnames=("steps", "batch_size", "num_classes"))
def _train_grid(
    features: jax.Array, labels: jax.Array, rates: jax.Array, decays: jax.Array, key: jax.Array, *,
    steps: int, batch_size: int, num_classes: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Softmax regressions [G,F,C], [G,C]: SGD, Nesterov momentum 0.9, cosine rate, all on the same mini-batches."""
    members, width = rates.shape[0], features.shape[1]
    start = (jnp.zeros((members, width, num_classes), jnp.float32), jnp.zeros((members, num_classes), jnp.float32))

    def step(carry: Any, t: jax.Array) -> tuple[Any, None]:
        params, velocity = carry
        chosen = jax.random.randint(jax.random.fold_in(key, t), (batch_size,), 0, features.shape[0])
        grads = jax.vmap(jax.grad(softmax_loss), in_axes=(0, None, None))(params, features[chosen], labels[chosen])
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
    split = held_out_split(len(train), held_out, seed)
    train, test = (rows.astype(np.float32) for rows in standardised(train, test))

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
    table = list(zip(grid, held, strict=True))
    return _result(test @ weights[0] + biases[0][None, :], test_labels, grid[best], table)


# ------------------------------------------------------------------------------------------------- logistic
def logistic_weights(
    features: np.ndarray, labels: np.ndarray, decay: float, num_classes: int, *, iterations: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Weights float64 [F,C] and biases [C] of softmax regression at its minimum, by L-BFGS.

    Minimises mean_i -ln softmax(W' x_i + b)[y_i] + decay / 2 * |W|^2, biases free: scikit-learn's LogisticRegression
    with C = 1 / (decay * N). A class without a row gets bias -inf and is never predicted. Raises ValueError for a decay
    that is not positive (separable rows then have no minimum).
    """
    if not decay > 0:
        raise ValueError(f"decay: expected a positive number, got {decay}.")
    present, target = np.unique(labels, return_inverse=True)
    rows, width = features.shape
    features = features.astype(np.float64)
    hot = np.eye(len(present))[target]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[: width * len(present)].reshape(width, -1), flat[width * len(present) :]
        logs = log_softmax(features @ weights + bias[None, :], axis=1)
        gap = (np.exp(logs) - hot) / rows
        value = -float(np.sum(hot * logs)) / rows + 0.5 * decay * float(np.sum(np.square(weights)))
        return value, np.concatenate([(features.T @ gap + decay * weights).ravel(), gap.sum(axis=0)])

    options = {"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 1e-13, "gtol": 1e-7, "maxcor": 20}
    flat = minimize(loss, np.zeros((width + 1) * len(present)), jac=True, method="L-BFGS-B", options=options).x
    weights, biases = np.zeros((width, num_classes)), np.full(num_classes, -np.inf)
    weights[:, present] = flat[: width * len(present)].reshape(width, -1)
    biases[present] = flat[width * len(present) :]
    return weights, biases


def logistic_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    decays: Sequence[float] = LOGISTIC_DECAYS,
    held_out: float = 0.1,
    seed: int = 0,
) -> ProbeResult:
    """Softmax regression on standardised features at its minimum: what `softmax_probe` approaches. The decay is chosen
    on a held-out slice of train (ties: the larger one). Arguments and errors of `ridge_probe`."""
    if not len(decays) or min(decays) <= 0:
        raise ValueError(f"decays: expected positive numbers, got {tuple(decays)}.")
    train, train_labels, test, test_labels = _check(train, train_labels, test, test_labels, num_classes)
    train, test = standardised(train, test)
    grid = sorted((float(d) for d in decays), reverse=True)
    split = held_out_split(len(train), held_out, seed)
    held = []
    for decay in grid if len(grid) > 1 else ():
        weights, biases = logistic_weights(train[split.fit], train_labels[split.fit], decay, num_classes)
        predicted = (train[split.held] @ weights + biases[None, :]).argmax(axis=1)
        held.append(float((predicted == train_labels[split.held]).mean()))
    best = int(np.argmax(held)) if held else 0
    weights, biases = logistic_weights(train, train_labels, grid[best], num_classes)
    table = [({"decay": d}, a) for d, a in zip(grid, held, strict=False)]
    return _result(test @ weights + biases[None, :], test_labels, {"decay": grid[best]}, table)


def probabilities(result: ProbeResult, temperature: float = 1.0) -> np.ndarray:
    """softmax(scores / T), float64 [Q,C]: of `softmax_probe` and `logistic_probe`, whose scores are logits."""
    return softmax(result.scores.astype(np.float64) / temperature, axis=1)
