"""Residual networks: shapes, the zero-initialised residual, options, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from protojax.models.functional import functional
from protojax.models.layers import BatchNorm, GroupNorm
from protojax.models.resnet import Block, MicroResNet, ResNet


class BlockNetwork(nnx.Module):
    def __init__(self, kind, norm, zero_init, *, rngs):
        self.block = Block(
            8, 8 if kind == "basic" else 2, 1, kind=kind, norm=norm, zero_init=zero_init, dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, x, *, train, key):
        return self.block(x, train=train)


@pytest.mark.parametrize(("kind", "norm"), [("basic", BatchNorm), ("bottleneck", GroupNorm)])
def test_a_zero_initialised_block_is_the_identity_on_what_relu_gives(kind, norm, key):
    x = jax.nn.relu(jax.random.normal(key, (3, 4, 4, 8)))
    zero, plain = (functional(BlockNetwork, kind, norm, zero_init) for zero_init in (True, False))
    results = [jax.jit(lambda k, x, n=n: n.apply(n.init(k), x, train=True)[0])(key, x) for n in (zero, plain)]
    np.testing.assert_array_equal(results[0], x)
    assert jnp.abs(results[1] - x).max() > 0.1


@pytest.mark.parametrize(
    ("network", "features", "resolution"),
    [
        (functional(ResNet, (1, 1, 1, 1), width=0.25), 128, 32),
        (functional(ResNet, (1, 1), kind="bottleneck", widths=(4, 6), stem="cifar", norm="group"), 24, 2),
        (functional(MicroResNet), 128, 8),
    ],
)
def test_shapes_of_options(network, features, resolution, key):
    for size in (resolution, 3 * resolution + 1):
        images = jax.ShapeDtypeStruct((5, size, size, 3), jnp.bfloat16)
        variables = jax.eval_shape(network.init, key)
        outputs, _ = jax.eval_shape(functools.partial(network.apply, train=True), variables, images)
        assert outputs["pooled"].shape == (5, features)
        assert outputs["pooled"].dtype == jnp.float32


def test_stems_reduce_resolution_as_they_say(key):
    for stem, stride in (("imagenet", 4), ("cifar", 1)):
        network = functional(ResNet, (1,), widths=(4,), stem=stem)
        variables = jax.eval_shape(network.init, key)
        jaxpr = jax.make_jaxpr(network.apply)(variables, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
        convolutions = [e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
        assert convolutions[-1].outvars[0].aval.shape == (1, 32 // stride, 32 // stride, 4)


def test_gray_images_and_wrong_ones(key):
    network = functional(ResNet, (1,), widths=(4,), stem="cifar", channels=1)
    variables = jax.eval_shape(network.init, key)
    shapes = [jax.ShapeDtypeStruct((1, 4, 4, n), d) for n, d in ((1, jnp.float32), (3, jnp.float32), (1, jnp.uint8))]
    assert jax.eval_shape(network.apply, variables, shapes[0])[0]["pooled"].shape == (1, 4)
    with pytest.raises(ValueError, match=r"images must be \[N,H,W,1\]; given shape \(1, 4, 4, 3\)"):
        jax.eval_shape(network.apply, variables, shapes[1])
    with pytest.raises(TypeError, match="floating point, already normalised; given uint8"):
        jax.eval_shape(network.apply, variables, shapes[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "wide"}, "kind must be 'basic' or 'bottleneck'; given 'wide'"),
        ({"stem": "vgg"}, "stem must be one of 'imagenet', 'cifar'; given 'vgg'"),
        ({"norm": "layer"}, "norm must be one of 'batch', 'group'; given 'layer'"),
        ({"width": 0}, "must be positive; given 0"),
        ({"widths": (8,)}, r"depths \(1, 1\) and widths \(8,\) must have one entry a stage"),
    ],
)
def test_bad_options(options, message, key):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functional(ResNet, (1, 1), **({"widths": (4, 8)} | options)).init, key)


def test_micro_needs_a_stride_a_stage(key):
    with pytest.raises(ValueError, match=r"depths \(0, 1, 1\) and strides \(2,\) must have one entry a stage"):
        jax.eval_shape(functional(MicroResNet, strides=(2,)).init, key)


def test_remat_changes_what_is_kept_and_nothing_else(key):
    """The same outputs, moments and gradients up to rounding; less is kept from the forward pass for the backward one
    (what a compiler makes of that is its own: jaxlib 0.10 computes nothing again on a CPU)."""
    images = jax.random.normal(key, (8, 16, 16, 3))

    def build(remat):
        network = functional(ResNet, (3, 3), widths=(16, 16), stem="cifar", remat=remat)
        variables = network.init(key)

        def loss(params):
            outputs, moved = network.apply({**variables, "params": params}, images, train=True)
            return jnp.square(outputs["pooled"]).sum(), (outputs["pooled"], moved)

        kept = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True)[1], variables["params"])
        size = sum(leaf.size for leaf in jax.tree.leaves(kept))
        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"]), size

    (plain, most), (again, least) = build(False), build(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)
    assert least < 0.4 * most
