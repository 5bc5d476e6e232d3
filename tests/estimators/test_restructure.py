"""Splitting and merging, a number of components that the data decide, a prior that they decide."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import probing
from protojax.api import OFF, Codebook, EstimatorSpec, FeatureBank, Probe
from protojax.estimators import balanced, restructure
from protojax.evals.evaluations import audit_evaluation

SPEC = EstimatorSpec(16, 64, 100)


def rows_of(features):
    features = jnp.asarray(features, jnp.float32)
    return {"features": features, "mask": jnp.ones(len(features), bool)}


def clusters(key, count, groups, dim=16, shares=None, spread=0.05):
    """Unit rows around the first `groups` axes; groups of equal size unless `shares` are given."""
    key_group, key_noise = jax.random.split(key)
    which = jnp.arange(count) % groups
    if shares is not None:
        which = jax.random.choice(key_group, groups, (count,), p=jnp.asarray(shares))
    rows = jnp.eye(dim)[which] + spread * jax.random.normal(key_noise, (count, dim))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def run(estimator, features, steps, key, total=100):
    """(state, last info) after steps over the same rows."""
    spec = SPEC._replace(rows=len(features), total_steps=total)
    rows = rows_of(features)
    S = estimator.init(key, spec)
    if estimator.start_rows:
        S = jax.jit(estimator.start)(S, rows, key)
    step = jax.jit(lambda S, i, k: estimator.update(S, estimator.statistics(S, rows), rows, i, k))
    for i in range(steps):
        S, info = step(S, jnp.asarray(i), jax.random.fold_in(key, i))
    return S, info


# ------------------------------------------------------------------------------------------------ split and merge
def test_a_component_that_repeats_another_goes_to_the_worst_explained_row(key):
    """Components e0, e0 again, e1, e2; rows e0 to e3: the later twin becomes e3, the others stay to the last bit."""
    axes = jnp.eye(4)
    components = {"mean": 0.5 * axes[jnp.array([0, 0, 1, 2])], "potential": jnp.arange(4.0)}
    memory = restructure.Memory(axes, jnp.ones(4, bool))
    move = jax.jit(restructure.split_and_merge, static_argnums=(3, 4))
    new, moved = move(components, memory, key, 2, 0.025)
    np.testing.assert_array_equal(new["mean"], 0.5 * axes[jnp.array([0, 0, 1, 2])].at[1].set(2.0 * axes[3]))
    np.testing.assert_allclose(new["potential"], [0.0, 1.5, 2.0, 3.0])
    assert float(moved) == 1.0
    again, moved = move(new, memory, key, 2, 0.025)
    np.testing.assert_array_equal(again["mean"], new["mean"])
    assert float(moved) == 0.0
    nobody, moved = move(components, memory._replace(valid=jnp.zeros(4, bool)), key, 2, 0.025)
    np.testing.assert_array_equal(nobody["mean"], components["mean"])
    assert float(moved) == 0.0


def test_the_estimator_moves_a_twin_once_the_fraction_of_the_run_is_over(key):
    """Twelve groups, eleven components on one each and a twelfth on the first again; means that EM hardly moves. The
    twin goes to the group that has none, at step 10 of 100 and not before."""
    features = clusters(key, 96, 12)
    rows = rows_of(features)
    estimator = balanced(
        12, memory=96, start="random", center=False, rate=1e-6, split_merge=1, merge_within=0.01, restructure_from=0.1
    )
    S = estimator.init(key, SPEC._replace(rows=96))
    S["components"]["mean"] = jnp.eye(16)[jnp.arange(12) % 11]
    step = jax.jit(lambda S, i: estimator.update(S, estimator.statistics(S, rows), rows, i, jax.random.fold_in(key, i)))
    covered, moved = [], []
    for i in (0, 9, 10, 11):
        S, info = step(S, jnp.asarray(i))
        moved.append(float(info["estimator/moved"][0]))
        covered.append(len(set(np.asarray(S["components"]["mean"] @ jnp.eye(16)).argmax(1).tolist())))
    assert moved == [0.0, 0.0, 1.0, 0.0]
    assert covered == [11, 11, 12, 12]


# ------------------------------------------------------------------------------------------------------ adaptive K
def test_evidence_is_the_bic_of_the_mixture_to_first_order(key):
    """Against the profile log-likelihood, written out: what merging the two nearest of 8 components would do."""
    dim, number = 16, 64
    rng = np.random.default_rng(0)
    which = rng.integers(0, 8, number * 8)
    first = np.stack([50.0 * np.eye(dim)[i] + rng.normal(0, 1.0, dim) for i in range(8)])
    first[7] = first[6] + rng.normal(0, 3.0, dim)
    count = np.bincount(which, minlength=8).astype(float)
    count *= number * 8 / count.sum()
    rows = count.sum()
    worth = restructure.evidence(
        jnp.asarray(count, jnp.float32), jnp.asarray(first, jnp.float32), jnp.ones(8, bool), jnp.float32(rows)
    )

    def criterion(lengths):
        """2 ln L - parameters ln N, halved: likelihood at the best concentration, K - 1 masses equal."""
        k, mean = len(lengths), sum(lengths) / rows
        kappa = (dim - 1) / (2 * (1 - mean))
        likelihood = rows * ((dim - 1) / 2 * np.log(kappa) - kappa * (1 - mean) - np.log(k))
        return likelihood - k * (dim - 1) / 2 * np.log(rows)

    lengths = np.linalg.norm(first, axis=1)
    together = np.linalg.norm(first[6] + first[7])
    exact = criterion([*lengths[:6], together]) - criterion(lengths)
    free = (rows - 8) / rows  # what `evidence` takes off the concentration, the criterion does not
    ours = worth.price - worth.concentration / free * (lengths[6] + lengths[7] - together)
    assert exact == pytest.approx(float(ours), rel=0.15)


@pytest.mark.parametrize("groups", [3, 6])
def test_pruning_ends_at_as_many_components_as_there_are_groups(groups, key):
    """24 components, 384 rows: what remains is one a group; what is off takes no row, and no loss can choose it."""
    features = clusters(key, 384, groups)
    estimator = balanced(24, memory=384, adapt=4, restructure_from=0.0, temperature=0.02, center=False)
    S, info = run(estimator, features, 40, key)
    active = np.asarray(S["components"]["active"])
    assert active.sum() == groups == float(info["estimator/active"][0])
    book = estimator.codebooks(S, {})[0]
    assert set(np.asarray(book.prototypes @ jnp.eye(16)).argmax(1)[active]) == set(range(groups))
    assert (np.asarray(book.bias)[~active] == OFF).all()
    assert (np.asarray(book.bias)[active] > 0.5 * OFF).all()
    assert not np.asarray(S["components"]["usage"])[~active].any()
    assert not np.asarray(estimator.statistics(S, rows_of(features))["count"])[~active].any()
    assert float(info["estimator/dead_share"][0]) == 0.0
    np.testing.assert_allclose(np.exp(np.asarray(S["components"]["log_prior"]))[active], 1.0 / groups, rtol=1e-5)


def test_growth_gives_a_component_to_every_group_that_has_none(key):
    """Two of eight components are on, on two of five groups: three more are born, one a call at most, and none without
    evidence."""
    features = clusters(key, 320, 5)
    memory = restructure.Memory(features, jnp.ones(320, bool))
    active = jnp.arange(8) < 2
    components = {
        "mean": jnp.eye(16)[:8], "potential": jnp.zeros(8), "usage": jnp.where(active, 0.5, 0.0),
        "log_prior": jnp.where(active, -jnp.log(2.0), restructure.NEVER), "active": active,
    }  # fmt: skip
    components["mean"] = components["mean"].at[2:].set(-1.0)

    @jax.jit
    def call(components, key):
        cosine = features @ (components["mean"] / jnp.linalg.norm(components["mean"], axis=1, keepdims=True)).T
        hard = jax.nn.one_hot(jnp.argmax(jnp.where(components["active"][None, :], cosine, -2.0), axis=1), 8)
        count, first = hard.sum(0), hard.T @ features
        moved = first / jnp.maximum(count, 1.0)[:, None]
        components = {**components, "mean": jnp.where(components["active"][:, None], moved, components["mean"])}
        return restructure.adapt(components, count, first, memory, key, 1)

    born = []
    for i in range(8):
        components, info = call(components, jax.random.fold_in(key, i))
        born.append(float(info["born"]))
        assert float(info["merged"]) == 0.0
    assert sum(born) == 3.0
    on = np.asarray(components["active"])
    nearest = np.asarray(components["mean"] @ jnp.eye(16)).argmax(1)[on]
    assert sorted(nearest) == [0, 1, 2, 3, 4]
    assert np.asarray(components["usage"])[on].min() > 0.0


def test_evaluations_count_components_that_are_on_alone():
    """Of six prototypes two are off: the audit is of the other four, with their number and that of the places."""
    active = np.array([True, False, True, True, False, True])
    info = {"usage": np.where(active, 0.25, 0.0), "active": active}
    book, kept = probing.in_use(Codebook(np.eye(6, dtype=np.float32), np.zeros(6, np.float32)), info)
    assert book is not None
    np.testing.assert_array_equal(book.prototypes, np.eye(6)[active])
    rows = np.eye(6, dtype=np.float32)[active]
    bank = FeatureBank(rows, rows, {}, np.arange(4), {})
    found = audit_evaluation().run(Probe(3, lambda split: bank, {}, book, kept, {}), jax.random.key(0))["prototypes"]
    assert (found["count"], found["active"], found["slots"], found["live"]) == (4, 4, 6, 4)
    assert found["estimator"] == {"live": 4, "perplexity": pytest.approx(4.0)}
    assert probing.in_use(book, {"usage": np.ones(4)})[0] is book


# -------------------------------------------------------------------------------------------------- estimated prior
def test_the_estimated_prior_is_the_mass_of_the_groups_and_never_below_its_floor(key):
    """Four groups of shares 0.7, 0.15, 0.13, 0.02, four components that stand on them: priors of the first three as
    the shares, the last at the floor."""
    shares = [0.7, 0.15, 0.13, 0.02]
    features = clusters(key, 400, 4, shares=shares)
    estimator = balanced(
        4, memory=400, start="random", center=False, prior="estimated", prior_floor=0.4, usage_rate=0.2,
        temperature=0.05, rate=1e-6,
    )  # fmt: skip
    S = estimator.init(key, SPEC)
    S["components"]["mean"] = jnp.eye(16)[:4]
    rows = rows_of(features)
    step = jax.jit(lambda S, i: estimator.update(S, estimator.statistics(S, rows), rows, i, key))
    for i in range(40):
        S, info = step(S, jnp.asarray(i))
    found = np.asarray(jnp.argmax(features @ jnp.eye(16)[:, :4], axis=1))
    real = np.bincount(found, minlength=4) / 400
    expected = np.maximum(real, 0.1)
    np.testing.assert_allclose(np.exp(S["components"]["log_prior"]), expected / expected.sum(), atol=0.01)
    assert float(info["estimator/balance_error"][0]) < 0.02


def test_sweeps_follow_the_turnover_of_the_memory(key):
    """every=0: with M = 32 N a row is in the memory for 32 steps and swept eight times, so every fourth step."""
    estimator = balanced(8, memory=256, every=0, start="random")
    rows = rows_of(clusters(key, 8, 4))
    S = estimator.init(key, SPEC)
    step = jax.jit(lambda S, i: estimator.update(S, estimator.statistics(S, rows), rows, i, key))
    swept = []
    for i in range(9):
        S, info = step(S, jnp.asarray(i))
        swept.append(float(info["estimator/balance_error"][1]))
    assert swept == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    whole = balanced(8, memory=16, every=0, start="random")
    info = jax.eval_shape(lambda S: whole.update(S, whole.statistics(S, rows), rows, 1, key), whole.init(key, SPEC))[1]
    assert info["estimator/balance_error"][1].shape == ()
