"""What every estimator promises, whatever it does inside."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.api import Estimator, EstimatorSpec
from protojax.estimators import (
    balanced,
    capi,
    coupled,
    describe,
    frozen,
    learned,
    mixture,
    periodic_kmeans,
    queue_sinkhorn,
    spherical_kmeans,
    variational,
    von_mises_fisher,
    with_coupling,
    with_logit_center,
)

K, D, N = 24, 6, 10  # K > N on purpose
SPEC = EstimatorSpec(dim=D, rows=N, total_steps=20)
BUILDERS = {
    "learned": lambda k: learned(k, center_momentum=0.9),
    "frozen": lambda k: frozen(k),
    "mixture": lambda k: mixture(k, eta=("cosine", 0.2, 0.05), beta=("linear", 0.5, 1.0), price=0.5),
    "mixture_diag": lambda k: mixture(k, covariance="diag", revive=2, revive_below=1.0, weights="uniform"),
    "mixture_uniform": lambda k: mixture(
        k, covariance="spherical", forgetting="uniform", center=False, features="unit"
    ),
    "balanced": lambda k: balanced(k, temperature=("exponential", 0.1, 0.02), prior_exponent=0.5),
    "balanced_every": lambda k: balanced(k, every=2, start="random"),
    "balanced_estimated": lambda k: balanced(k, prior="estimated", every=0),
    "balanced_split": lambda k: balanced(k, split_merge=3, merge_within=0.5, restructure_from=0.0),
    "balanced_adapt": lambda k: balanced(k, adapt=3, every=2, restructure_from=0.0, memory=64),
    "capi": lambda k: capi(k),
    "centered": lambda k: with_logit_center(balanced(k), 0.5),
    "spherical_kmeans": lambda k: spherical_kmeans(k),
    "periodic_kmeans": lambda k: periodic_kmeans(k, every=2, restart="warm", sweeps=2),
    "von_mises_fisher": lambda k: von_mises_fisher(k, concentration="each", max_concentration=100.0),
    "variational": lambda k: variational(k, eta=("linear", 0.2, 0.05)),
    "queue_sinkhorn": lambda k: queue_sinkhorn(k),
    "coupled": lambda k: coupled(k, coupling=0.5),
}
# Revival and restructuring draw components and rows, so that they commute with permutations in distribution only.
LEARNED = ("learned", "capi", "queue_sinkhorn", "coupled")
PERMUTABLE = [name for name in BUILDERS if name not in ("mixture_diag", "balanced_split", "balanced_adapt")]


def rows_of(key, count=N, mask=None, offset=2.0):
    features = jax.random.normal(key, (count, D)) + offset
    return {"features": features, "mask": jnp.ones(count, bool) if mask is None else jnp.asarray(mask)}


def started(estimator: Estimator, key):
    S = estimator.init(key, SPEC)
    if estimator.start_rows:
        S = jax.jit(estimator.start)(S, rows_of(key, estimator.start_rows), key)
    return S


@functools.cache
def built(name):
    """(estimator, its jitted step): one compile serves every test of this file."""
    estimator = BUILDERS[name](K)
    return estimator, stepper(estimator)


def stepper(estimator: Estimator):
    return jax.jit(lambda S, rows, step, key: estimator.update(S, estimator.statistics(S, rows), rows, step, key))


def assert_tree_equal(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


def assert_tree_close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance), left, right)


@pytest.fixture(params=list(BUILDERS), ids=list(BUILDERS))
def name(request):
    return request.param


def test_state_codebooks_and_information(name, key):
    """Arrays lead with K or rows; K may exceed N; one compile; everything stays finite; codebooks are [K,D] and [K]."""
    estimator, step = built(name)
    S, head = started(estimator, key), estimator.head(key, SPEC)
    assert set(S) == {"components", "memory", "shared"}
    assert all(leaf.shape[0] == K for leaf in jax.tree.leaves(S["components"]))
    assert len({leaf.shape[0] for leaf in jax.tree.leaves(S["memory"])}) <= 1
    structure = jax.tree.map(lambda a: (a.shape, a.dtype), S)
    for i in range(4):
        S, info = step(S, rows_of(jax.random.fold_in(key, i)), jnp.asarray(i, jnp.int32), key)
    assert step._cache_size() == 1
    assert jax.tree.map(lambda a: (a.shape, a.dtype), S) == structure
    for name_, (total, count) in info.items():
        assert total.shape == count.shape == (), name_
        assert np.isfinite(float(total)), name_
        assert float(count) >= 0, name_
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(S))
    for book in jax.jit(estimator.codebooks)(S, head):
        assert book.prototypes.shape == (K, D)
        assert book.bias.shape == (K,)
        np.testing.assert_allclose(np.linalg.norm(book.prototypes, axis=1), 1.0, rtol=1e-5)
        assert np.isfinite(np.asarray(book.bias)).all()
    assert set(describe(S)) <= {"usage", "center", "active"}


def test_statistics_are_sums_over_unmasked_rows(name, key):
    """Splitting rows adds up; a masked row counts zero, NaN included; so does update, given those statistics."""
    estimator, step = built(name)
    S = started(estimator, key)
    statistics = jax.jit(estimator.statistics)
    mask = np.arange(N) < 7
    rows = rows_of(key, mask=mask)
    whole = statistics(S, rows)
    poisoned = {**rows, "features": jnp.where(rows["mask"][:, None], rows["features"], jnp.nan)}
    assert_tree_equal(whole, statistics(S, poisoned))
    halves = [statistics(S, jax.tree.map(lambda a: a[part], rows)) for part in (slice(0, 5), slice(5, 10))]  # noqa: B023
    # Entropies are differences of sums as large as sum_i |l_i|, so that rounding is relative to those (about 1e3).
    assert_tree_close(jax.tree.map(jnp.add, *halves), whole, rtol=2e-5, atol=2e-4)
    assert_tree_equal(step(S, rows, jnp.asarray(1, jnp.int32), key), step(S, poisoned, jnp.asarray(1, jnp.int32), key))


def test_empty_batch_changes_nothing_and_single_row_is_finite(name, key):
    estimator, step = built(name)
    S = started(estimator, key)
    S, _ = step(S, rows_of(key), jnp.asarray(0, jnp.int32), key)
    unchanged, info = step(S, rows_of(key, mask=np.zeros(N, bool)), jnp.asarray(1, jnp.int32), key)
    assert_tree_equal(unchanged, S)
    assert all(float(total) == 0.0 and float(count) == 0.0 for total, count in info.values())
    one, _ = step(S, rows_of(key, mask=np.arange(N) == 3), jnp.asarray(1, jnp.int32), key)
    assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(one))
    if estimator.start_rows:
        nothing = rows_of(key, estimator.start_rows, mask=np.zeros(estimator.start_rows, bool))
        assert_tree_equal(jax.jit(estimator.start)(S, nothing, key), S)


@pytest.mark.parametrize("name", PERMUTABLE)
def test_permuting_prototypes_permutes_everything(name, key):
    estimator, step = built(name)
    S, head = started(estimator, key), estimator.head(key, SPEC)
    order = np.random.default_rng(0).permutation(K)
    moved = {**S, "components": jax.tree.map(lambda a: a[order], S["components"])}
    head_moved = jax.tree.map(lambda a: a[order], head)
    for i in range(3):
        rows = rows_of(jax.random.fold_in(key, i))
        S, info = step(S, rows, jnp.asarray(i), key)
        moved, info_moved = step(moved, rows, jnp.asarray(i), key)
    # Only the order of sums over K differs; potentials are logarithms divided by temperatures down to 0.01.
    permuted = {**S, "components": jax.tree.map(lambda a: a[order], S["components"])}
    assert_tree_close(permuted, moved, rtol=2e-4, atol=2e-5)
    assert_tree_close(info, info_moved, rtol=2e-3, atol=2e-3)
    for book, book_moved in zip(estimator.codebooks(S, head), estimator.codebooks(moved, head_moved), strict=True):
        assert_tree_close(jax.tree.map(lambda a: a[order], book), book_moved, rtol=2e-4, atol=2e-5)


def test_no_gradient_enters_the_state(name, key):
    """Codebooks give the state exactly zero gradient, and rows give exactly zero to statistics and updates."""
    estimator, _ = built(name)
    S, head = started(estimator, key), estimator.head(key, SPEC)
    floating = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)  # noqa: E731
    weight = jax.random.normal(key, (K, D))

    def through_books(state, head):
        dtypes = jax.tree.map(lambda new, old: new.astype(old.dtype), state, S)
        target, prediction = estimator.codebooks(dtypes, head)
        return jnp.sum(weight * (target.prototypes + prediction.prototypes)) + jnp.sum(target.bias + prediction.bias)

    to_state, to_head = jax.jit(jax.grad(through_books, (0, 1)))(floating(S), head)
    assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(to_state))
    assert bool(jax.tree.leaves(to_head)) == (name in LEARNED)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(to_head))

    rows = rows_of(key)

    def through_rows(features):
        stats = estimator.statistics(S, {**rows, "features": features})
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(stats))

    assert not np.any(np.asarray(jax.grad(through_rows)(rows["features"])))


def test_target_of_learned_heads_is_cut_off(key):
    """The target codebook carries no gradient to the head, the prediction does."""
    for estimator in (learned(K), capi(K), queue_sinkhorn(K), coupled(K)):
        S, head = estimator.init(key, SPEC), estimator.head(key, SPEC)
        to_target = jax.grad(lambda h, e=estimator, s=S: jnp.sum(e.codebooks(s, h)[0].prototypes ** 3))(head)
        to_prediction = jax.grad(lambda h, e=estimator, s=S: jnp.sum(e.codebooks(s, h)[1].prototypes ** 3))(head)
        assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(to_target))
        assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(to_prediction))
        with pytest.raises(ValueError, match="expected the head that this estimator made"):
            estimator.codebooks(S, {})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mixture(0), "mixture, components: expected an integer of at least 1, got 0"),
        (lambda: mixture(4, covariance="tide"), r"covariance.*did you mean 'tied'"),
        (lambda: mixture(4, forgetting="uniforms"), r"forgetting.*did you mean 'uniform'"),
        (lambda: mixture(4, assignment="posterior", covariance="diag"), "needs covariance='tied'"),
        (lambda: mixture(4, usage_rate=0.0), r"usage_rate: expected a number in \(0, 1\]"),
        (lambda: mixture(4, eta=("cosin", 0.1, 0.0)), r"mixture, eta.*did you mean 'cosine'"),
        (lambda: balanced(8, memory=15), "at least 2 x components = 16 rows"),
        (lambda: balanced(8, prior_exponent=-1.0), "prior_exponent: expected a finite number of at least 0"),
        (lambda: balanced(8, start="kmeans"), r"start.*did you mean 'kmeans\+\+'"),
        (lambda: balanced(8, prior="estimate"), r"prior.*did you mean 'estimated'"),
        (lambda: balanced(8, prior="estimated", prior_exponent=1.0), "prior='estimated' takes no prior_exponent"),
        (lambda: balanced(8, adapt=2, split_merge=2), "adapt needs equal masses and no split_merge"),
        (lambda: capi(8, target_temperature=0.0), "target_temperature: expected a positive number"),
        (lambda: spherical_kmeans(8, start="kmean++"), r"spherical_kmeans, start.*did you mean 'kmeans\+\+'"),
        (lambda: periodic_kmeans(8, memory=7), r"at least as many rows as components \(8\), got 7"),
        (lambda: periodic_kmeans(8, restart="worm"), "restart.*did you mean 'warm'"),
        (lambda: von_mises_fisher(8, max_concentration=0.0), "max_concentration: expected a positive number, got 0.0"),
        (lambda: von_mises_fisher(8, concentration="share"), "concentration.*did you mean 'shared'"),
        (lambda: variational(8, prior=0.0), "variational, prior: expected a positive number, got 0.0"),
        (lambda: queue_sinkhorn(8, temperature=-1.0), "queue_sinkhorn, temperature: expected a positive number"),
        (lambda: coupled(8, coupling=1.5), r"coupled, coupling: expected a number in \[0, 1\], got 1.5"),
        (
            lambda: with_coupling(frozen(8), 0.5).init(jax.random.key(0), SPEC),
            r"state has components/mean.*\['prototypes'\]",
        ),
        (lambda: learned(8, features="units"), r"features.*did you mean 'unit'"),
        (lambda: with_logit_center(frozen(8), 1.5), r"momentum: expected a number in \[0, 1\]"),
    ],
)
def test_bad_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_rows_of_the_wrong_shape_are_refused(key):
    estimator = mixture(4)
    S = estimator.init(key, SPEC)
    with pytest.raises(ValueError, match="flatten views and tokens into rows first"):
        estimator.statistics(S, {"features": jnp.zeros((2, N, D)), "mask": jnp.ones(N, bool)})
