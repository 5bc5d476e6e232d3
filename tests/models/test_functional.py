"""NNX modules as pure functions over plain dicts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.models.functional import functional
from protojax.models.resnet import ResNet

TINY = {"depths": (1, 1), "widths": (4, 8), "stem": "cifar"}


@pytest.fixture(scope="module")
def network():
    return functional(ResNet, **TINY)


def test_trees_are_plain_dicts_of_arrays_with_string_keys(network, key):
    def check(tree):
        if isinstance(tree, dict):
            assert type(tree) is dict
            assert all(isinstance(name, str) for name in tree)
            jax.tree.map(check, list(tree.values()), is_leaf=lambda x: isinstance(x, dict))
        else:
            assert isinstance(tree, jax.Array)

    variables = jax.jit(network.init)(key)
    assert sorted(variables) == ["params", "stats"]
    check(variables)
    check(jax.jit(lambda v, x: network.apply(v, x, train=True))(variables, jnp.ones((2, 8, 8, 3)))[1])


def test_init_is_a_function_of_the_key(network, key):
    init = jax.jit(network.init)
    kernels = [init(k)["params"]["stem_conv"]["kernel"] for k in (key, key, jax.random.key(1))]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert jnp.abs(kernels[0] - kernels[2]).max() > 0.1
    shapes = [jax.eval_shape(network.init, k) for k in (key, jax.random.PRNGKey(0))]
    assert shapes[0] == shapes[1]


def test_one_trace_serves_every_call(network, key):
    traces = []

    @jax.jit
    def step(variables, images):
        traces.append(1)
        return network.apply(variables, images, train=True)

    variables = jax.jit(network.init)(key)
    for _ in range(3):
        _, stats = step(variables, jnp.ones((2, 8, 8, 3)))
        variables = variables | {"stats": stats}
    assert len(traces) == 1


def test_wrong_variables_are_named(network, key):
    variables = jax.eval_shape(network.init, key)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def apply(v):
        return jax.eval_shape(network.apply, v, images)

    with pytest.raises(ValueError, match=r"variables must be a dict with 'params' and 'stats'.*given: \['params'\]"):
        apply({"params": variables["params"]})
    with pytest.raises(ValueError, match="given: tuple"):
        apply((1, 2))
    params = {name: value for name, value in variables["params"].items() if name != "stem_conv"}
    with pytest.raises(ValueError, match="missing 1: params/stem_conv/kernel; unknown 1: params/stem"):
        apply({"params": params | {"stem": jnp.zeros(3)}, "stats": variables["stats"]})
    wider = jax.eval_shape(functional(ResNet, **TINY, width=2).init, key)
    with pytest.raises(ValueError, match=r"conv1/kernel has shape \(3, 3, 8, 8\), expected \(3, 3, 4, 4\)"):
        apply(wider)
