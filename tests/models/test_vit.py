"""Vision transformers: scanned depth, position interpolation, drop path, pooling, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.models.functional import functional
from protojax.models.vit import ViT, bicubic_matrix

SMALL = {"width": 16, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 16}


def _loss_and_gradient(network, variables, images, key):
    def loss(params):
        features, _ = network.apply({"params": params, "stats": {}}, images, train=True, key=key)
        return jnp.square(features["tokens"]).sum() + features["pooled"][:, 0].sum(), features["pooled"]

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def test_scan_equals_unrolled_equals_remat_with_drop_path(key):
    options = SMALL | {"drop_path": 0.4, "layer_scale": 0.5}
    networks = [functional(ViT, **options, **other) for other in ({}, {"scan": False}, {"remat": True})]
    variables = jax.jit(networks[0].init)(key)
    images = jax.random.normal(key, (2, 16, 16, 3))
    scanned, *others = (_loss_and_gradient(network, variables, images, key) for network in networks)
    for other in others:
        # the same operations in another fusion: float32 rounding, gradients of order 10
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), scanned, other)


def test_position_embedding_is_untouched_at_native_size():
    np.testing.assert_array_equal(bicubic_matrix(7, 7), np.eye(7))
    np.testing.assert_allclose(bicubic_matrix(14, 6).sum(1), 1.0, rtol=1e-14)
    # nearest neighbours of a = -0.75 at a quarter of the grid, from the kernel's formula by hand
    np.testing.assert_allclose(bicubic_matrix(8, 16)[8, 2:6], [-0.03515625, 0.26171875, 0.87890625, -0.10546875])


def test_other_sizes_move_with_a_constant_position_embedding(key):
    """With one embedding for all positions, interpolation must change nothing: a crop gives the tokens that its
    patches give anywhere (the attention of depth 0 mixes nothing)."""
    network = functional(ViT, **(SMALL | {"depth": 1, "layer_scale": 0.0, "pool": "mean"}))
    variables = jax.jit(network.init)(key)
    variables["params"]["position"] = jnp.broadcast_to(variables["params"]["position"][:1], (16, 16))
    images = jax.random.normal(key, (2, 16, 16, 3))
    whole, _ = jax.jit(network.apply)(variables, images)
    crop, _ = jax.jit(network.apply)(variables, images[:, 4:12, :12])
    grid = whole["tokens"].reshape((2, 4, 4, 16))[:, 1:3, :3]
    np.testing.assert_allclose(crop["tokens"].reshape((2, 2, 3, 16)), grid, atol=1e-5)
    np.testing.assert_allclose(crop["pooled"], grid.mean((1, 2)), atol=1e-5)


def test_drop_path_needs_train_and_a_key_and_spares_the_first_block(key):
    images = jax.random.normal(key, (4, 16, 16, 3))
    for depth in (1, 2):
        network = functional(ViT, **(SMALL | {"depth": depth, "drop_path": 0.9}))
        variables = jax.jit(network.init)(key)
        apply = jax.jit(network.apply, static_argnames="train")
        plain, silent, dropped, again = (
            apply(variables, images, **arguments)[0]["pooled"]
            for arguments in ({}, {"train": True}, {"train": True, "key": key}, {"train": True, "key": key})
        )
        np.testing.assert_array_equal(silent, plain)
        np.testing.assert_array_equal(dropped, again)
        # with one block the only rate is zero
        assert (float(jnp.abs(dropped - plain).max()) > 1e-3) is (depth == 2)


def test_blocks_start_as_independent_draws(key):
    kernel = jax.jit(functional(ViT, **SMALL).init)(key)["params"]["blocks"]["qkv"]["kernel"]
    assert kernel.shape == (2, 16, 48)
    assert jnp.abs(kernel[0] - kernel[1]).max() > 0.01
    # 768 draws of N(0, 0.02^2): four standard errors of the standard deviation
    np.testing.assert_allclose(kernel.std((1, 2)), 0.02, rtol=4 / np.sqrt(2 * 768))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "pool must be 'class' or 'mean'; given 'max'"),
        ({"image_size": 18}, "image_size must be a multiple of patch_size 4; given 18"),
        ({"heads": 3}, "width must be a multiple of heads 3; given 16"),
        ({"attention": "flash"}, "attention must be None, 'xla' or 'cudnn'; given 'flash'"),
        ({"drop_path": 1.0}, r"drop_path is a probability in \[0, 1\); given 1.0"),
    ],
)
def test_bad_options(options, message, key):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functional(ViT, **(SMALL | options)).init, key)


def test_crops_must_be_whole_patches(key):
    network = functional(ViT, **SMALL)
    with pytest.raises(ValueError, match="multiples of the patch size 4"):
        jax.eval_shape(
            network.apply, jax.eval_shape(network.init, key), jax.ShapeDtypeStruct((1, 10, 16, 3), jnp.float32)
        )
