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


# ------------------------------------------------------------------------------------------------ the machinery
def test_an_order_visits_each_row_once_without_an_array_of_all():
    for rows in (1, 2, 3, 16, 97, 360):
        order = Order(rows, np.random.RandomState(rows))
        batches = [order.batch(start, 7) for start in range(0, rows, 7)]
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(rows))
        assert all(np.all(np.diff(batch) > 0) for batch in batches)


def test_blocks_padding_and_tiles_change_nothing(monkeypatch, tmp_path):
    """One padded block, many streamed blocks of a file on disk with a ragged tail, tiles of 2: the same numbers."""
    data, _ = planted(6, rows=331)
    expected = fitted(data, 3, **start(data))
    stored = np.lib.format.open_memmap(tmp_path / "rows.npy", mode="w+", dtype=np.float64, shape=data.shape)
    stored[:] = data
    monkeypatch.setattr(programs, "LARGEST", 64)
    monkeypatch.setattr(programs, "KEPT_BYTES", 0)
    blocks = programs.Blocks(stored, stored.dtype)
    assert [mask.sum() for _, mask in blocks] == [64] * 5 + [11]
    assert blocks.kept is None
    found = fitted(np.load(tmp_path / "rows.npy", mmap_mode="r"), 3, tile=2, **start(data))
    np.testing.assert_allclose(found.means_, expected.means_, rtol=1e-10)
    np.testing.assert_allclose(found.covariances_, expected.covariances_, rtol=1e-9)
    np.testing.assert_array_equal(found.predict(data), expected.predict(data))
    np.testing.assert_allclose(found.score_samples(data), expected.score_samples(data), rtol=1e-10)


def test_odd_sizes_compile_once():
    data, _ = planted(7)
    model = fitted(data, 2, **start(data))
    compiled = (programs.labels, programs._block_statistics, programs.m_step)
    for rows in (40, 33, 64, 17):
        model.predict(data[:rows])
        model.partial_fit(data[:rows])
        if rows == 40:
            before = [program._cache_size() for program in compiled]
    assert [program._cache_size() for program in compiled] == before


def test_memory_does_not_grow_with_rows_times_components():
    """The block of an E-step shrinks with its width, that of an argmax with the tile, and the compiled E-step of
    K = 16,384 holds less than its N x K responsibilities would need, by far."""
    assert programs.block_size(10**9, 65_536) * 65_536 <= programs.BLOCK_ENTRIES
    assert programs.block_size(10**9, 8) == programs.LARGEST
    count, rows, width = 16_384, 4096, 4
    plan = OnlineGaussianMixture(count)._plan(full_batch=True)
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, np.float32)  # noqa: E731
    scalar, components = shape(), {"mean": shape(count, width), "variance": shape(count, width)}
    components |= {"log_weight": shape(count), "usage": shape(count)}
    shared = {"center": shape(width), "scale": scalar, "updates": scalar, "beta": scalar}
    state = {"components": components, "memory": {}, "shared": shared}
    mask = jax.ShapeDtypeStruct((rows,), bool)
    program = programs._block_statistics.lower(state, shape(rows, width), mask, plan).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * rows * count / 8


@pytest.mark.parametrize("given", [np.float32, np.float64, np.float16, np.int64])
def test_precision_is_that_of_the_rows(given):
    """float32 stays, float64 needs no flag, anything else becomes float64; JAX's own setting is left alone."""
    data = (10 * planted(8)[0]).astype(given)
    kept = np.float32 if given == np.float32 else np.float64
    model = OnlineGaussianMixture(3, random_state=0).fit(data)
    model.partial_fit(data[:50])
    readings = [model.means_, model.covariances_, model.weights_, model.score_samples(data), model.predict_proba(data)]
    assert {a.dtype for a in readings} == {np.dtype(kept)}
    assert model.predict(data).dtype == np.int64
    assert model.weights_.sum() == pytest.approx(1.0, abs=1e-6)
    assert not jax.config.jax_enable_x64


def test_pickling_in_mid_stream_changes_nothing():
    data, _ = planted(9)
    model = OnlineGaussianMixture(3, random_state=0).partial_fit(data[:100])
    copy = pickle.loads(pickle.dumps(model))
    for stream in (model, copy):
        stream.partial_fit(data[100:200])
    np.testing.assert_array_equal(copy.means_, model.means_)
    np.testing.assert_array_equal(copy.predict(data), model.predict(data))


def test_revival_brings_back_a_component_that_nothing_reaches():
    """A component that starts 1,000 away from all rows stays there without weight. With revival it comes to life and
    the likelihood rises, in each of 8 seeds, and in most it finds the cluster that had none (otherwise EM splits a wide
    cluster on whose outlier it was put, a local optimum)."""
    data, _ = planted(10)
    options = {**start(data), "means_init": np.stack([CENTRES[0], CENTRES[1], np.full(4, 1000.0)])}
    without = fitted(data, 15, **options)
    np.testing.assert_allclose(without.means_[2], 1000.0)
    assert without.weights_[2] == 0.0
    found = [fitted(data, 15, revival=1, random_state=seed, **options) for seed in range(8)]
    assert all(model.weights_[2] > 0.02 for model in found)
    assert all(model.lower_bound_ > without.lower_bound_ for model in found)
    assert sum(np.linalg.norm(model.means_[2] - CENTRES[2]) < 1.0 for model in found) >= 4


@pytest.mark.parametrize("covariance", ["diag", "spherical", "tied_diag"])
def test_samples_have_the_moments_of_the_mixture(covariance):
    data, _ = planted(11)
    model = OnlineGaussianMixture(3, covariance_type=covariance, random_state=0).fit(data)
    rows, which = model.sample(20_000)
    assert np.all(np.diff(which) >= 0)
    for k in range(3):
        mine = rows[which == k]
        full = np.broadcast_to(model.covariances_[k] if covariance != "tied_diag" else model.covariances_, (4,))
        assert len(mine) / len(rows) == pytest.approx(model.weights_[k], abs=5 * 0.5 / math.sqrt(len(rows)))
        # Five standard errors of a mean and of a variance.
        assert np.all(np.abs(mine.mean(0) - model.means_[k]) < 5 * np.sqrt(full / len(mine)))
        assert np.all(np.abs(mine.var(0) / full - 1) < 5 * math.sqrt(2 / len(mine)))


def test_one_component_is_the_moments_of_the_data():
    data = planted(12)[0]
    model = OnlineGaussianMixture().fit(data)
    np.testing.assert_allclose(model.means_[0], data.mean(0), rtol=1e-10)
    np.testing.assert_allclose(model.covariances_[0], data.var(0) + 1e-6, rtol=1e-10)
    np.testing.assert_array_equal(model.predict_proba(data), np.ones((300, 1)))
    assert model.n_features_in_ == 4


def test_far_logits_stay_finite():
    """Rows 1e4 standard deviations from every component: logits of -5e7, in float32."""
    data, _ = planted(13, dtype=np.float32)
    model = fitted(data, 3, **start(data))
    far = data[:5] + np.float32(1e4)
    assert np.all(np.isfinite(model.score_samples(far)))
    np.testing.assert_allclose(model.predict_proba(far).sum(1), 1.0, rtol=1e-6)


# --------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components: expected an integer of at least 1"),
        ({"n_components": 301}, "Expected n_samples >= n_components"),
        ({"covariance_type": "full"}, "covariance_type: expected one of"),
        ({"forgetting": "responsability"}, "forgetting: expected one of .*did you mean 'responsibility'"),
        ({"init_params": "kmeans++"}, r"init_params: expected one of .*did you mean 'k-means\+\+'"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1"),
        ({"batch_size": 50, "eta": 1.5}, r"eta: expected values in \(0, 1\]"),
        ({"annealing": 0.0}, r"annealing: expected values in \(0, 1\]"),
        ({"reg_covar": -1.0}, "reg_covar: expected a finite number of at least 0"),
        ({"max_iter": 0}, "max_iter: expected an integer of at least 1"),
        ({"means_init": np.zeros((2, 3))}, r"means_init: expected shape \(2, 4\), got \(2, 3\)"),
        ({"means_init": np.full((2, 4), np.nan)}, "means_init: expected finite values"),
        ({"weights_init": [0.5, 0.6]}, "weights_init: expected non-negative values that sum to 1"),
        ({"precisions_init": -np.ones((2, 4))}, "precisions_init: expected positive values"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_parameters_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OnlineGaussianMixture(**{"n_components": 2, **options}).fit(planted(14)[0])


def test_bad_rows_are_refused():
    data, _ = planted(15)
    model = OnlineGaussianMixture(3)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        model.predict(data)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            model.fit(np.where(np.arange(4) == 1, value, data))
    with pytest.raises(ValueError, match="Found array with 0 sample"):
        model.fit(data[:0])
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
        model.fit(data[0])
    with pytest.raises(ValueError, match=r"needs n_samples >= n_components.*means_init"):
        model.partial_fit(data[:2])
    with pytest.raises(TypeError, match="n_components: expected an integer, got float"):
        OnlineGaussianMixture(3.0).fit(data)
    with pytest.raises(TypeError, match="reg_covar: expected a number, got str"):
        OnlineGaussianMixture(reg_covar="small").fit(data)
    with pytest.raises(ValueError, match="leave the range of float32"):
        OnlineGaussianMixture(1).fit(np.float32(1e30) * data.astype(np.float32))
    model.partial_fit(data)
    for method in (model.predict, model.partial_fit):
        with pytest.raises(ValueError, match="expecting 4 features"):
            method(data[:, :3])
    with pytest.raises(ValueError, match="cannot continue from means of shape"):
        model.set_params(n_components=2).partial_fit(data)
    with pytest.raises(ValueError, match="n_samples: expected an integer of at least 1"):
        model.sample(0)


def test_an_end_before_convergence_is_a_warning():
    data, _ = planted(16)
    with pytest.warns(ConvergenceWarning, match="did not converge within 2 iterations"):
        OnlineGaussianMixture(3, max_iter=2, tol=0.0, random_state=0).fit(data)


@pytest.mark.slow
def test_sixty_five_thousand_components():
    """K = 65,536 in 16 dimensions: rows next to known means find them, and a stream moves the state, in blocks."""
    rng = np.random.default_rng(17)
    means = 3 * rng.normal(size=(65_536, 16)).astype(np.float32)
    chosen = rng.integers(65_536, size=100)
    rows = means[chosen] + 0.01 * rng.normal(size=(100, 16)).astype(np.float32)
    model = OnlineGaussianMixture(
        65_536, covariance_type="tied_diag", means_init=means, precisions_init=np.full(16, 1e2)
    )
    model.partial_fit(rows)
    np.testing.assert_array_equal(model.predict(rows), chosen)
    proba = model.predict_proba(rows[:5])
    np.testing.assert_array_equal(proba.argmax(1), chosen[:5])
    np.testing.assert_allclose(proba.sum(1), 1.0, rtol=1e-5)
