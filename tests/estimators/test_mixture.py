"""Theorems of the online mixture: equality with the textbook, monotone likelihood, what forgetting keeps and loses."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from protojax.api import EstimatorSpec
from protojax.estimators import mixture

PLAIN = {"eta": 1.0, "beta": 1.0, "center": False, "weight_floor": 0.0, "variance_floor": 0.0, "start": "random"}
STEPS = 100


def rows_of(features, mask=None):
    features = jnp.asarray(features)
    return {"features": features, "mask": jnp.ones(len(features), bool) if mask is None else jnp.asarray(mask)}


def state(estimator, means, variance=None, weights=None):
    """An initial state with given means and, if given, variances and weights."""
    dim = means.shape[1]
    S = estimator.init(jax.random.key(0), EstimatorSpec(dim, 1, STEPS))
    dtype = S["components"]["mean"].dtype
    S["components"]["mean"] = jnp.asarray(means, dtype)
    if weights is not None:
        S["components"]["log_weight"] = jnp.log(jnp.asarray(weights, dtype))
    if variance is not None:
        S["components" if "variance" in S["components"] else "shared"]["variance"] = jnp.asarray(variance, dtype)
    return S


def variance_of(S):
    return S["components" if "variance" in S["components"] else "shared"]["variance"]


def one_step(estimator):
    return jax.jit(
        lambda S, rows, step=0, key=None: estimator.update(
            S, estimator.statistics(S, rows), rows, step, jax.random.key(0) if key is None else key
        )
    )


def clusters(rng, count=200, dim=4, number=3, spread=0.7):
    centers = rng.normal(size=(number, dim)) * 2
    scale = spread * rng.uniform(0.5, 1.5, size=(number, dim))
    which = rng.integers(number, size=count)
    return centers[which] + scale[which] * rng.normal(size=(count, dim)), centers


# ------------------------------------------------------------------------------------------------- textbook EM
@pytest.mark.parametrize("covariance", ["diag", "spherical"])
def test_plain_em_equals_scikit_learn_iteration_by_iteration(x64, covariance):
    """Full batch, eta = 1, beta = 1: means, covariances and weights agree to float64 rounding after every iteration."""
    from sklearn.mixture import GaussianMixture

    data, _ = clusters(np.random.default_rng(0))
    means, precision = data[:3], np.ones((3, 4)) if covariance == "diag" else np.ones(3)
    reference = GaussianMixture(
        3, covariance_type=covariance, reg_covar=0.0, tol=0.0, max_iter=1, warm_start=True,
        means_init=means, precisions_init=precision, weights_init=np.full(3, 1 / 3),
    )  # fmt: skip
    estimator = mixture(3, covariance=covariance, **PLAIN)
    S, step = state(estimator, means, 1.0 / precision), one_step(estimator)
    for _ in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one iteration has not converged, as intended
            reference.fit(data)
        S, _ = step(S, rows_of(data))
        np.testing.assert_allclose(S["components"]["mean"], reference.means_, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(variance_of(S), reference.covariances_, rtol=1e-9)
        np.testing.assert_allclose(np.exp(S["components"]["log_weight"]), reference.weights_, rtol=1e-10)


@pytest.mark.parametrize("covariance", ["tied", "spherical", "diag"])
def test_likelihood_never_falls_under_full_batch_em(x64, covariance):
    data, _ = clusters(np.random.default_rng(1), count=150)
    estimator = mixture(6, covariance=covariance, **PLAIN)
    S, step = state(estimator, data[:6]), one_step(estimator)
    history = []
    for _ in range(40):
        S, info = step(S, rows_of(data))
        total, count = info["estimator/log_likelihood"]
        history.append(float(total) / float(count))
    assert np.all(np.diff(history) > -1e-12)
    assert history[-1] > history[0] + 0.5  # it rises, and by far more than rounding


# --------------------------------------------------------------------- one step, written out with N x K arrays
def twin(data, mask, means, variances, log_mass, eta, beta, covariance, uniform):
    """One online step from explicit responsibilities: (means, variances, log-mass), and what is reported."""
    data, rows = data[mask], mask.sum()
    count, dim = means.shape
    full = np.broadcast_to(variances[:, None] if covariance == "spherical" else variances, (count, dim))
    squares = (data[:, None] - means[None]) ** 2
    joint = log_mass - logsumexp(log_mass) - 0.5 * np.sum(squares / full + np.log(2 * np.pi * full), axis=2)
    gamma = np.exp(beta * joint - logsumexp(beta * joint, axis=1, keepdims=True))
    n = gamma.sum(0)
    report = {
        "conditional_entropy": np.mean(-np.sum(gamma * np.log(np.maximum(gamma, 1e-300)), axis=1)),
        "log_likelihood": np.mean(logsumexp(beta * joint, axis=1)) / beta,
        "max_responsibility": np.mean(gamma.max(1)),
        "batch_perplexity": np.exp(-np.sum(n / rows * np.log(n / rows))),
    }
    mass = (1 - eta) * np.exp(log_mass) + eta * n / rows
    a = eta * n / rows / mass if uniform else 1 - (1 - eta) ** (n * count / rows)
    first, second = gamma.T @ data / n[:, None], gamma.T @ data**2 / n[:, None]
    new = (1 - a)[:, None] * means + a[:, None] * first
    if covariance == "tied":
        product = (data[:, None] - means[None]) * (data[:, None] - new[None])
        variance = (1 - eta) * variances + eta * np.einsum("nk,nkd->d", gamma, product) / rows
    else:  # running second moments, as raw sums divided
        moment = (1 - a)[:, None] * (full + means**2) + a[:, None] * second
        variance = moment - new**2
        variance = variance.mean(1) if covariance == "spherical" else variance
    return new, variance, np.log(mass), report


@pytest.mark.parametrize("covariance", ["tied", "spherical", "diag"])
@pytest.mark.parametrize("forgetting", ["responsibility", "uniform"])
def test_online_step_equals_explicit_enumeration(x64, covariance, forgetting):
    """Three masked, annealed mini-batches: running means equal the raw sums of the source formulas, and what is
    reported without N x K arrays equals the explicit numbers."""
    rng = np.random.default_rng(2)
    data, _ = clusters(rng, count=60)
    options = {**PLAIN, "eta": 0.3, "beta": 0.6, "covariance": covariance, "forgetting": forgetting}
    estimator = mixture(5, **options)
    means = rng.normal(size=(5, 4))
    S, step = state(estimator, means), one_step(estimator)
    variances, log_mass = np.asarray(variance_of(S)), np.log(np.full(5, 0.2))
    for i in range(3):
        batch, mask = data[20 * i : 20 * (i + 1)], np.arange(20) != 7
        means, variances, log_mass, report = twin(
            batch, mask, means, variances, log_mass, 0.3, 0.6, covariance, forgetting == "uniform"
        )
        S, info = step(S, rows_of(batch, mask))
        np.testing.assert_allclose(S["components"]["mean"], means, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(variance_of(S), variances, rtol=1e-9)
        np.testing.assert_allclose(S["components"]["log_weight"], log_mass, rtol=1e-10)
        for name, expected in report.items():
            total, count = info[f"estimator/{name}"]
            # The largest responsibility is read off a sharpened log-sum-exp: ln(K) / 1000 above at most.
            tolerance = 2e-3 if name == "max_responsibility" else 1e-9
            np.testing.assert_allclose(float(total) / float(count), expected, rtol=tolerance, err_msg=name)


# ------------------------------------------------------------------------------------------------- forgetting
def far_away(forgetting, steps, **options):
    """Two components, of which the second is too far from all rows to get any responsibility in float32."""
    settings = {**PLAIN, "eta": 0.1, "forgetting": forgetting, "covariance": "diag", **options}
    estimator = mixture(2, **settings)
    S = state(estimator, np.array([[0.0, 0.0], [100.0, 0.0]]), np.ones((2, 2)))
    step = one_step(estimator)

    def body(i, S):
        rows = rows_of(jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (16, 2)))
        return step(S, rows, i)[0]

    new = jax.lax.fori_loop(0, steps, body, S)
    _, info = step(new, rows_of(jnp.ones((16, 2))), steps)
    return S, new, info


def far_away_likelihood(S, row):
    """Log-likelihood of one row under the state of `far_away`, and its posterior on the far component."""
    estimator = mixture(2, **{**PLAIN, "covariance": "diag", "weight_floor": 0.01})
    stats = estimator.statistics(S, rows_of([row]))
    return float(stats["log_evidence"]), float(stats["count"][1])


def test_a_component_without_data_is_untouched():
    """n_k = 0: mean and variance keep every bit; pi falls, but never below its floor in the E-step."""
    S, new, info = far_away("responsibility", 2000, weight_floor=0.01)
    for name in ("mean", "variance"):
        np.testing.assert_array_equal(new["components"][name][1], S["components"][name][1])
        assert np.any(new["components"][name][0] != S["components"][name][0])
    # A row at the component still finds it: its prior is the floor, 0.01 / K, not 0.9^2000.
    total, posterior = far_away_likelihood(new, [100.0, 0.0])
    assert posterior == 1.0
    expected = np.log(0.01 / 2 / 1.005) - np.log(2 * np.pi)
    np.testing.assert_allclose(total, expected, atol=1e-3)
    assert float(info["estimator/dead_share"][0]) == 0.5


def test_uniform_forgetting_loses_mass_geometrically():
    """The mass of a component without data is (1 - eta)^t of what it was: e^-211 after 2,000 steps at eta = 0.1, below
    anything that float32 sums could hold, and the report says so."""
    S, new, info = far_away("uniform", 2000)
    fallen = new["components"]["log_weight"][1] - S["components"]["log_weight"][1]
    np.testing.assert_allclose(fallen, 2000 * np.log1p(-0.1), rtol=1e-4)
    assert float(info["estimator/underflow_share"][0]) == 0.5


def test_rare_component_survives_absence_under_drift_only_with_responsibility_forgetting():
    """Four clusters drift together; the rarest stays away for 2,000 steps and comes back. Forgetting by own evidence
    still has a component for it; forgetting by time has let its mass underflow and never serves it again."""
    corners = jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
    away, back = 2000, 100
    drift = jnp.array([0.6, 0.3])

    def batch(i):
        key_which, key_noise = jax.random.split(jax.random.fold_in(jax.random.key(3), i))
        common = jax.random.randint(key_which, (32,), 0, 3)
        which = jnp.where((i >= away) & (jnp.arange(32) < 2), 3, common)
        shift = jnp.minimum(i.astype(jnp.float32) / away, 1.0) * drift
        return rows_of(corners[which] + shift[None, :] + 0.5 * jax.random.normal(key_noise, (32, 2)))

    distance, usage = {}, {}
    for forgetting in ("responsibility", "uniform"):
        estimator = mixture(
            4, eta=0.1, forgetting=forgetting, center=False, start="random", usage_rate=0.1, variance_floor=1e-3
        )
        S, step = state(estimator, corners, np.full(2, 0.25)), one_step(estimator)
        S = jax.lax.fori_loop(0, away + back, lambda i, S, step=step: step(S, batch(i), i)[0], S)
        means = np.asarray(S["components"]["mean"])
        distance[forgetting] = np.min(np.linalg.norm(means - (corners[3] + drift)[None], axis=1))
        usage[forgetting] = float(S["components"]["usage"][3])
    assert distance["responsibility"] < 0.4
    assert distance["uniform"] > 0.6
    assert usage["responsibility"] > 0.03
    # 0, or where a running mean of rate 0.1 stops falling: a tenth of it is below float32's least normal number.
    assert usage["uniform"] < np.finfo(np.float32).tiny / 0.1


# ---------------------------------------------------------------------------------------------------- switches
def test_planted_mixture_is_recovered_from_a_data_start(key):
    """Small batches, features far from the origin: every planted mean is found."""
    rng = np.random.default_rng(5)
    planted = rng.normal(size=(8, 6)) * 3 + 20
    shares = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])

    def sample(seed, count):
        rng = np.random.default_rng(seed)
        return (planted[rng.choice(8, size=count, p=shares)] + 0.3 * rng.normal(size=(count, 6))).astype(np.float32)

    estimator = mixture(8, eta=0.05, start_rows=256)
    S = estimator.init(key, EstimatorSpec(6, 12, STEPS))
    S, step = jax.jit(estimator.start)(S, rows_of(sample(0, 256)), key), one_step(estimator)
    for i in range(STEPS):
        S, info = step(S, rows_of(sample(i + 1, 12)), i)
    means = np.asarray(S["components"]["mean"] + S["shared"]["center"][None, :])
    distances = np.linalg.norm(means[:, None] - planted[None], axis=2)
    assert len(set(distances.argmin(0))) == 8
    # Means of about 1 / (eta / 2) effective updates of rows with deviation 0.3 in 6 dimensions, plus the centre's lag.
    assert distances.min(0).max() < 0.5
    assert float(info["estimator/common_direction"][0]) > 0.9


def test_codebook_centres_and_posterior_equals_responsibilities(key):
    """cosine: h . w + b = (h - c) . w. posterior: softmax of codebook logits = the E-step's responsibilities."""
    data = jax.random.normal(key, (64, 5)) + 3.0
    books = {}
    for assignment in ("cosine", "posterior"):
        estimator = mixture(6, assignment=assignment, start_rows=64)
        S = estimator.start(estimator.init(key, EstimatorSpec(5, 64, STEPS)), rows_of(data), key)
        S, _ = one_step(estimator)(S, rows_of(data))
        books[assignment] = estimator.codebooks(S, {})[0]
    center, means = S["shared"]["center"], S["components"]["mean"]
    unit_means = means / jnp.linalg.norm(means, axis=1, keepdims=True)
    logits = data @ books["cosine"].prototypes.T + books["cosine"].bias[None]
    np.testing.assert_allclose(logits, (data - center[None]) @ unit_means.T, atol=1e-4)
    explicit = -0.5 * jnp.sum(
        (data[:, None] - center[None, None] - means[None]) ** 2 / S["shared"]["variance"][None, None], axis=2
    )
    explicit = jax.nn.softmax(explicit + S["components"]["log_weight"][None], axis=1)
    posterior = jax.nn.softmax(data @ books["posterior"].prototypes.T + books["posterior"].bias[None], axis=1)
    np.testing.assert_allclose(posterior, explicit, atol=2e-4)


def test_price_spreads_usage_and_revival_revives(key):
    """A cone of features, one broad component and seven far away: the price lowers the favourite's share; revival moves
    dead components onto rows."""
    data = jax.random.normal(key, (64, 4)) * 0.3 + 1.0
    means = jnp.concatenate([jnp.ones((1, 4)), 1.5 + jnp.arange(7, dtype=jnp.float32)[:, None] * jnp.ones((1, 4))])
    share, dead = {}, {}
    for name, options in {"none": {}, "price": {"price": 2.0}, "revive": {"revive": 2, "revive_below": 0.5}}.items():
        estimator = mixture(8, eta=0.05, center=False, start="random", usage_rate=0.1, **options)
        S, step = state(estimator, means, np.full(4, 0.09)), one_step(estimator)
        for i in range(60):
            S, info = step(S, rows_of(data), i, jax.random.fold_in(key, i))
        share[name] = float(jnp.max(S["components"]["usage"]))
        dead[name] = float(info["estimator/dead_share"][0])
    assert share["price"] < 0.8 * share["none"]
    assert dead["none"] >= 0.25
    assert dead["revive"] == 0.0


@pytest.mark.parametrize("start", ["kmeans++", "sample"])
def test_data_start_gives_distinct_components(key, start):
    """Fewer distinct rows than components, and duplicates among them: no two components start equal (they could never
    part), masked rows are not chosen, and the variance is that within, not between, clusters."""
    centers = jnp.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    data = jnp.concatenate([jnp.repeat(centers, 4, axis=0), jnp.full((4, 2), 1e6)])
    mask = jnp.arange(16) < 12
    estimator = mixture(14, start=start, center=False)
    S = jax.jit(estimator.start)(estimator.init(key, EstimatorSpec(2, 16, STEPS)), rows_of(data, mask), key)
    means = np.asarray(S["components"]["mean"])
    assert len(np.unique(means, axis=0)) == 14
    assert np.abs(means).max() < 60
    few = mixture(3, start="kmeans++", center=False)
    S = jax.jit(few.start)(few.init(key, EstimatorSpec(2, 16, STEPS)), rows_of(data, mask), key)
    nearest = np.linalg.norm(np.asarray(S["components"]["mean"])[:, None] - np.asarray(centers)[None], axis=2)
    assert sorted(nearest.argmin(1)) == [0, 1, 2]
    np.testing.assert_allclose(S["shared"]["variance"], 0.0, atol=1e-6)
