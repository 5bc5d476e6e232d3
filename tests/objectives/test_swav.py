"""SwAV's loss against a dense one in NumPy, and what its targets promise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from protojax.api import Codebook
from protojax.objectives import swav
from protojax.objectives.swav import balanced_target

V, T, B, D, K = 3, 2, 10, 5, 6


def case(key):
    keys = jax.random.split(key, 4)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    prototypes = unit(jax.random.normal(keys[2], (K, D)))
    return {
        "student": {"image": jax.random.normal(keys[0], (V, B, D))},
        "teacher": {"image": jax.random.normal(keys[1], (T, B, D)) + 1.0},
        "target": Codebook(prototypes, 0.1 * jax.random.normal(keys[3], (K,))),
        "prediction": Codebook(prototypes, jnp.zeros(K)),
        "mask": jnp.arange(B) < 8,
    }


def dense_targets(rows, prototypes, bias, temperature, iterations):
    """Log-assignments [N,K] after Sinkhorn iterations on the whole N x K matrix."""
    logits, potentials = rows @ prototypes.T / temperature, bias / temperature
    for _ in range(iterations):
        excess = logsumexp(logits + potentials[None], axis=1)
        potentials = -np.log(K) + np.log(len(rows)) - logsumexp(logits - excess[:, None], axis=0)
    return log_softmax(logits + potentials[None], axis=1)


@pytest.mark.parametrize("iterations", [0, 3])
def test_loss_is_the_swapped_cross_entropy_to_sinkhorn_targets(iterations, key):
    """With 0 iterations the target codebook's own bias decides: what `queue_sinkhorn` balanced is taken as it is."""
    inputs = case(key)
    loss, metrics = jax.jit(lambda i: swav(iterations=iterations).loss({}, i))(inputs)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    student, teacher = (unit(np.asarray(inputs[k]["image"], np.float64))[:, :8] for k in ("student", "teacher"))
    prototypes, bias = (np.asarray(a, np.float64) for a in inputs["target"])
    targets = dense_targets(teacher.reshape(-1, D), prototypes, bias, 0.05, iterations).reshape(T, 8, K)
    predicted = log_softmax(student @ prototypes.T / 0.1, axis=2)
    pairs = [-(np.exp(targets[j]) * predicted[i]).sum(1).mean() for i in range(V) for j in range(T) if i != j]
    np.testing.assert_allclose(loss, np.mean(pairs), rtol=2e-5)
    np.testing.assert_allclose(metrics["chance"][0], np.log(K), rtol=1e-6)
    entropy = -(np.exp(targets[0]) * targets[0]).sum(1).mean()
    np.testing.assert_allclose(metrics["teacher_entropy"][0], entropy, rtol=1e-3, atol=1e-5)


def test_target_masses_are_equal_over_the_unmasked_rows(key):
    inputs = case(key)
    teacher = inputs["teacher"]["image"] / jnp.linalg.norm(inputs["teacher"]["image"], axis=-1, keepdims=True)
    book = jax.jit(lambda t: balanced_target(t, inputs["target"], inputs["mask"], 0.1, 50))(teacher)
    rows = np.asarray(teacher)[:, :8].reshape(-1, D)
    shares = jax.nn.softmax((rows @ np.asarray(book.prototypes).T + np.asarray(book.bias)[None]) / 0.1, axis=1)
    np.testing.assert_allclose(shares.mean(0), 1 / K, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: swav(iterations=-1), "swav, iterations: expected an integer of at least 0, got -1"),
        (lambda: swav(target_temperature=0.0), "swav, target_temperature: expected a positive number, got 0.0"),
        (lambda: swav(student_temperature=True), "swav, student_temperature: expected a positive number, got True"),
    ],
)
def test_bad_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
