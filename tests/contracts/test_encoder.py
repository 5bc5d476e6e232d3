"""What every encoder promises: fixed names and shapes, float32 embeddings, rows that do not know one another."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.api import Encoder
from protojax.models.encoder import BACKBONES, make_encoder
from protojax.models.heads import HEADS
from protojax.models.resnet import MicroResNet, ResNet
from protojax.models.vit import ViT

V, LOCAL, B, SIDE, D = 2, 1, 8, 8, 4
SMALL = {"hidden": 8, "dim": D}
RESNET = functools.partial(ResNet, (1, 1), widths=(4, 8), stem="cifar", zero_init=False)
BUILDERS = {
    "resnet": lambda: make_encoder(RESNET, "carp", head_options=SMALL),
    "resnet_bottleneck": lambda: make_encoder(
        functools.partial(RESNET, kind="bottleneck", norm="group"), "linear", head_options={"dim": D}
    ),
    "resnet_micro": lambda: make_encoder(functools.partial(MicroResNet, widths=(4, 4, 8)), "carp", head_options=SMALL),
    "vit": lambda: make_encoder(
        functools.partial(ViT, 16, 2, 2, patch_size=4, image_size=8), "dino", head_options=SMALL
    ),
    "vit_bfloat16": lambda: make_encoder(
        functools.partial(ViT, 16, 2, 2, patch_size=4, image_size=8, pool="mean"), "identity", dtype="bfloat16"
    ),
}


def inputs_of(key, side=SIDE):
    keys = jax.random.split(key)
    return {
        "global": jax.random.normal(keys[0], (V, B, side, side, 3)),
        "local": jax.random.normal(keys[1], (LOCAL, B, side // 2, side // 2, 3)),
    }


@functools.cache
def built(name):
    """(encoder, jitted init, jitted training and evaluation pass, variables): compiled once for the file."""
    encoder: Encoder = BUILDERS[name]()
    init = jax.jit(encoder.init)
    train = jax.jit(lambda v, x, k: encoder.apply(v, x, True, k))
    evaluate = jax.jit(lambda v, x, k: encoder.apply(v, x, False, k))
    return encoder, init, train, evaluate, init(jax.random.key(0), inputs_of(jax.random.key(1)))


def structure(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right, tolerance):
    """Within `tolerance` of the largest number: projections start small."""
    scale = np.abs(left).max()
    assert scale > 0
    np.testing.assert_allclose(left, right, rtol=0, atol=tolerance * scale)


FAST = ("resnet_micro", "vit")


@pytest.fixture(params=[n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in BUILDERS])
def name(request):
    return request.param


def test_names_shapes_and_precision(name, key):
    _, _, train, evaluate, variables = built(name)
    assert set(variables) == {"params", "stats"}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    for run in (train, evaluate):
        embeddings, stats = run(variables, inputs_of(key), key)
        assert set(embeddings) == {"image", "backbone"}
        assert {e.dtype for e in embeddings.values()} == {np.dtype(np.float32)}
        assert [e.shape[:2] for e in embeddings.values()] == [(V + LOCAL, B)] * 2
        assert all(np.isfinite(e).all() for e in embeddings.values())
        assert structure(stats) == structure(variables["stats"])
    width = embeddings["backbone"].shape[2]
    assert embeddings["image"].shape[2] == (width if name == "vit_bfloat16" else D)
    assert train._cache_size() == evaluate._cache_size() == 1


def test_initialisation_is_a_function_of_the_key_alone(name, key):
    _, init, _, _, variables = built(name)
    assert_equal(init(jax.random.key(0), inputs_of(jax.random.key(7))), variables)
    other = init(jax.random.key(3), inputs_of(jax.random.key(1)))
    assert structure(other) == structure(variables)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (other, variables)), strict=True))


def test_statistics_move_in_training_and_stay_in_evaluation(name, key):
    _, _, train, evaluate, variables = built(name)
    _, kept = evaluate(variables, inputs_of(key), key)
    assert_equal(kept, variables["stats"])
    _, moved = train(variables, inputs_of(key), key)
    pairs = zip(jax.tree.leaves(moved), jax.tree.leaves(variables["stats"]), strict=True)
    assert all(not np.array_equal(a, b) for a, b in pairs)


def test_equal_keys_give_equal_embeddings(name, key):
    _, _, train, evaluate, variables = built(name)
    assert_equal(train(variables, inputs_of(key), key), train(variables, inputs_of(key), key))
    other = jax.random.key(5)  # nothing is random in evaluation
    assert_equal(evaluate(variables, inputs_of(key), key), evaluate(variables, inputs_of(key), other))


def test_permuting_images_permutes_embeddings(name, key):
    """Also in training: batch moments are sums over images."""
    _, _, train, evaluate, variables = built(name)
    order = np.random.default_rng(0).permutation(B)
    inputs = inputs_of(key)
    shuffled = {k: v[:, order] for k, v in inputs.items()}
    # In training, float32 sums of up to 1024 terms in another order (6e-5), amplified by the norms' 1 / sigma.
    for run, tolerance in ((evaluate, 1e-5), (train, 1e-3)):
        (one, _), (two, _) = run(variables, inputs, key), run(variables, shuffled, key)
        for part in one:
            assert_close(one[part][:, order], two[part], tolerance)


def test_evaluation_of_an_image_does_not_depend_on_the_others(name, key):
    _, _, _, evaluate, variables = built(name)
    inputs = inputs_of(key)
    others = {k: v.at[:, 1:].set(3.0) for k, v in inputs.items()}
    (one, _), (two, _) = evaluate(variables, inputs, key), evaluate(variables, others, key)
    for part in one:
        assert_close(one[part][:, 0], two[part][:, 0], 1e-5)
        assert not np.allclose(one[part][:, 1], two[part][:, 1], rtol=0.01, atol=0)


PAIRS = [("resnet_micro", head) for head in HEADS] + [("resnet18", "carp"), ("vit_ti", "dino")]
DEEP = [pytest.param(b, "carp", marks=pytest.mark.slow) for b in BACKBONES if b not in dict(PAIRS)]


@pytest.mark.parametrize(("backbone", "head"), PAIRS + DEEP)
def test_every_backbone_and_every_head_by_shapes_alone(backbone, head):
    """Embeddings of the head's width, statistics where there is batch norm; nothing is compiled."""
    options = {} if head == "identity" else {"dim": D} if head == "linear" else SMALL
    encoder = make_encoder(backbone, head, head_options=options)
    inputs = {"global": jax.ShapeDtypeStruct((1, 2, 32, 32, 3), jnp.float32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(encoder.init, key, inputs)
    embeddings, stats = jax.eval_shape(lambda v, x, k: encoder.apply(v, x, False, k), variables, inputs, key)
    width = embeddings["backbone"].shape[-1]
    assert embeddings["image"].shape == (1, 2, width if head == "identity" else D)
    assert structure(stats) == structure(variables["stats"])
    assert bool(jax.tree.leaves(stats)) == (backbone.startswith("resnet") or head == "carp")
