"""Norms against NumPy, masked rows, drop path, the precision policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from protojax.models.functional import functional
from protojax.models.layers import BatchNorm, GroupNorm, compute_dtype, conv, drop_path, make_norm


class Norm(nnx.Module):
    """A norm with the call of a network."""

    def __init__(self, name, features, *, rngs, **options):
        self.norm = make_norm(name, **options)(features, rngs=rngs)

    def __call__(self, x, mask=None, *, train, key):
        return self.norm(x, train=train, mask=mask)


def _variables(network, key):
    variables = network.init(key)
    scale = variables["params"]["norm"]["scale"]
    variables["params"]["norm"]["scale"] = 1.0 + 0.5 * jnp.cos(jnp.arange(scale.size, dtype=scale.dtype))
    return variables


@pytest.mark.usefixtures("x64")
def test_batch_norm_equals_its_definition_and_keeps_unbiased_running_variance(key):
    network = functional(Norm, "batch", 3, dtype="float64", momentum=0.75)
    variables = _variables(network, key)
    x = np.asarray(jax.random.normal(key, (4, 2, 5, 3), jnp.float64)) * 3 + 7
    variables["stats"]["norm"]["updates"] = jnp.asarray(9.0, jnp.float64)
    y, stats = network.apply(variables, jnp.asarray(x), train=True)
    rows = x.reshape(-1, 3)
    scale = np.asarray(variables["params"]["norm"]["scale"])
    np.testing.assert_allclose(y, (x - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) * scale, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(stats["norm"]["mean"], 0.25 * rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats["norm"]["var"], 0.75 + 0.25 * rows.var(0, ddof=1), rtol=1e-13)

    y, unchanged = network.apply(variables | {"stats": stats}, jnp.asarray(x), train=False)
    assert unchanged is stats
    mean, var = (np.asarray(stats["norm"][name]) for name in ("mean", "var"))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5) * scale, rtol=1e-12, atol=1e-13)


def test_initial_running_moments_weigh_nothing(key):
    """The first updates are a plain mean, later ones exponential."""
    network = functional(Norm, "batch", 3, momentum=0.75)
    variables = _variables(network, key)
    batches = [jax.random.normal(jax.random.fold_in(key, i), (50, 3)) * 1e-2 + i for i in range(6)]
    expected = None
    for i, x in enumerate(batches):
        _, stats = network.apply(variables, x, train=True)
        variables = {**variables, "stats": stats}
        mean = np.asarray(x).mean(0)
        expected = mean if expected is None else expected + max(0.25, 1 / (i + 1)) * (mean - expected)
        np.testing.assert_allclose(stats["norm"]["mean"], expected, rtol=1e-5, atol=1e-5)
        if i == 0:
            np.testing.assert_allclose(stats["norm"]["var"], np.asarray(x).var(0, ddof=1), rtol=1e-4)


def test_a_masked_row_counts_zero(key):
    network = functional(Norm, "batch", 3)
    variables = _variables(network, key)
    x = jax.random.normal(key, (6, 2, 2, 3))
    mask = jnp.array([True, False, True, True, False, True])
    masked, stats = network.apply(variables, jnp.where(mask[:, None, None, None], x, 1e6), mask, train=True)
    alone, expected = network.apply(variables, x[mask], train=True)
    # float32 sums of 16 values of order 1
    np.testing.assert_allclose(masked[mask], alone, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stats, expected)
    everything, _ = network.apply(variables, x, jnp.ones(6, bool), train=True)
    np.testing.assert_allclose(everything, network.apply(variables, x, train=True)[0], atol=2e-6)


def test_variance_survives_a_large_mean(key):
    """E[x^2] - m^2 would lose everything here: 1e8 in float32 is known to 8 only."""
    network = functional(Norm, "batch", 2)
    x = 1e4 + jax.random.normal(key, (64, 2))
    y, _ = network.apply(network.init(key), x, train=True)
    # x itself is rounded to 1e4 * 6e-8 = 6e-4
    np.testing.assert_allclose(y.std(0), 1.0, atol=2e-3)


@pytest.mark.usefixtures("x64")
def test_group_norm_equals_its_definition(key):
    network = functional(Norm, "group", 48, dtype="float64")  # gcd(32, 48) = 16 groups of 3
    variables = _variables(network, key)
    x = np.asarray(jax.random.normal(key, (2, 3, 4, 48), jnp.float64)) + 2
    y, stats = network.apply(variables, jnp.asarray(x), train=True)
    groups = x.reshape(2, 12, 16, 3)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * np.asarray(
        variables["params"]["norm"]["scale"]
    )
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
    assert stats == {}


def test_drop_path_keeps_the_expectation_row_by_row(key):
    residual = jnp.ones((4000, 3))
    dropped = drop_path(residual, 0.25, key)
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_array_equal(dropped.min(1), dropped.max(1))
    # four standard errors: 4 * sqrt(0.25 / 0.75 / 4000)
    assert abs(dropped.mean() - 1) < 0.037
    assert drop_path(residual, 0.25, None) is residual


def test_bad_names():
    with pytest.raises(ValueError, match="norm must be one of 'batch', 'group'; given 'layer'"):
        make_norm("layer")
    with pytest.raises(ValueError, match=r"dtype must be one of .*; given 'int32'"):
        compute_dtype("int32")
    with pytest.raises(ValueError, match="given 'float12'"):
        compute_dtype("float12")


def test_compute_dtype_leaves_parameters_in_float32(key):
    for norm in (BatchNorm, GroupNorm):
        module = norm(4, dtype="bfloat16", rngs=nnx.Rngs(key))
        assert module.scale.get_value().dtype == jnp.float32
        assert module(jnp.ones((2, 3, 3, 4), jnp.bfloat16), train=True).dtype == jnp.bfloat16


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("size", "stride", "shape"),
    [(3, 1, (2, 2)), (3, 2, (4, 5)), (3, 2, (6, 3)), (7, 2, (4, 4)), (3, 1, (1, 3)), (1, 2, (8, 7)), (1, 1, (6, 5))],
)
def test_small_maps_on_a_cpu_are_products_with_the_values_and_gradients_of_a_convolution(size, stride, shape):
    layer = conv(5, 6, size, stride, dtype=jnp.float64, rngs=nnx.Rngs(0), bias=True)
    graph, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (3, *shape, 5), jnp.float64)

    def loss(of, params, x):
        return jnp.sum(jnp.sin(of(nnx.merge(graph, params), x)))

    ours = lambda p, x: loss(lambda m, x: m(x), p, x)  # noqa: E731
    xla = lambda p, x: loss(nnx.Conv.__call__, p, x)  # noqa: E731
    assert "conv_general_dilated" in str(jax.make_jaxpr(xla)(params, x))
    assert "conv_general_dilated" not in str(jax.make_jaxpr(jax.grad(ours, (0, 1)))(params, x))
    for one, other in zip(*(jax.tree.leaves(jax.grad(f, (0, 1))(params, x)) for f in (ours, xla)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_large_maps_are_convolutions_of_xla():
    layer = conv(5, 6, 3, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert "conv_general_dilated" in str(jax.make_jaxpr(lambda x: layer(x))(jnp.zeros((2, 7, 4, 5))))
