"""Whitening: its inverse root, its moments, its place in the head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from protojax.models.functional import functional
from protojax.models.heads import Head
from protojax.models.whitening import Whitening
from protojax.ops.inverse_root import inverse_root

D, N = 6, 64


@pytest.fixture
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((N, D)) @ rng.standard_normal((D, D)) + 3.0).astype(np.float32)


def test_the_full_root_is_that_of_an_eigendecomposition(rows):
    covariance = np.cov(rows.T, bias=True).astype(np.float64)
    shrink = 1e-2
    mixed = (1 - shrink) * covariance + shrink * np.trace(covariance) / D * np.eye(D)
    values, vectors = np.linalg.eigh(mixed)
    expected = (vectors / np.sqrt(values)) @ vectors.T
    found = inverse_root(jnp.asarray(covariance, jnp.float32), iterations=20, shrink=shrink)
    # A Newton step squares the error; what is left is float32 rounding times the condition number of the root.
    np.testing.assert_allclose(found, expected, atol=expected.max() * np.sqrt(values[-1] / values[0]) * 64 * 2**-24)


def test_few_iterations_lift_weak_directions_less(rows):
    covariance = jnp.diag(jnp.asarray([1.0, 0.5, 1e-4]))
    whitened = [
        jnp.diag(root @ covariance @ root)
        for root in (inverse_root(covariance, iterations=i, shrink=1e-6) for i in (1, 3, 30))
    ]
    weak = [float(w[2]) for w in whitened]
    assert weak[0] < weak[1] < 0.05 < 0.9 < weak[2] < 1.1
    assert abs(float(whitened[1][0]) - 1.0) < 0.1


def test_of_no_variance_comes_zero_with_a_finite_gradient():
    def total(x):
        return jnp.sum(x @ inverse_root(x.T @ x))

    value, gradient = jax.value_and_grad(total)(jnp.zeros((4, 3)))
    assert float(value) == 0.0
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (np.zeros((2, 3), np.float32), {}, r"square matrix \[D,D\], got \[2, 3\]"),
        (np.eye(2, dtype=np.float32), {"iterations": 0}, "iterations: expected an integer of at least 1, got 0"),
        (np.eye(2, dtype=np.float32), {"shrink": 0.0}, r"shrink: expected a number in \(0, 1\], got 0.0"),
    ],
)
def test_bad_input(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        inverse_root(jnp.asarray(matrix), **options)


def test_training_output_is_white_and_a_masked_row_counts_zero(rows):
    layer = Whitening(D, iterations=25, shrink=1e-5)
    out = np.asarray(layer(jnp.asarray(rows), train=True))
    np.testing.assert_allclose(out.mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(out.T @ out / N, np.eye(D), atol=2e-3)

    mask = np.arange(N) < N // 2
    spoilt = np.where(mask[:, None], rows, 1e3).astype(np.float32)
    masked, half = Whitening(D, iterations=25), Whitening(D, iterations=25)
    got = masked(jnp.asarray(spoilt), train=True, mask=jnp.asarray(mask))[: N // 2]
    np.testing.assert_allclose(got, half(jnp.asarray(rows[: N // 2]), train=True), atol=1e-3)
    np.testing.assert_allclose(masked.covariance.get_value(), half.covariance.get_value(), rtol=1e-5)


def test_evaluation_uses_running_moments_and_leaves_them(rows):
    layer = Whitening(D, iterations=25)
    layer(jnp.asarray(rows), train=True)
    before = np.asarray(layer.covariance.get_value())
    np.testing.assert_allclose(before, np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-4)
    one = layer(jnp.asarray(rows[:1]), train=False)
    np.testing.assert_allclose(one, layer(jnp.asarray(rows), train=False)[:1], rtol=1e-5)
    np.testing.assert_array_equal(before, layer.covariance.get_value())


def test_a_head_with_whitening_learns_nothing_more_and_spreads_its_output():
    network = functional(Head, 8, layers=2, hidden=16, dim=D, whiten=15)
    plain = functional(Head, 8, layers=2, hidden=16, dim=D)
    variables, other = network.init(jax.random.key(0)), plain.init(jax.random.key(0))
    assert "bias" not in variables["params"]["dense2"]  # the mean is subtracted: it could do nothing
    assert {*variables["params"]} == {*other["params"]}
    x = jax.random.normal(jax.random.key(1), (N, 8))
    out, stats = network.apply(variables, x, train=True, key=None)
    values = np.linalg.eigvalsh(np.cov(np.asarray(out).T))
    assert values[0] > 0.5 * values[-1]
    assert {"mean", "covariance", "updates"} <= set(stats["whitening"])
    with pytest.raises(ValueError, match="whiten must be a number of iterations, 0 for none; given -1"):
        Head(8, dim=D, whiten=-1, rngs=nnx.Rngs(0))
