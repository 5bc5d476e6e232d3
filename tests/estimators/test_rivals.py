"""Theorems of the rival estimators: what each does exactly, where it must end, and what it may not touch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import ive, loggamma

from protojax.api import EstimatorSpec
from protojax.estimators import (
    balanced,
    coupled,
    learned,
    mixture,
    periodic_kmeans,
    queue_sinkhorn,
    spherical_kmeans,
    variational,
    von_mises_fisher,
    with_coupling,
)
from protojax.estimators.von_mises_fisher import concentration_of, log_normaliser
from protojax.workloads.prototypes import teacher_rows

D, N, GROUPS = 6, 40, 4
SPEC = EstimatorSpec(dim=D, rows=N, total_steps=100)


def rows_of(features, **more):
    features = jnp.asarray(features, jnp.float32)
    return {"features": features, "mask": jnp.ones(len(features), bool), **more}


def stepper(estimator):
    return jax.jit(
        lambda S, rows, step: estimator.update(S, estimator.statistics(S, rows), rows, step, jax.random.key(1))
    )


def unit_rows(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def planted(seed=0, count=N, noise=0.05):
    """Unit rows around GROUPS orthogonal directions, group i of row i = i mod GROUPS."""
    rng = np.random.default_rng(seed)
    centers = np.eye(D)[:GROUPS][np.arange(count) % GROUPS]
    return unit_rows(centers + noise * rng.normal(size=(count, D))).astype(np.float32)


def lloyd(means, rows, sweeps):
    """Spherical k-means in NumPy; also the smallest lead of a nearest prototype."""
    lead = np.inf
    for _ in range(sweeps):
        cosines = rows @ unit_rows(means).T
        nearest = cosines.argmax(1)
        top = np.sort(cosines, axis=1)
        lead = min(lead, (top[:, -1] - top[:, -2]).min())
        means = np.stack([rows[nearest == k].mean(0) if (nearest == k).any() else means[k] for k in range(len(means))])
    return means, lead


# ------------------------------------------------------------------------------------------------- k-means
def test_a_full_batch_at_rate_one_is_a_sweep_of_lloyd_and_periodic_kmeans_makes_several(key):
    """Both against NumPy. Rate 1 forgets the past; a prototype without rows stays; the periodic one stands still until
    its step, then makes `sweeps` sweeps over the memory at once."""
    rows = planted(3, noise=0.5)
    online = spherical_kmeans(7, rate=1.0, center=False, start="random")
    S, step = online.init(key, SPEC), stepper(online)
    first = unit_rows(np.random.default_rng(43).normal(size=(7, D)))
    S = {**S, "components": {**S["components"], "mean": jnp.asarray(first, jnp.float32)}}
    for i in range(3):
        S, info = step(S, rows_of(rows), i)
    expected, lead = lloyd(first, rows.astype(np.float64), 3)
    assert lead > 0.01  # what the hard assignment resolves
    np.testing.assert_allclose(S["components"]["mean"], expected, atol=1e-4)
    assert 0.0 < float(info["estimator/own_cosine"][0]) / N <= 1.0

    periodic = periodic_kmeans(7, memory=N, every=2, sweeps=3, restart="warm", center=False, start="random")
    S, step = periodic.init(key, SPEC), stepper(periodic)
    S = {**S, "components": {**S["components"], "mean": jnp.asarray(first, jnp.float32)}}
    still, info = step(S, rows_of(rows), 0)
    np.testing.assert_array_equal(still["components"]["mean"], S["components"]["mean"])
    moved, _ = step(still, rows_of(rows), 1)
    np.testing.assert_allclose(moved["components"]["mean"], expected, atol=1e-4)
    assert float(info["estimator/clustered"][0]) == 0.0


def test_at_rate_zero_the_means_are_those_of_all_rows_that_a_prototype_ever_won(key):
    """MacQueen: steps 1 / count, in whatever batches the rows come."""
    estimator = spherical_kmeans(5, rate=0.0, center=False, start="random")
    S, step, rng = estimator.init(key, SPEC), stepper(estimator), np.random.default_rng(178)
    first = jnp.asarray(unit_rows(rng.normal(size=(5, D))), jnp.float32)
    S = {**S, "components": {**S["components"], "mean": first}}
    sums, counts = np.zeros((5, D)), np.zeros(5)
    for i in range(4):
        rows = unit_rows(rng.normal(size=(N, D)))
        nearest = (rows @ unit_rows(np.asarray(S["components"]["mean"], np.float64)).T).argmax(1)
        np.add.at(sums, nearest, rows)
        counts += np.bincount(nearest, minlength=5)
        S, _ = step(S, rows_of(rows), i)
    np.testing.assert_allclose(S["components"]["count"], counts, atol=1e-3)
    np.testing.assert_allclose(S["components"]["mean"], sums / counts[:, None], atol=1e-4)


def test_periodic_kmeans_finds_the_groups_again_from_rows_of_its_memory(key):
    """restart='kmeans++': new seeds, from directions that were all wrong; nothing moves in between, centre included."""
    estimator = periodic_kmeans(GROUPS, memory=N, every=3, restart="kmeans++", start="random", center=True)
    S, step = estimator.init(key, SPEC), stepper(estimator)
    for i in range(3):
        S, _ = step(S, rows_of(planted()), i)
    later, _ = step(S, rows_of(planted(5)), 3)
    for left, right in zip(estimator.codebooks(S, {})[0], estimator.codebooks(later, {})[0], strict=True):
        np.testing.assert_array_equal(left, right)
    rows = planted().astype(np.float64)
    centers = unit_rows(np.eye(D)[:GROUPS] - rows.mean(0))
    cosines = np.asarray(estimator.codebooks(S, {})[0].prototypes) @ centers.T
    assert sorted(cosines.argmax(0)) == list(range(GROUPS))
    assert cosines.max(0).min() > 0.98


# ----------------------------------------------------------------------------------------- von Mises-Fisher
def exact_log_normaliser(kappa, dim):
    order = dim / 2 - 1
    bessel = np.log(ive(order, kappa)) + kappa
    return order * np.log(kappa) - dim / 2 * np.log(2 * np.pi) - bessel


@pytest.mark.parametrize("dim", [2, 3, 16, 128])
def test_the_closed_normaliser_is_near_the_bessel_function_and_belongs_to_the_concentration(dim):
    """At most 0.16 nats from the exact one, exact at kappa = 0, and d ln C / d kappa = -r: the M-step maximises what
    the E-step computes."""
    r = np.linspace(0.02, 0.98, 40)
    with jax.enable_x64(True):
        kappa = np.asarray(concentration_of(jnp.asarray(r), dim))
        found = np.asarray(log_normaliser(jnp.asarray(r), dim))
        zero = float(log_normaliser(jnp.zeros(()), dim))
        slope = jax.vmap(jax.grad(lambda x: log_normaliser(x, dim)))(jnp.asarray(r)) / jax.vmap(
            jax.grad(lambda x: concentration_of(x, dim))
        )(jnp.asarray(r))
    error = found - exact_log_normaliser(kappa, dim)
    assert error.min() > -1e-3
    assert error.max() < 0.16
    np.testing.assert_allclose(zero, loggamma(dim / 2) - np.log(2) - dim / 2 * np.log(np.pi), rtol=1e-12)
    np.testing.assert_allclose(slope, -r, rtol=1e-9)


def test_planted_directions_weights_and_concentrations_are_recovered(key):
    """Groups of 3:1:1:1 rows, the first twice as wide; EM on all rows from one row of each group."""
    rng = np.random.default_rng(2)
    which = np.repeat(np.arange(GROUPS), [60, 20, 20, 20])
    noise = np.where(which == 0, 0.2, 0.1)[:, None]
    rows = unit_rows(np.eye(D)[which] + noise * rng.normal(size=(120, D)))
    estimator = von_mises_fisher(GROUPS, concentration="each", center=False, eta=0.9)
    S = estimator.init(key, SPEC)
    S["components"]["mean"] = jnp.asarray(0.9 * rows[[0, 60, 80, 100]], jnp.float32)
    step, likelihoods = stepper(estimator), []
    for i in range(15):
        S, info = step(S, rows_of(rows), i)
        likelihoods.append(float(info["estimator/log_likelihood"][0]))
    prototypes = np.asarray(estimator.codebooks(S, {})[0].prototypes)
    assert np.diag(np.eye(D)[:GROUPS] @ prototypes.T).min() > 0.98
    sums = np.stack([rows[which == g].mean(0) for g in range(GROUPS)])
    np.testing.assert_allclose(S["components"]["mean"], sums, atol=0.02)
    np.testing.assert_allclose(np.exp(np.asarray(S["components"]["log_weight"])), [0.5, *[1 / 6] * 3], atol=0.01)
    assert likelihoods[-1] > likelihoods[0]


# ------------------------------------------------------------------------------------------ variational Bayes
def test_a_small_prior_prunes_components_that_the_data_do_not_need_and_a_large_one_keeps_them(key):
    """Four groups, twelve components, new rows at every step (the same ones again can be learned by heart): which
    components hold weight at the end, and that every group has one of them."""
    alive = {}
    for prior in (1e-3, 100.0):
        estimator = variational(12, prior=prior, population=N, eta=0.3, center=False)
        S = jax.jit(estimator.start)(estimator.init(key, SPEC), rows_of(planted(noise=0.2)), key)
        step = stepper(estimator)
        for i in range(120):
            S, info = step(S, rows_of(planted(i, noise=0.2)), i)
        shares = np.exp(np.asarray(S["components"]["log_weight"]))
        alive[prior] = int((shares > 1e-3).sum())
        held = np.asarray(estimator.codebooks(S, {})[0].prototypes)[shares > 1e-3]
        assert (np.eye(D)[:GROUPS] @ held.T).max(1).min() > 0.95, prior
    assert alive[1e-3] == GROUPS
    assert alive[100.0] == 12
    assert np.isfinite(float(info["estimator/kept"][0]))


# ------------------------------------------------------------------------------------------------------ SwAV
def test_targets_have_equal_masses_over_the_queue(key):
    """Rows in two uneven heaps, prototypes at random: the mean target over the queue is 1 / K; the prediction has no
    bias; an empty queue balances nothing."""
    estimator = queue_sinkhorn(8, queue=N, temperature=0.1, iterations=60)
    S, head = estimator.init(key, SPEC), estimator.head(key, SPEC)
    np.testing.assert_array_equal(estimator.codebooks(S, head)[0].bias, 0.0)
    rows = unit_rows(np.eye(D)[np.where(np.arange(N) < 30, 0, 1)] + 0.3 * np.random.default_rng(0).normal(size=(N, D)))
    S, info = stepper(estimator)(S, rows_of(rows), 0)
    assert float(info["estimator/memory_fill"][0]) == 1.0
    target, prediction = estimator.codebooks(S, head)
    masses = jax.nn.softmax((rows @ np.asarray(target.prototypes).T + np.asarray(target.bias)[None]) / 0.1, 1).mean(0)
    np.testing.assert_allclose(masses, 1 / 8, atol=1e-4)
    np.testing.assert_array_equal(prediction.bias, 0.0)
    np.testing.assert_array_equal(prediction.prototypes, target.prototypes)


# ------------------------------------------------------------------------------------------------------ dial
def train(estimator, S, head, optimizer, steps=6):
    """Alternate the estimator's update and an optimiser step on the head, as a training step does (EMA 0: the teacher's
    head is the student's). Returns the codebooks after every step."""
    books, opt = [], optimizer.init(head)

    def loss(head, S, rows):
        book = estimator.codebooks(S, head)[1]
        logits = rows["features"] @ book.prototypes.T + book.bias[None, :]
        return jnp.mean(jax.nn.logsumexp(5.0 * logits, axis=1) - logits[:, 0])

    @jax.jit
    def step(S, head, opt, rows, i):
        rows = {**rows, **{k: v for k, v in head.items() if k == "offset"}}
        S, _ = estimator.update(S, estimator.statistics(S, rows), rows, i, jax.random.key(0))
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = optimizer.update(jax.grad(loss)(head, S, rows), opt, head)
        return S, optax.apply_updates(head, updates), opt

    for i in range(steps):
        S, head, opt = step(S, head, opt, rows_of(planted(i, noise=0.5)), i)
        books.append(np.asarray(estimator.codebooks(S, head)[1].prototypes))
    return np.stack(books), S


@pytest.mark.parametrize("optimizer", [optax.sgd(0.5, momentum=0.9), optax.adam(0.05)], ids=["sgd", "adam"])
def test_dial_at_one_is_joint_training_step_for_step(optimizer, key):
    """From the same prototypes, the same loss and optimiser: EM moves nothing, the gradient everything."""
    dial = coupled(8, coupling=1.0, start="random", center=False)
    S = dial.init(key, SPEC)
    books, after = train(dial, S, dial.head(key, SPEC), optimizer)
    joint = learned(8)
    expected, _ = train(joint, joint.init(key, SPEC), {"prototypes": S["components"]["mean"]}, optimizer)
    assert np.abs(expected[-1] - expected[0]).max() > 0.05
    np.testing.assert_allclose(books, expected, atol=2e-5)
    np.testing.assert_array_equal(after["components"]["mean"], S["components"]["mean"])


def test_dial_at_zero_is_the_estimator_and_both_ends_are_approached(key):
    """coupling = 0 is the decoupled estimator itself: no head, so nothing that a gradient could move. Near both ends
    the prototypes are near those of the end."""
    inner = balanced(8, start="random", center=False)
    assert with_coupling(inner, 0.0) is inner
    assert coupled(8, coupling=0.0).head(key, SPEC) == {}
    S, optimizer = inner.init(key, SPEC), optax.adam(0.05)
    decoupled, _ = train(inner, S, {}, optax.identity())
    found = {}
    for share in (1e-4, 0.5, 1.0 - 1e-4, 1.0):
        dial = with_coupling(inner, share)
        found[share], _ = train(dial, S, dial.head(key, SPEC), optimizer)
    np.testing.assert_allclose(found[1e-4], decoupled, atol=1e-3)
    np.testing.assert_allclose(found[1.0 - 1e-4], found[1.0], atol=1e-3)
    between = np.abs(found[0.5] - decoupled).max(), np.abs(found[0.5] - found[1.0]).max()
    assert min(between) > 0.01


def test_em_answers_to_where_the_gradient_took_a_prototype(key):
    """Tied: with an offset in the rows, EM starts from the prototypes, and its step is 1 - lambda of the M-step's from
    there; without one it is that of the bare estimator."""
    inner = mixture(5, features="unit", center=False, start="random")
    dial = with_coupling(inner, 0.25)
    S = inner.init(key, SPEC)
    offset = jax.random.normal(key, (5, D))
    book = np.asarray(dial.codebooks(S, {"offset": offset})[1].prototypes)
    tied = {**S, "components": {**S["components"], "mean": jnp.asarray(book)}}  # means of the start have length 1
    plain, _ = stepper(inner)(tied, rows_of(planted()), 0)
    new, _ = stepper(dial)(S, rows_of(planted(), offset=offset), 0)
    expected = np.asarray(S["components"]["mean"]) + 0.75 * (np.asarray(plain["components"]["mean"]) - book)
    np.testing.assert_allclose(new["components"]["mean"], expected, atol=1e-5)
    np.testing.assert_allclose(new["components"]["log_weight"], plain["components"]["log_weight"], atol=1e-5)
    embeddings, batch = {"image": jnp.ones((2, 3, D))}, {"mask": jnp.ones(3, bool)}
    given = teacher_rows(embeddings, batch, {"prototypes": {"offset": offset}, "objective": {}})
    np.testing.assert_array_equal(given["offset"], offset)
    assert set(teacher_rows(embeddings, batch, {"prototypes": {"prototypes": offset}})) == {"features", "mask"}
    with pytest.raises(ValueError, match=r"expected the head that this estimator made, \{'offset': \[K, D\]\}"):
        dial.codebooks(S, {})
