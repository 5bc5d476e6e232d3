"""Backbone and head over views: groups, order, masks, sharding, precision, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from protojax.models import BACKBONES, make_encoder
from protojax.models.functional import functional
from protojax.models.heads import Head
from protojax.models.resnet import ResNet
from protojax.models.vit import ViT

RESNET = functools.partial(ResNet, (1, 1), widths=(4, 8), stem="cifar", zero_init=False)
VIT = functools.partial(ViT, 16, 2, 2, patch_size=4, image_size=8)
HEAD = {"hidden": 8, "dim": 4}


def _encoder(backbone=RESNET, **options):
    return make_encoder(backbone, "carp", head_options=HEAD, **options)


def _inputs(key, images=8):
    keys = jax.random.split(key, 2)
    return {
        "global": jax.random.normal(keys[0], (2, images, 8, 8, 3)),
        "local": jax.random.normal(keys[1], (3, images, 4, 4, 3)),
    }


def _loss(encoder, params, stats, inputs, key):
    embeddings, new = encoder.apply({"params": params, "stats": stats}, inputs, True, key)
    weight = jnp.cos(jnp.arange(embeddings["image"].size, dtype=jnp.float32)).reshape(embeddings["image"].shape)
    return (embeddings["image"] * weight).sum(), (embeddings, new)


def _step(encoder):
    return jax.jit(jax.value_and_grad(functools.partial(_loss, encoder), has_aux=True))


def test_views_of_a_size_are_one_batch_and_global_views_come_first(key):
    """The encoder is: backbone on all global rows, then on all local rows with the moved moments, head on all."""
    encoder, inputs = _encoder(), _inputs(key, 4)
    variables = jax.jit(encoder.init)(key, inputs)
    embeddings, stats = jax.jit(lambda v, x: encoder.apply(v, x, True, key))(variables, inputs)
    backbone, head = functional(RESNET), functional(Head, 8, **HEAD)
    run_backbone, run_head = (jax.jit(functools.partial(network.apply, train=True)) for network in (backbone, head))

    part = {kind: variables[kind]["backbone"] for kind in variables}
    pooled = []
    for views in (inputs["global"], inputs["local"]):
        features, moved = run_backbone(part, views.reshape((-1, *views.shape[2:])))
        part = part | {"stats": moved}
        pooled.append(features["pooled"].reshape((*views.shape[:2], 8)))
    expected = jnp.concatenate(pooled)
    image, head_stats = run_head({k: variables[k]["head"] for k in variables}, expected.reshape((-1, 8)))
    close = functools.partial(np.testing.assert_allclose, atol=3e-5)  # batch norms of 20 rows amplify 1e-7
    close(embeddings["backbone"], expected)
    close(embeddings["image"], image.reshape((5, 4, 4)))
    jax.tree.map(close, stats, {"backbone": part["stats"], "head": head_stats})


def test_evaluation_leaves_statistics_alone_and_needs_no_batch(key):
    encoder, inputs = _encoder(), {"global": _inputs(key)["global"]}
    variables = jax.jit(encoder.init)(key, inputs)
    apply = jax.jit(lambda v, x: encoder.apply(v, x, False, None))
    embeddings, stats = apply(variables, inputs)
    jax.tree.map(np.testing.assert_array_equal, stats, variables["stats"])
    alone, _ = apply(variables, {"global": inputs["global"][:, :1]})
    np.testing.assert_allclose(alone["image"][:, 0], embeddings["image"][:, 0], atol=1e-6)


def test_masked_images_change_nothing(key):
    encoder, inputs = _encoder(), _inputs(key)
    variables = jax.jit(encoder.init)(key, inputs)
    inputs["mask"] = jnp.arange(8) < 5
    noisy = inputs | {name: inputs[name].at[:, 5:].set(50.0) for name in ("global", "local")}
    results = [_step(encoder)(variables["params"], variables["stats"], each, key)[0][1] for each in (inputs, noisy)]
    for name in ("image", "backbone"):
        np.testing.assert_allclose(results[0][0][name][:, :5], results[1][0][name][:, :5], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[0][1], results[1][1])


def test_sharded_over_eight_devices_equals_one_device(key):
    """Batch norm is over the global batch: embeddings, statistics and gradients do not know the mesh."""
    encoder, inputs = _encoder(), _inputs(key)
    variables = jax.jit(encoder.init)(key, inputs)
    single = _step(encoder)(variables["params"], variables["stats"], inputs, key)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(inputs, NamedSharding(mesh, P(None, "data")))
    params, stats = jax.device_put((variables["params"], variables["stats"]), NamedSharding(mesh, P()))
    step = _step(encoder)
    sharded = step(params, stats, spread, key)
    # float32 sums of up to 1024 terms in another order, amplified by the norms' 1 / sigma
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), sharded, single)
    program = step.lower(params, stats, spread, key).compile().as_text()
    assert "all-reduce" in program
    for moved in ("all-to-all", "all-gather", "collective-permute"):
        assert moved not in program


# A batch norm in the head would annihilate the gradient of the ViT's last bias.
@pytest.mark.parametrize(("backbone", "head"), [(RESNET, "carp"), (VIT, "dino")])
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(backbone, head, key):
    encoder, inputs = make_encoder(backbone, head, head_options=HEAD), {"global": _inputs(key)["global"]}
    variables = jax.jit(encoder.init)(key, inputs)
    _, gradients = _step(encoder)(variables["params"], variables["stats"], inputs, key)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert bool(jnp.isfinite(leaf).all()), path
        assert float(jnp.abs(leaf).max()) > 1e-6, path


def test_bfloat16_is_a_policy_of_products_alone(key):
    inputs = {"global": _inputs(key)["global"]}
    full, half = _encoder(VIT, tokens=True), _encoder(VIT, tokens=True, dtype="bfloat16")
    variables = jax.jit(half.init)(key, inputs)
    results = [jax.jit(lambda v, x, e=e: e.apply(v, x, False, None))(variables, inputs)[0] for e in (full, half)]
    for tree in (variables, results[1], _step(half)(variables["params"], variables["stats"], inputs, key)):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"float32"}
    assert results[1]["tokens"].shape == (2, 8, 4, 16)
    # bfloat16 has 8 bits: 2^-9 a rounding, ten roundings deep, features of order 1
    np.testing.assert_allclose(results[0]["backbone"], results[1]["backbone"], atol=0.1)
    assert float(jnp.abs(results[0]["backbone"] - results[1]["backbone"]).max()) > 1e-5


def test_key_none_means_no_drop_path_in_training(key):
    encoder = make_encoder(VIT, "carp", backbone_options={"drop_path": 0.8}, head_options=HEAD)
    inputs = {"global": jnp.broadcast_to(_inputs(key)["global"][:1, :1], (2, 8, 8, 8, 3))}
    variables = jax.jit(encoder.init)(key, inputs)
    calm = jax.jit(lambda v, x: encoder.apply(v, x, True, None))(variables, inputs)[0]["backbone"]
    plain = jax.jit(lambda v, x: encoder.apply(v, x, False, None))(variables, inputs)[0]["backbone"]
    wild = jax.jit(lambda v, x, k: encoder.apply(v, x, True, k))(variables, inputs, key)[0]["backbone"]
    np.testing.assert_allclose(calm, plain, atol=1e-6)
    # images and views are equal, so that only the draws tell rows apart
    np.testing.assert_allclose(plain[:2], jnp.broadcast_to(plain[:1, :1], (2, 8, 16)), atol=1e-5)
    assert float(jnp.abs(wild[0] - wild[1]).max()) > 1e-3
    assert float(jnp.abs(wild[0] - wild[0, :1]).max()) > 1e-3


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="unknown backbone 'resnet-50': did you mean 'resnet50'"):
        make_encoder("resnet-50")
    with pytest.raises(ValueError, match="unknown head 'carpp': did you mean 'carp'"):
        make_encoder("resnet18", "carpp")
    with pytest.raises(ValueError, match=f"unknown backbone 'zzz': known: {', '.join(sorted(BACKBONES))}"):
        make_encoder("zzz")


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"local": (1, 2, 8, 8, 3)}, ValueError, r"a dict with 'global' \[V,B,H,W,3\]; given \['local'\]"),
        ({"global": (2, 8, 8, 3)}, ValueError, r"'global' must be \[V,B,H,W,3\].*given shape \(2, 8, 8, 3\)"),
        ({"global": (2, 4, 8, 8, 3), "local": (3, 5, 4, 4, 3)}, ValueError, r"'local' must be .* of 'global' \(4,\)"),
        ({"global": (2, 4, 8, 8, 3), "mask": (5,)}, ValueError, r"'mask' must be \[B\] = \(4,\); given shape \(5,\)"),
        ({"global": (2, 4, 8, 8, 4)}, ValueError, r"images must be \[N,H,W,3\]; given shape \(8, 8, 8, 4\)"),
    ],
)
def test_bad_inputs(inputs, error, message, key):
    encoder = _encoder()
    variables = jax.eval_shape(encoder.init, key, _inputs(key))
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in inputs.items()}
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda v, x: encoder.apply(v, x, True, None), variables, shapes)


def test_tokens_need_a_backbone_that_has_them(key):
    encoder = _encoder(tokens=True)
    inputs = _inputs(key)
    with pytest.raises(ValueError, match="tokens=True needs a backbone with patch tokens"):
        jax.eval_shape(lambda k: encoder.apply(encoder.init(k, inputs), inputs, False, None), key)


# ------------------------------------------------------------------------------------------------- hidden patches
def test_what_is_hidden_does_not_reach_the_embeddings_and_what_is_asked_is_projected(key):
    """Pixels under hidden patches change nothing at all; those of other patches do. The teacher's `patches` are the
    tokens of the whole image through the patch head, in the order asked for."""
    encoder = _encoder(VIT, patches=True)
    inputs = {"global": _inputs(key, 3)["global"]}
    masked = jnp.asarray(np.stack([[[0, 3], [1, 2], [2, 3]], [[0, 1], [1, 3], [0, 2]]]), jnp.int32)
    variables = jax.jit(encoder.init)(key, inputs)
    apply = jax.jit(lambda v, x: encoder.apply(v, x, False, None)[0])
    seen = apply(variables, {**inputs, "masked": masked})
    assert seen["tokens"].shape == (2, 3, 2, 4)
    images = np.array(inputs["global"])
    other = images.copy()
    for view in range(2):
        for image in range(3):
            for patch in np.asarray(masked[view, image]):
                row, column = divmod(int(patch), 2)
                other[view, image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
    again = apply(variables, {"global": jnp.asarray(other), "masked": masked})
    jax.tree.map(np.testing.assert_array_equal, seen, again)
    whole, moved = (apply(variables, {"global": x})["image"] for x in (inputs["global"], jnp.asarray(other)))
    assert np.abs(moved - whole).max() > 0.01 * np.abs(whole).max()  # the same pixels, not hidden

    asked = apply(variables, {**inputs, "patches": masked})
    assert set(apply(variables, inputs)) == {"image", "backbone"}
    np.testing.assert_allclose(asked["image"], apply(variables, inputs)["image"], atol=1e-6)
    turned = apply(variables, {**inputs, "patches": masked[:, :, ::-1]})
    np.testing.assert_allclose(turned["tokens"], asked["tokens"][:, :, ::-1], atol=1e-6)
    assert np.abs(asked["tokens"] - seen["tokens"]).max() > 0.01 * np.abs(asked["tokens"]).max()


def test_patches_are_refused_where_they_cannot_be(key):
    with pytest.raises(ValueError, match="patches=True needs a backbone with patch tokens"):
        make_encoder("resnet18", patches=True)
    encoder = _encoder(VIT, patches=True)
    inputs = {"global": _inputs(key, 3)["global"], "masked": jnp.zeros((3, 2, 1), jnp.int32)}
    with pytest.raises(ValueError, match=r"'masked' must be positions \[V,B,n\] of the global views \(2, 3\)"):
        encoder.init(key, inputs)
    plain = _encoder(VIT)
    variables = jax.jit(plain.init)(key, {"global": inputs["global"]})
    with pytest.raises(ValueError, match="from a network with a mask token only"):
        plain.apply(variables, {"global": inputs["global"], "masked": jnp.zeros((2, 3, 1), jnp.int32)}, False, None)
