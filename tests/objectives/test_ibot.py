"""Masked patches: the loss against a dense one in NumPy, and which patches are hidden."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from protojax.api import Codebook
from protojax.data.masking import block_positions, masked_count
from protojax.objectives import ibot
from tests.objectives.test_swav import dense_targets

V, B, N, D, K = 2, 5, 3, 4, 6


def case(key):
    keys = jax.random.split(key, 4)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    prototypes = unit(jax.random.normal(keys[2], (K, D)))
    return {
        "student": {"tokens": jax.random.normal(keys[0], (V, B, N, D))},
        "teacher": {"tokens": jax.random.normal(keys[1], (V, B, N, D)) + 1.0},
        "target": Codebook(prototypes, 0.1 * jax.random.normal(keys[3], (K,))),
        "prediction": Codebook(unit(prototypes + 0.1), jnp.full(K, 0.02)),
        "mask": jnp.arange(B) < 4,
    }


@pytest.mark.parametrize("iterations", [0, 3])
def test_loss_is_the_cross_entropy_of_hidden_patches_to_balanced_targets(iterations, key):
    """Row by row: each hidden patch of the student against the same patch of the same view of the teacher."""
    inputs = case(key)
    loss, metrics = jax.jit(lambda i: ibot(iterations=iterations).loss({}, i))(inputs)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    student, teacher = (
        unit(np.asarray(inputs[k]["tokens"], np.float64))[:, :4].reshape(-1, D) for k in ("student", "teacher")
    )
    target, bias = (np.asarray(a, np.float64) for a in inputs["target"])
    prototypes, offset = (np.asarray(a, np.float64) for a in inputs["prediction"])
    targets = dense_targets(teacher, target, bias, 0.05, iterations)
    total = 0.0
    for row in range(len(student)):
        predicted = log_softmax((prototypes @ student[row] + offset) / 0.1)
        total -= float(np.exp(targets[row]) @ predicted)
    np.testing.assert_allclose(loss, total / len(student), rtol=2e-5)
    np.testing.assert_allclose(metrics["chance"][0], np.log(K), rtol=1e-6)


def test_tokens_that_do_not_pair_and_bad_options_are_refused(key):
    inputs = case(key)
    short = {**inputs, "teacher": {"tokens": inputs["teacher"]["tokens"][:, :, :2]}}
    with pytest.raises(ValueError, match=r"tokens \[V,B,n,D\] of the same patches"):
        ibot().loss({}, short)
    for options, message in {
        ("ratio", 1.0): r"share of the patches in \(0, 1\), got 1.0",
        ("blocks", 0): "blocks: expected an integer of at least 1",
        ("iterations", -1): "iterations: expected an integer of at least 0",
        ("student_temperature", 0.0): "student_temperature: expected a positive number",
    }.items():
        with pytest.raises(ValueError, match=message):
            ibot(**dict([options]))


@pytest.mark.parametrize(("grid", "ratio", "count"), [((4, 4), 0.4, 6), ((3, 5), 0.01, 1), ((2, 2), 0.99, 3)])
def test_as_many_patches_are_hidden_in_every_image(grid, ratio, count, key):
    positions = np.asarray(jax.jit(lambda k: block_positions(k, 2, 7, grid, ratio, 2))(key))
    assert positions.shape == (2, 7, count)
    assert masked_count(grid, ratio) == count
    assert (np.diff(positions, axis=2) > 0).all()
    assert positions.min() >= 0
    assert positions.max() < grid[0] * grid[1]
    assert len({tuple(row) for row in positions.reshape(-1, count)}) > 1


def test_hidden_patches_lie_in_blocks(key):
    """Twenty of 8 x 8 patches: with one block nearly all hidden ones touch another, more than at random."""

    def touching(positions):
        hidden = np.zeros((len(positions), 64), bool)
        hidden[np.arange(len(positions))[:, None], positions] = True
        grid = hidden.reshape(-1, 8, 8)
        return (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()

    one = np.asarray(block_positions(key, 1, 50, (8, 8), 0.31, 1))[0]
    rng = np.random.default_rng(0)
    random = np.stack([rng.choice(64, 20, replace=False) for _ in range(50)])
    assert touching(one) > 2 * touching(random)
