"""Theorems of the scikit-learn estimator: it is EM where it should be, exact in float64, and keeps what is rare."""

from __future__ import annotations

import builtins
import importlib
import math
import pickle
import sys
import warnings

import jax
import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import check_estimator

from protojax import online_mixture_blocks as programs
from protojax.online_mixture import OnlineGaussianMixture
from protojax.online_mixture_checks import Order

CENTRES = np.random.default_rng(7).normal(size=(3, 4)) * 4


def planted(seed: int, rows: int = 300, dtype=np.float64):
    """(rows [N,4], components [N]) of a mixture of weights 0.6, 0.3, 0.1 and scales 1, 0.5, 1.5."""
    rng = np.random.default_rng(seed)
    which = rng.choice(3, size=rows, p=[0.6, 0.3, 0.1])
    scale = np.array([1.0, 0.5, 1.5])[which]
    return (CENTRES[which] + scale[:, None] * rng.normal(size=(rows, 4))).astype(dtype), which


def start(data, covariance="diag", count=3):
    """A full start, so that nothing is left to two libraries' ways of seeding."""
    shape = {"diag": (count, 4), "spherical": (count,), "tied_diag": (4,)}[covariance]
    return {"means_init": data[:count], "weights_init": np.full(count, 1 / count), "precisions_init": np.ones(shape)}


def fitted(data, iterations, **options):
    """The state after exactly so many iterations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # tol = 0 never converges, as intended
        return OnlineGaussianMixture(**{"n_components": 3, "tol": 0.0, "max_iter": iterations, **options}).fit(data)


# ------------------------------------------------------------------------------------------------ conventions
def test_scikit_learns_own_checks_pass():
    """All of them; the array API one is skipped by scikit-learn itself unless SCIPY_ARRAY_API is set."""
    results = check_estimator(OnlineGaussianMixture(), on_skip=None)
    other = [r["check_name"] for r in results if r["status"] != "passed"]
    assert len(results) > 35
    assert set(other) <= {"check_array_api_input"}


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "protojax.online_mixture")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'protojax\[sklearn\]'"):
        importlib.import_module("protojax.online_mixture")


# --------------------------------------------------------------------------------------------- full-batch EM
@pytest.mark.parametrize("covariance", ["diag", "spherical"])
def test_full_batch_equals_scikit_learn_step_by_step(covariance):
    """float64 without any flag, data far from the origin: parameters, bound and all readings after every iteration."""
    data = planted(0)[0] + 50.0
    options = {"covariance_type": covariance, "tol": 0.0, "warm_start": True, "max_iter": 1, **start(data, covariance)}
    ours, theirs = OnlineGaussianMixture(3, **options), GaussianMixture(3, **options)
    for _ in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # one iteration each, as intended
            ours.fit(data)
            theirs.fit(data)
        for name in ("means_", "covariances_", "precisions_", "weights_", "lower_bound_"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-6, err_msg=name)
        assert ours.means_.dtype == np.float64
    np.testing.assert_allclose(ours.score_samples(data), theirs.score_samples(data), rtol=1e-8)
    np.testing.assert_allclose(ours.predict_proba(data), theirs.predict_proba(data), atol=1e-8)
    np.testing.assert_array_equal(ours.predict(data), theirs.predict(data))
    for name in ("score", "bic", "aic"):
        np.testing.assert_allclose(getattr(ours, name)(data), getattr(theirs, name)(data), rtol=1e-9)


def test_full_batch_with_one_diagonal_for_all_equals_the_textbook():
    data, _ = planted(1)
    means, weights, variance = data[:3], np.full(3, 1 / 3), np.ones(4)
    for iteration in range(1, 5):
        squares = (data[:, None] - means[None]) ** 2
        joint = np.log(weights) - 0.5 * np.sum(squares / variance + np.log(2 * np.pi * variance), axis=2)
        gamma = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
        weights, means = gamma.mean(0), gamma.T @ data / gamma.sum(0)[:, None]
        variance = np.einsum("nk,nkd->d", gamma, (data[:, None] - means[None]) ** 2) / len(data) + 1e-6
        ours = fitted(data, iteration, covariance_type="tied_diag", **start(data, "tied_diag"))
        np.testing.assert_allclose(ours.means_, means, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(ours.covariances_, variance, rtol=1e-8)
        np.testing.assert_allclose(ours.weights_, weights, rtol=1e-8)
    parameters = 3 * 4 + 4 + 2
    total = ours.score_samples(data).sum()
    assert ours.bic(data) == pytest.approx(parameters * math.log(len(data)) - 2 * total, rel=1e-12)
    assert ours.aic(data) == pytest.approx(2 * parameters - 2 * total, rel=1e-12)


@pytest.mark.parametrize("covariance", ["diag", "spherical", "tied_diag"])
def test_likelihood_never_falls(covariance):
    data, _ = planted(2)
    model = OnlineGaussianMixture(
        3, covariance_type=covariance, reg_covar=0.0, tol=0.0, max_iter=1, warm_start=True, **start(data, covariance)
    )
    bounds = []
    for _ in range(25):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            bounds.append(model.fit(data).lower_bound_)
    assert np.all(np.diff(bounds) > -1e-12)
    assert bounds[-1] > bounds[0] + 0.5


# ------------------------------------------------------------------------------------------------- mini-batches
def test_one_batch_of_all_rows_is_an_em_step_however_it_arrives():
    """fit, fit with batch_size = N and nothing forgotten, and partial_fit with eta = 1 are the same iterations."""
    data, _ = planted(3)
    expected = fitted(data, 5, **start(data))
    whole = fitted(data, 5, batch_size=len(data), forgetting="none", **start(data))
    np.testing.assert_allclose(whole.means_, expected.means_, rtol=1e-9)
    np.testing.assert_allclose(whole.covariances_, expected.covariances_, rtol=1e-8)
    for forgetting in ("responsibility", "uniform"):
        stream = OnlineGaussianMixture(3, eta=1.0, forgetting=forgetting, **start(data))
        for _ in range(5):
            stream.partial_fit(data)
        assert (stream.n_iter_, stream.n_steps_, stream.n_rows_seen_) == (5, 5, 5 * len(data))
        np.testing.assert_allclose(stream.means_, expected.means_, rtol=1e-9)
        np.testing.assert_allclose(stream.covariances_, expected.covariances_, rtol=1e-8)
        np.testing.assert_allclose(stream.weights_, expected.weights_, rtol=1e-9)


def test_a_stream_without_forgetting_remembers_every_row_alike():
    """K = 1, where responsibilities do not depend on the state: ragged batches give the moments of all rows."""
    data, _ = planted(4)
    model = OnlineGaussianMixture(1, forgetting="none", reg_covar=0.0)
    for piece in np.split(data, [3, 50, 51, 170]):
        model.partial_fit(piece)
    np.testing.assert_allclose(model.means_[0], data.mean(0), rtol=1e-10)
    np.testing.assert_allclose(model.covariances_[0], data.var(0), rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_params": "kmeans", "covariance_type": "spherical"},
        {"batch_size": 64, "tol": 1e-2},
        {"init_params": "random", "n_init": 3, "annealing": ("linear", 0.3, 1.0, 0.0, 0.3), "revival": 1},
    ],
    ids=["full", "kmeans", "mini-batch", "annealed"],
)
def test_a_planted_mixture_is_recovered(options):
    """From seeds of its own. Standard errors: mean of the rarest component 1.5 / sqrt(90) = 0.16 an entry."""
    data, which = planted(5, rows=900)
    model = OnlineGaussianMixture(3, random_state=0, **options).fit(data)
    assert model.converged_
    order = [int(np.argmin(np.sum((model.means_ - c) ** 2, axis=1))) for c in CENTRES]
    assert sorted(order) == [0, 1, 2]
    assert np.abs(model.means_[order] - CENTRES).max() < 0.6
    assert np.abs(model.weights_[order] - [0.6, 0.3, 0.1]).max() < 0.08
    assert np.mean(np.argsort(order)[model.predict(data)] == which) > 0.97


# ----------------------------------------------------------------------------------------------------- drift
def drifting(seed: int, steps: int = 300, batch: int = 50, common: int = 4, rare: int = 6):
    """Ten clusters of unit scale in 8 dimensions, 8 from the origin. Four hold all but 0.36% of the rows and move 0.1
    a batch (30 in all); six come once in 33 batches each (9 rows in all) and move 0.005 a batch. Returns (centres at
    the beginning, batches, centres at the end)."""
    rng = np.random.default_rng(seed)
    share, count = 0.0006, common + rare
    chance = np.r_[np.full(common, (1 - rare * share) / common), np.full(rare, share)]
    begin, velocity = rng.normal(size=(2, count, 8))
    begin *= 8 / np.linalg.norm(begin, axis=1, keepdims=True)
    speed = np.r_[np.full(common, 0.1), np.full(rare, 0.005)]
    velocity *= (speed / np.linalg.norm(velocity, axis=1))[:, None]
    batches = []
    for step in range(steps):
        which = rng.choice(count, size=batch, p=chance)
        batches.append((begin + step * velocity)[which] + rng.normal(size=(batch, 8)))
    return begin, batches, begin + steps * velocity


def lost(means, truth, common: int = 4):
    """(common, rare) clusters that are lost: no fitted mean within 3 of where they are now (their scale is 1, they lie
    about 11 apart)."""
    away = np.linalg.norm(truth[:, None] - means[None], axis=2).min(axis=1) > 3.0
    return np.array([away[:common].sum(), away[common:].sum()])


def test_rare_components_survive_drift_only_with_forgetting_by_evidence():
    """Everything starts at the truth. Forgetting by evidence tracks all of 4 + 6 in each of 5 seeds. Uniform forgetting
    at the same rate keeps up with the common ones and loses rare ones; slowed down until it would keep those, it loses
    the common ones. MiniBatchKMeans loses both."""
    totals = {name: [] for name in ("responsibility", "uniform", "slow", "k-means")}
    for seed in range(5):
        begin, batches, truth = drifting(seed)
        options = {"n_components": 10, "means_init": begin, "precisions_init": np.ones((10, 8))}
        models = {
            "responsibility": OnlineGaussianMixture(**options),
            "uniform": OnlineGaussianMixture(forgetting="uniform", **options),
            "slow": OnlineGaussianMixture(forgetting="uniform", eta=0.02, **options),
            "k-means": MiniBatchKMeans(10, init=begin, n_init=1, random_state=seed),
        }
        for name, model in models.items():
            for batch in batches:
                model.partial_fit(batch)
            totals[name].append(lost(model.cluster_centers_ if name == "k-means" else model.means_, truth))
    per_seed = {name: np.array(counts) for name, counts in totals.items()}
    assert per_seed["responsibility"].sum() == 0
