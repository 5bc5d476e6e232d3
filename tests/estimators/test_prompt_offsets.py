"""Offsets of sub-prompts: online EM against its equation, and what the price and its prior do to the E-step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.api import EstimatorSpec
from protojax.estimators.prompt_offsets import learned_offsets, online_em
from protojax.ops.prompts import e_step_logits
from protojax.ops.unit import unit

B, C, K, D, ETA = 6, 3, 2, 4, 0.1
LABELS = jnp.asarray([0, 0, 1, 0, 1, 1], jnp.int32)  # class 2 is absent
R = jax.nn.softmax(jnp.arange(B * K, dtype=jnp.float32).reshape(B, K) % 5, axis=1)


def spec() -> EstimatorSpec:
    mean = unit(jnp.ones((C, D)) + jnp.eye(C, D))
    constants = {"class_mean": mean, "class_counts": jnp.asarray([3, 3, 2], jnp.int32)}
    return EstimatorSpec(dim=D, rows=B, total_steps=10)._replace(constants=constants)


def estimator(strength: float = 1.0):
    start = 0.1 * jax.random.normal(jax.random.key(0), (C, K, D))
    return online_em(assign=lambda own, usage, potential, rows: rows["given"], initial=lambda key, constants: start,
                     num_prompts=K, strength=strength, eta=ETA)  # fmt: skip


def rows(mask: jax.Array | None = None, images: jax.Array | None = None) -> dict[str, jax.Array]:
    x = unit(jax.random.normal(jax.random.key(1), (B, D))) if images is None else images
    return {"features": x, "labels": LABELS, "mask": jnp.ones(B, bool) if mask is None else mask, "given": R}


def moved(found, S, given):
    stats = found.statistics(S, given)
    return found.update(S, stats, given, jnp.int32(0), jax.random.key(0))[0]


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_online_em_moves_means_as_the_equation_says_and_absent_classes_not_at_all(strength: float):
    found = estimator(strength)
    S = found.init(jax.random.key(0), spec())
    given = rows()
    after = moved(found, S, given)
    x, r, y = (np.asarray(v, np.float64) for v in (given["features"], R, LABELS))
    before, means = np.asarray(S["shared"]["means"]), np.asarray(after["shared"]["means"])
    for c in range(C):
        for k in range(K):
            own = y == c
            n = r[own, k].sum()
            a = 1 - (1 - ETA) ** n
            expected = before[c, k] if n == 0 else (1 - a) * before[c, k] + a * (r[own, k] @ x[own]) / n
            np.testing.assert_allclose(means[c, k], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(means[2], before[2])
    book, _ = found.codebooks(after, {})
    expected = strength * (means - np.asarray(spec().constants["class_mean"])[:, None])
    np.testing.assert_allclose(book.prototypes, expected, rtol=1e-5, atol=1e-6)


def test_a_masked_row_moves_nothing_whatever_it_holds():
    found = estimator()
    S = found.init(jax.random.key(0), spec())
    mask = jnp.asarray([True] * 4 + [False] * 2)
    clean = rows(mask)
    dirty = {**clean, "features": clean["features"].at[4:].set(jnp.nan)}
    for a, b in zip(jax.tree.leaves(moved(found, S, clean)), jax.tree.leaves(moved(found, S, dirty)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_statistics_of_two_halves_add_up():
    found = estimator()
    S = found.init(jax.random.key(0), spec())
    whole = found.statistics(S, rows())
    halves = [found.statistics(S, {k: v[s] for k, v in rows().items()}) for s in (slice(0, 2), slice(2, B))]
    for name in ("count", "mass", "first"):
        np.testing.assert_allclose(whole[name], halves[0][name] + halves[1][name], rtol=1e-6, atol=1e-7)


def test_usage_at_its_prior_costs_nothing():
    """The price is a controller on usage / prior: where they agree the logits are those without a price."""
    images = unit(jax.random.normal(jax.random.key(1), (B, D)))
    prompts = unit(jax.random.normal(jax.random.key(2), (B, K, D)))
    prior = jnp.broadcast_to(jnp.asarray([0.75, 0.25]), (B, K))
    free = e_step_logits(images, 0 * images, prompts, prior, sharpness=10.0)
    priced = e_step_logits(images, 0 * images, prompts, prior, sharpness=10.0, price=5.0, prior=prior)
    np.testing.assert_allclose(priced, free, atol=1e-5)
    uneven = e_step_logits(images, 0 * images, prompts, prior, sharpness=10.0, price=5.0)
    assert float(jnp.abs(uneven - free).max()) > 1.0


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"online_em, strength: expected a positive number, got 0\.0"):
        online_em(assign=None, initial=None, num_prompts=2, strength=0.0)
    with pytest.raises(ValueError, match="half_life: expected a positive number of epochs, got 0"):
        learned_offsets(assign=None, initial=None, num_prompts=2, rebalance=None, rebalance_steps=1, half_life=0)
