"""Resampler, pools and text towers: what they must not depend on, and the failing arm that fails as it should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.data.pairs_text import pool_states
from protojax.models.attention_pool import AttentionPool, entropy_ratio
from protojax.models.functional import functional
from protojax.models.layers import LayerNorm
from protojax.models.perceiver import Attention, Resampler
from protojax.models.perceiver_aligner import _measures, make_aligner
from protojax.models.text import TEXT_POOLS, TextTransformer, check_text_pool, check_token_ids, pool_text
from protojax.ops.contrastive import nested_contrastive

B, N, D, W = 4, 6, 5, 8
OPTIONS = {"width": 6, "num_latents": 3, "latent_width": W, "depth": 1, "heads": 2}


def network(module, *arguments, **options):
    """(variables, apply) of a module that takes neither train nor key where `plain`."""

    class Wrapped(module):  # type: ignore[misc, valid-type]
        def __call__(self, *inputs, train=False, key=None):
            return super().__call__(*inputs)

    pure = functional(Wrapped, *arguments, **options)
    variables = jax.jit(pure.init)(jax.random.key(0))
    # Norms and biases start at one and zero, where much is invisible: move every parameter.
    moved = jax.tree.map(
        lambda p: p + 0.1 * jnp.asarray(np.random.default_rng(p.size).normal(size=p.shape), p.dtype),
        variables["params"],
    )
    return {**variables, "params": moved}, jax.jit(lambda v, *inputs: pure.apply(v, *inputs)[0])


def tokens(seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, N, D)), jnp.float32)


@pytest.mark.parametrize("shared", [False, True])
def test_resampler_ignores_order_padding_and_masked_content(shared):
    variables, apply = network(
        Resampler, D, width=W, latents=3, depth=2, heads=2, self_attention=shared, shared_norm=shared
    )
    x, every = tokens(), jnp.ones((B, N), bool)
    latents, _ = apply(variables, x, every)
    assert latents.shape == (B, 3, W)
    order = np.random.default_rng(1).permutation(N)
    np.testing.assert_allclose(apply(variables, x[:, order], every)[0], latents, atol=2e-6)
    padded = jnp.concatenate([x, jnp.full((B, 2, D), jnp.nan)], axis=1)
    mask = jnp.concatenate([every, jnp.zeros((B, 2), bool)], axis=1)
    np.testing.assert_allclose(apply(variables, padded, mask)[0], latents, atol=2e-6)
    assert np.abs(np.asarray(apply(variables, 2.0 * x, every)[0] - latents)).max() > 1e-3


def test_folded_keys_and_values_are_those_of_a_norm_and_a_product():
    """One product for all layers equals LN_kv(x) K of each layer, gains and biases moved from their start."""
    variables, _ = network(Resampler, D, width=W, latents=3, depth=2, heads=2)
    p = variables["params"]

    class Norm(LayerNorm):
        def __call__(self, x, train=False, key=None):
            return super().__call__(x)

    norm = functional(Norm, W, epsilon=1e-6)
    x = tokens() @ p["project"]["kernel"] + p["project"]["bias"][None, None]

    class KeysValues(Resampler):
        def __call__(self, tokens, train=False, key=None):
            return self._keys_values(tokens)

    pure = functional(KeysValues, D, width=W, latents=3, depth=2, heads=2)
    keys, values = pure.apply(variables, tokens())[0]
    for layer in range(2):
        own = {"params": {"scale": p["norm_scale"][layer], "bias": p["norm_bias"][layer]}, "stats": {}}
        both = norm.apply(own, x)[0] @ p["key_value"][layer]
        np.testing.assert_allclose(keys[layer].reshape(B, N, W), both[..., :W], atol=1e-5)
        np.testing.assert_allclose(values[layer].reshape(B, N, W), both[..., W:], atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "simple", "multihead"])
def test_pools_ignore_masked_tokens_and_say_how_flat_they_are(pool):
    variables, apply = network(AttentionPool, D, pool=pool, heads=1)
    x, every = tokens(), jnp.ones((B, N), bool)
    vector, weights = apply(variables, x, every)
    padded = jnp.concatenate([x, jnp.full((B, 1, D), jnp.nan)], axis=1)
    mask = jnp.concatenate([every, jnp.zeros((B, 1), bool)], axis=1)
    other, more = apply(variables, padded, mask)
    np.testing.assert_allclose(other, vector, atol=1e-5)
    np.testing.assert_allclose(more[..., :N], weights, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    ratio = entropy_ratio(more, mask)
    assert np.all(np.asarray(ratio) <= 1.0 + 1e-5)
    assert (np.asarray(ratio) > 1 - 1e-5).all() == (pool == "mean")


def test_text_pools_agree_with_those_of_the_caches_and_padding_hurts_one():
    draw = np.random.default_rng(0)
    states, eos = draw.normal(size=(B, N, D)).astype(np.float32), np.asarray([2, 3, 5, 1])
    mask = np.arange(N)[None, :] <= eos[:, None]
    cached = pool_states(states, mask, eos)
    longer = np.concatenate([states, draw.normal(size=(B, 2, D)).astype(np.float32)], axis=1)
    more = np.concatenate([mask, np.zeros((B, 2), bool)], axis=1)
    for pool in TEXT_POOLS:
        np.testing.assert_allclose(pool_text(jnp.asarray(states), jnp.asarray(mask), jnp.asarray(eos), pool),
                                   cached[pool], atol=1e-6)  # fmt: skip
        same = np.allclose(pool_states(longer, more, eos)[pool], cached[pool], atol=1e-6)
        assert same == (pool != "unmasked_mean")


def test_a_causal_tower_pooled_at_its_start_is_constant_and_the_loss_is_chance():
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 20, size=(8, N)), jnp.int32).at[:, 0].set(1)
    mask = jnp.ones((8, N), bool)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(8, W)), jnp.float32)
    losses = {}
    for pool in ("bos", "eos"):
        variables, apply = network(
            TextTransformer, 20, width=W, depth=1, heads=2, max_length=N, pool=pool, failing_arm=True
        )
        text = apply(variables, ids, mask)
        losses[pool] = nested_contrastive(images, text, widths=(4, W), sharpness=1.0)
        constant = np.abs(np.asarray(text - text[:1])).max() < 1e-6
        assert constant == (pool == "bos")
        # Causal: what stands after a position does not reach it; padding neither.
        padded = apply(variables, ids, mask.at[:, -1].set(False))
        cut = apply(variables, ids[:, :-1], mask[:, :-1])
        np.testing.assert_allclose(padded, cut, atol=1e-6)
    assert np.all(np.asarray(losses["bos"].losses) >= np.log(8.0) - 1e-6)
    same = nested_contrastive(jnp.ones_like(images), jnp.ones_like(images), widths=(W,), sharpness=1.0)
    assert float(same.losses[0]) == pytest.approx(np.log(8.0), rel=1e-6)


def test_latents_that_look_alike_and_latents_that_do_not():
    alike = _measures(jnp.ones((2, 3, W)), Attention(jnp.full((2, 3, N), 1 / N), jnp.ones((2,))))
    apart = _measures(jnp.eye(W)[None, :3], Attention(jnp.eye(N)[None, :3], jnp.zeros((1,))))
    for name, same, other in (("identical_maps", 1, 0), ("latent_cosine", 1, 0), ("latent_rank", 1, 3)):
        np.testing.assert_allclose(alike[name], same, atol=1e-3, err_msg=name)  # the rank of rounding noise is not 1
        np.testing.assert_allclose(apart[name], other, atol=1e-5, err_msg=name)


def test_attention_entropy_is_of_every_head_not_of_their_mean():
    """Entropy is concave: that of the heads' mean map is at least the mean of theirs, and here more."""

    class Looking(Resampler):
        def __call__(self, tokens, mask, train=False, key=None):
            return super().__call__(tokens, mask, maps=True)[1]

    pure = functional(Looking, D, width=W, latents=3, depth=1, heads=4)
    variables, mask = pure.init(jax.random.key(0)), jnp.arange(N)[None, :] < jnp.asarray([N, N, 3, 1])[:, None]
    sharp = jax.tree.map(lambda p: 20.0 * p, variables["params"])
    seen = pure.apply({**variables, "params": sharp}, tokens(), mask)[0]
    np.testing.assert_allclose(seen.map.sum(-1), 1.0, atol=1e-6)
    assert not np.any(np.asarray(seen.map)[2, :, 3:])
    of_mean = np.asarray(entropy_ratio(seen.map, mask))
    assert np.all(np.asarray(seen.entropy)[:3] < of_mean[:3])
    assert float(seen.entropy[3]) == 1.0  # a single token: there is nothing to choose


def test_a_shared_resampler_reads_text_as_a_set_and_has_one_set_of_latents():
    encoder = make_aligner({"image": D, "text": 7}, shared_resampler=True, latent_pool="attention", **OPTIONS)
    states, mask = (
        jax.random.normal(jax.random.key(5), (B, 5, 7)),
        jnp.arange(5)[None, :] < jnp.asarray([[5], [3], [2], [1]]),
    )
    inputs = {"image_tokens": tokens(), "text_states": states, "text_mask": mask}
    variables = jax.jit(encoder.init)(jax.random.key(0), inputs)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables["params"])]
    assert sum("latents" in name for name in names) == 1
    apply = jax.jit(lambda v, i: encoder.apply(v, i, False, None)[0])
    found = apply(variables, inputs)
    np.testing.assert_allclose(jnp.linalg.norm(found["text"], axis=-1), 1.0, atol=1e-6)
    dirty = inputs | {"text_states": jnp.where(mask[:, :, None], states, jnp.nan)}
    np.testing.assert_allclose(apply(variables, dirty)["text"], found["text"], atol=1e-6)
    turned = inputs | {"text_states": states[:, ::-1], "text_mask": mask[:, ::-1]}
    np.testing.assert_allclose(apply(variables, turned)["text"], found["text"], atol=2e-6)

    def loss(params):
        out, _ = encoder.apply({**variables, "params": params}, inputs, True, jax.random.key(1))
        return nested_contrastive(out["image"][0], out["text"], widths=(2, 6), sharpness=4.0).losses.sum()

    bars = jax.jit(jax.grad(loss))(variables["params"])
    dead = [jax.tree_util.keystr(p) for p, bar in jax.tree_util.tree_leaves_with_path(bars) if not np.any(bar)]
    assert not dead
    with pytest.raises(ValueError, match="shared_resampler needs image_path='perceiver', got 'direct'"):
        jax.eval_shape(
            make_aligner({"image": D, "text": 7}, shared_resampler=True, image_path="direct", **OPTIONS).init,
            jax.random.key(0), inputs,
        )  # fmt: skip


@pytest.mark.parametrize(
    "path", [{"image_path": "perceiver", "latent_pool": "attention"}, {"image_path": "direct"},
             {"image_path": "direct", "order": "pool_then_project"}],
)  # fmt: skip
def test_aligner_gives_unit_rows_and_every_parameter_a_gradient(path):
    encoder = make_aligner({"image": D, "text": 7}, **(OPTIONS | path))
    text = jax.random.normal(jax.random.key(5), (B, 7))
    inputs = {"image_tokens": tokens(), "image_mask": jnp.ones((B, N), bool), "text": text,
              "caption_id": jnp.arange(B)}  # fmt: skip
    variables = jax.jit(encoder.init)(jax.random.key(0), inputs)
    found = jax.jit(lambda v: encoder.apply(v, inputs, False, None)[0])(variables)
    assert found["image"].shape == (1, B, 6)
    assert found["text"].shape == (B, 6)
    np.testing.assert_allclose(jnp.linalg.norm(found["text"], axis=-1), 1.0, atol=1e-6)

    def loss(params):
        out, _ = encoder.apply({**variables, "params": params}, inputs, True, jax.random.key(1))
        assert "caption_id" in out
        return nested_contrastive(out["image"][0], out["text"], widths=(2, 6), sharpness=4.0).losses.sum()

    bars = jax.jit(jax.grad(loss))(variables["params"])
    dead = [jax.tree_util.keystr(p) for p, bar in jax.tree_util.tree_leaves_with_path(bars) if not np.any(bar)]
    assert not dead


def test_what_is_refused():
    with pytest.raises(ValueError, match="sees only the start token"):
        check_text_pool("bos", causal=True)
    with pytest.raises(ValueError, match="text_pool must be one of"):
        check_text_pool("last", causal=True)
    with pytest.raises(ValueError, match=r"lie in 0..9 .* caption 1 with id 12"):
        check_token_ids(np.asarray([[1, 2], [1, 12]]), np.ones((2, 2), bool), 10)
    with pytest.raises(ValueError, match=r"1 captions hold padding alone, the first are \[1\]"):
        check_token_ids(np.zeros((2, 2), int), np.asarray([[True, False], [False, False]]), 10)
    with pytest.raises(ValueError, match="latent width 9 is not a multiple of heads 2"):
        jax.eval_shape(lambda: functional(Resampler, D, width=9, heads=2).init(jax.random.key(0)))
    inputs = {"image_tokens": tokens(), "text": jnp.ones((B, 7))}
    with pytest.raises(ValueError, match=r"width 5, but the heads were made for width 4"):
        make_aligner({"image": 4, "text": 7}, **OPTIONS).init(jax.random.key(0), inputs)
    with pytest.raises(ValueError, match="class token in front"):
        jax.eval_shape(
            make_aligner({"image": D, "text": 7}, image_path="class_token", has_class_token=False, **OPTIONS).init,
            jax.random.key(0), inputs,
        )  # fmt: skip
