"""Theorems of the balanced estimator: usage equals the prior, nothing dies, K may exceed the batch, the ring is one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.api import EstimatorSpec
from protojax.estimators import balanced, mixture
from protojax.estimators.balanced import remember

SPEC = EstimatorSpec(4, 8, 100)


def rows_of(features, mask=None):
    features = jnp.asarray(features, jnp.float32)
    return {"features": features, "mask": jnp.ones(len(features), bool) if mask is None else jnp.asarray(mask)}


def one_step(estimator):
    return jax.jit(
        lambda S, rows, step: estimator.update(S, estimator.statistics(S, rows), rows, step, jax.random.key(0))
    )


def cone(key, count, groups=4, dim=4, shares=None):
    """Features in a narrow cone: a large common direction plus a small group-wise one."""
    key_group, key_noise = jax.random.split(key)
    directions = jnp.eye(dim, dtype=jnp.float32)[:groups]
    shares = jnp.full((groups,), 1.0 / groups) if shares is None else jnp.asarray(shares)
    which = jax.random.choice(key_group, groups, (count,), p=shares)
    return 5.0 + directions[which] + 0.1 * jax.random.normal(key_noise, (count, dim)), which


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_mean_responsibilities_over_the_memory_converge_to_the_prior(key, exponent):
    """With features that stand still, warm-started potentials converge: column masses equal the prior, however uneven
    the groups are, and every component is used."""
    estimator = balanced(6, memory=48, prior_exponent=exponent, temperature=0.05, iterations=10)
    features, _ = cone(key, 48, shares=[0.7, 0.1, 0.1, 0.1])
    S = jax.jit(estimator.start)(estimator.init(key, SPEC), rows_of(features), key)
    step = one_step(estimator)
    for i in range(40):
        S, info = step(S, rows_of(features), i)
    assert float(info["estimator/balance_error"][0]) < 1e-3
    centered = features / jnp.linalg.norm(features, axis=1, keepdims=True) - S["shared"]["center"][None, :]
    centered = centered / jnp.linalg.norm(centered, axis=1, keepdims=True)
    logits = (centered @ estimator.codebooks(S, {})[0].prototypes.T + S["components"]["potential"][None, :]) / 0.05
    expected = 1.0 / np.arange(1, 7) ** exponent
    usage = np.asarray(jax.nn.softmax(logits, axis=1)).mean(0)
    np.testing.assert_allclose(usage, expected / expected.sum(), atol=5e-3)


def test_start_sweeps_share_out_the_rows_and_a_blunt_start_begins_together(key):
    """EM on the start rows: seeds are single rows with uneven shares, after the sweeps the shares are near the prior;
    at a blunt temperature the means lie closer to one another than at a sharp one."""
    features, _ = cone(key, 48)

    def begun(sweeps, temperature):
        estimator = balanced(6, memory=48, iterations=10, start_sweeps=sweeps, temperature=temperature)
        S = jax.jit(estimator.start)(estimator.init(key, SPEC), rows_of(features), key)
        rows = features / jnp.linalg.norm(features, axis=1, keepdims=True) - S["shared"]["center"][None, :]
        rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
        prototypes = estimator.codebooks(S, {})[0].prototypes
        logits = (rows @ prototypes.T + S["components"]["potential"][None, :]) / temperature
        uneven = jnp.abs(jax.nn.softmax(logits, axis=1).mean(0) - 1.0 / 6.0).max()
        return float(uneven), float(jnp.linalg.norm(S["components"]["mean"], axis=1).mean())

    (seeds, _), (sharp, long), (blunt, short) = begun(0, 0.05), begun(20, 0.05), begun(20, 1.0)
    assert sharp < 0.25 * seeds
    assert blunt < 0.25 * seeds
    assert short < 0.7 * long


def test_no_component_dies_where_the_plain_mixture_loses_most(key):
    """K = 32 components, batches of 8, features in a cone, random start (the trap of the naive mixture): the balanced
    estimator's codebook is alive by the nearest-prototype rule, the mixture's is not."""
    alive = {}
    for name, estimator in {
        "balanced": balanced(32, start="random"),
        "mixture": mixture(32, features="unit", start="random", center=False),
    }.items():
        S, step = estimator.init(key, SPEC), one_step(estimator)
        for i in range(100):
            S, _ = step(S, rows_of(cone(jax.random.fold_in(key, i), 8)[0]), i)
        features, _ = cone(jax.random.key(9), 512)
        features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
        book = estimator.codebooks(S, {})[0]
        nearest = np.asarray(jnp.argmax(features @ book.prototypes.T + book.bias[None, :], axis=1))
        alive[name] = np.mean(np.bincount(nearest, minlength=32) / 512 > 1 / 320)
    assert alive["balanced"] >= 0.9
    assert alive["mixture"] <= 0.5


def test_planted_directions_are_recovered(key):
    """Eight components, four groups in a cone: after centring every prototype points at a group, and every group has
    some (not always two: a memory of 64 rows holds the groups unevenly)."""
    estimator = balanced(8, memory=64)
    S = jax.jit(estimator.start)(estimator.init(key, SPEC), rows_of(cone(key, 64)[0]), key)
    step = one_step(estimator)
    for i in range(50):
        S, _ = step(S, rows_of(cone(jax.random.fold_in(key, i), 8)[0]), i)
    groups = np.eye(4) - 0.25  # group directions, centred
    cosine = np.asarray(estimator.codebooks(S, {})[0].prototypes) @ (groups / np.linalg.norm(groups[0])).T
    assert cosine.max(1).min() > 0.9
    assert set(cosine.argmax(1)) == {0, 1, 2, 3}


def test_memory_is_a_ring_of_the_last_unmasked_rows(key):
    """Against a Python list: masks, wrap-around, and a batch larger than the memory."""
    estimator = balanced(3, memory=7, start="random")
    S, rng, history = estimator.init(key, SPEC), np.random.default_rng(0), []
    write = jax.jit(remember)
    for step, count in enumerate([5, 4, 12, 1, 3]):
        features = rng.normal(size=(count, 4)).astype(np.float32)
        mask = rng.uniform(size=count) < 0.8
        S = write(S, jnp.asarray(features), jnp.asarray(mask), jnp.asarray(step, jnp.int32))
        history += [(tuple(row), step) for row in features[mask]]
        held = np.asarray(S["memory"]["written"])
        rows = [(tuple(r), int(s)) for r, s in zip(np.asarray(S["memory"]["features"]), held, strict=True) if s >= 0]
        assert sorted(rows) == sorted(history[-7:])


def test_sweeps_every_other_step_and_anneals(key):
    """every=2: prototypes move on even steps only; the memory is written on all; the temperature follows its schedule,
    and potentials keep their meaning while it does (in units of cosine)."""
    estimator = balanced(4, memory=16, every=2, start="random", temperature=("exponential", 0.1, 0.01))
    S, step = estimator.init(key, SPEC), one_step(estimator)
    for i in range(4):
        new, info = step(S, rows_of(cone(jax.random.fold_in(key, i), 8)[0]), i)
        moved = bool(jnp.any(new["components"]["mean"] != S["components"]["mean"]))
        assert moved == (i % 2 == 0)
        assert float(info["estimator/balance_error"][1]) == float(i % 2 == 0)
        assert int(jnp.sum(new["memory"]["written"] == i)) == 8
        np.testing.assert_allclose(info["estimator/temperature"][0], 0.1 * 10 ** (-i / 100), rtol=1e-5)
        S = new
