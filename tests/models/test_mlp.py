"""Networks over tables and stars: what they ignore, and the shape of their classifier."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.models.mlp import dropout, soft_label_encoder

F, S, E, C, B = 5, 4, 3, 6, 7
SMALL = {"width": 8, "depth": 2, "dropout": 0.5, "heads": 2}


def table(seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    mask = jnp.asarray(rng.uniform(size=(B, S)) < 0.6).at[0].set(False)
    return {"features": draw(B, F), "neighbours": draw(B, S, F), "edges": draw(B, S, E), "neighbour_mask": mask}


@functools.cache
def built(trunk: str, **options):
    encoder = soft_label_encoder(trunk, C, features=F, edges=E, sizes=SMALL, **options)
    return encoder, encoder.init(jax.random.key(0), table())


@pytest.mark.parametrize("trunk", ["mlp", "star_graph"])
def test_shapes_and_that_dropout_needs_a_key_and_training(trunk):
    encoder, variables = built(trunk)
    run = lambda train, key: encoder.apply(variables, table(), train, key)[0]  # noqa: E731
    plain = run(False, jax.random.key(1))
    assert {k: v.shape for k, v in plain.items()} == {"logits": (B, C), "backbone": (B, 8)}
    np.testing.assert_array_equal(plain["logits"], run(True, None)["logits"])
    assert not np.array_equal(plain["logits"], run(True, jax.random.key(1))["logits"])


def test_a_star_ignores_masked_neighbours_and_the_order_of_the_others():
    encoder, variables = built("star_graph")
    base = table()
    logits = lambda inputs: encoder.apply(variables, inputs, False, None)[0]["logits"]  # noqa: E731
    noise = jnp.where(base["neighbour_mask"][:, :, None], 0.0, 1e3)
    spoiled = {**base, "neighbours": base["neighbours"] + noise, "edges": base["edges"] + noise[:, :, :E]}
    np.testing.assert_allclose(logits(base), logits(spoiled), atol=1e-5)
    order = jnp.asarray([2, 0, 3, 1])
    turned = {**base, **{k: base[k][:, order] for k in ("neighbours", "edges", "neighbour_mask")}}
    np.testing.assert_allclose(logits(base), logits(turned), atol=1e-5)
    moved = {**base, "edges": base["edges"] + 1.0}
    changed = np.abs(np.asarray(logits(base) - logits(moved))).max(axis=1)
    assert changed[0] == 0.0  # it has no neighbour
    assert (changed[1:] > 1e-4).sum() >= B - 2


def test_logits_are_normalised_then_divided_by_the_temperature():
    encoder, variables = built("mlp", logit_norm=3.0, temperature=1.5)
    logits = encoder.apply(variables, table(), False, None)[0]["logits"]
    np.testing.assert_allclose(np.linalg.norm(logits, axis=1), 2.0, rtol=1e-5)
    zero = jax.tree.map(jnp.zeros_like, variables)
    gradient = jax.grad(lambda v: jnp.sum(encoder.apply(v, table(), False, None)[0]["logits"] ** 2))(zero)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_the_first_prediction_is_the_given_constant():
    mean = np.asarray([0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    encoder, variables = built("mlp", bias=tuple(np.log(mean).tolist()))
    logits = encoder.apply(variables, table(), False, None)[0]["logits"]
    np.testing.assert_allclose(jax.nn.softmax(logits), np.tile(mean, (B, 1)), atol=1e-6)


def test_dropout_keeps_the_mean():
    x = jnp.ones((200, 50))
    kept = dropout(x, 0.25, jax.random.key(0), True)
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)}
    assert float(jnp.mean(kept)) == pytest.approx(1.0, abs=4 * np.sqrt(0.25 / 0.75 / x.size))


@pytest.mark.parametrize(
    ("trunk", "options", "message"),
    [
        ("mlp", {"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ("mlp", {"logit_norm": -1.0}, "logit_norm: expected a positive number"),
        ("mlp", {"sizes": {"width": 0}}, "expected width >= 1"),
        ("star_graph", {"sizes": {"width": 8, "heads": 3}}, "heads must divide the width"),
    ],
)
def test_mistakes(trunk, options, message):
    with pytest.raises(ValueError, match=message):
        soft_label_encoder(trunk, C, features=F, edges=E, **options).init(jax.random.key(0), table())
