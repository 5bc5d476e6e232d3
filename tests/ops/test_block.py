"""CARP's block losses against a slow twin written from the formula, and what they must and must not differentiate."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.ops.block import block_consistency
from tests.ops import twins
from tests.ops.cases import close, weights

pytestmark = pytest.mark.usefixtures("x64")
S, T, B, COUNT, WIDTH, BLOCK = 3, 2, 7, 24, 5, 8
EPS = 1.1920929e-07


def case(scale: float = 1.0):
    student, teacher = scale * weights(0, S, B, WIDTH), scale * weights(1, T, B, WIDTH)
    prediction = weights(2, COUNT, WIDTH), weights(3, COUNT)
    target = weights(4, COUNT, WIDTH), weights(5, COUNT)
    order = jnp.asarray(np.random.default_rng(6).permutation(COUNT))
    return student, teacher, prediction, target, jnp.arange(B) < 5, order


OPTIONS = {"block": BLOCK, "student_temperature": 0.5, "teacher_temperature": 0.25, "row_tile": 3}


def dense(student, teacher, prediction, target, mask, order, **_):
    """The same losses, materialised, for autodiff."""

    def chances(views, codebook, temperature):
        table = (jnp.einsum("vbd,kd->vbk", views, codebook[0][order]) + codebook[1][order][None, None, :]) / temperature
        return jax.nn.softmax(table.reshape(*table.shape[:2], -1, BLOCK), axis=-1)

    p, q = chances(student, prediction, 0.5), jax.lax.stop_gradient(chances(teacher, target, 0.25))
    mask = mask.astype(jnp.float64)
    share = (mask / jnp.sum(mask))[:, None]
    pairs = [(i, j) for i in range(S) for j in range(T) if i != j]
    terms = [jnp.sum(-jnp.log(jnp.clip(jnp.sum(p[i] * q[j], -1), EPS, 1 - EPS)) * share) for i, j in pairs]
    usage = jnp.einsum("vbgk,b->gk", jnp.concatenate([p, q]), share[:, 0]) / (S + T)
    regulariser = math.log(BLOCK) + jnp.mean(jnp.sum(usage * jnp.log(usage), axis=-1))
    return sum(terms) / len(pairs) / (COUNT // BLOCK), regulariser


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["random", "peaked"])
def test_losses_are_the_formula(scale):
    arguments = case(scale)
    found = block_consistency(*arguments, **OPTIONS)
    student, teacher, prediction, target, _, order = jax.tree.map(np.asarray, arguments)
    expected = twins.carp(student, teacher, prediction, target, range(5), order, BLOCK, (0.5, 0.25), EPS)
    close(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("which", [0, 1], ids=["consistency", "regulariser"])
def test_gradients_are_those_of_the_materialised_losses(which):
    student, teacher, *rest = case()

    def gradients(function):
        def loss(student, teacher, prediction, target):
            return function(student, teacher, prediction, target, *rest[2:], **OPTIONS)[which]

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(student, teacher, rest[0], rest[1])

    found, expected = gradients(block_consistency), gradients(dense)
    jax.tree.map(close, found, expected)
    assert not jnp.any(found[1])
    assert not jnp.any(found[3][0])
    assert jnp.max(jnp.abs(found[0])) > 1e-3
    assert jnp.max(jnp.abs(found[2][0])) > 1e-3


def test_gradient_of_students_alone_is_the_same_and_temperature_is_differentiable():
    student, teacher, prediction, target, mask, order = case()

    def loss(student, prediction, temperature):
        options = OPTIONS | {"student_temperature": temperature}
        return sum(block_consistency(student, teacher, prediction, target, mask, order, **options))

    alone = jax.grad(loss)(student, prediction, 0.5)
    both, by_temperature = jax.grad(loss, (0, 2))(student, prediction, 0.5)
    close(alone, both)
    step = 1e-5
    numeric = (loss(student, prediction, 0.5 + step) - loss(student, prediction, 0.5 - step)) / (2 * step)
    np.testing.assert_allclose(by_temperature, numeric, rtol=1e-7)


def test_masked_rows_count_nothing_whatever_they_hold():
    student, teacher, prediction, target, mask, order = case()
    dirty = student.at[:, 5:].set(jnp.nan), teacher.at[:, 5:].set(jnp.inf)
    loss = lambda s, t, m: sum(block_consistency(s, t, prediction, target, m, order, **OPTIONS))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(*dirty, mask)
    expected, expected_gradient = jax.value_and_grad(loss)(student[:, :5], teacher[:, :5], mask[:5])
    close(value, expected)
    close(gradient[:, :5], expected_gradient)
    assert not jnp.any(gradient[:, 5:])
    nothing = block_consistency(*dirty, prediction, target, jnp.zeros(B, bool), order, **OPTIONS)
    assert (float(nothing[0]), float(nothing[1])) == (0.0, 0.0)


def test_bounds_uniform_usage_is_zero_and_one_prototype_is_log_block():
    _, _, prediction, _, mask, order = case()
    flat = tuple(jnp.zeros_like(a) for a in prediction)
    student, teacher = jnp.ones((2, B, WIDTH)), jnp.ones((2, B, WIDTH))
    consistency, regulariser = block_consistency(student, teacher, flat, flat, mask, order, block=BLOCK)
    close(consistency, jnp.asarray(math.log(BLOCK)))
    close(regulariser, jnp.asarray(0.0))
    peaked = (flat[0], jnp.where(jnp.arange(COUNT) % BLOCK == 0, 1e4, 0.0))
    _, collapsed = block_consistency(student, teacher, peaked, peaked, mask, jnp.arange(COUNT), block=BLOCK)
    np.testing.assert_allclose(collapsed, math.log(BLOCK), atol=1e-6)


def test_disagreement_at_extreme_logits_is_clipped_and_finite():
    prototypes = jnp.asarray([[1e2], [-1e2]], jnp.float32)
    student = jnp.asarray([[[1e2]], [[-1e2]]], jnp.float32)
    book = (prototypes, jnp.zeros(2, jnp.float32))
    loss = lambda s: block_consistency(s, student, book, book, jnp.ones(1, bool), jnp.arange(2), block=2)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(student)
    np.testing.assert_allclose(value, -math.log(EPS), rtol=1e-6)
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_permutation_matters_only_through_its_blocks():
    *arguments, order = case()
    shuffled = jnp.flip(order.reshape(-1, BLOCK), axis=1)[::-1].reshape(-1)
    found = block_consistency(*arguments, order, **OPTIONS)
    jax.tree.map(close, block_consistency(*arguments, shuffled, **OPTIONS), found)
    other = block_consistency(*arguments, jnp.roll(order, 3), **OPTIONS)
    assert abs(float(other[0] - found[0])) > 1e-6
