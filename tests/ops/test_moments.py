"""Sufficient statistics and Gaussian scores against their definitions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.ops import moments
from protojax.ops.gaussian import gaussian_scores
from protojax.ops.lse import lse
from protojax.ops.moments import accumulate, gaussian_moments
from tests.ops import twins
from tests.ops.cases import TILES, D, K, N, close, side, weights

pytestmark = pytest.mark.usefixtures("x64")


def mask_of(seed: int = 3):
    return jnp.asarray(np.random.default_rng(seed).random(N) < 0.7)


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("known_normaliser", [False, True], ids=["complete", "two_sweeps"])
def test_moments(peaked, known_normaliser):
    queries, prototypes, bias = side(0, peaked)
    features, mask = weights(2, N, D), mask_of()
    count, first, second = twins.moments(queries, prototypes, bias, features, mask.astype(jnp.float64))
    # Masked rows may hold anything.
    dirty = jnp.where(mask[:, None], features, jnp.nan), jnp.where(mask[:, None], queries, jnp.inf)
    normaliser = lse(dirty[1], prototypes, bias, **TILES) if known_normaliser else None
    for kind, expected in (
        ("diag", second),
        ("spherical", jnp.sum(second, axis=1)),
        ("tied", jnp.sum(second, axis=0)),
        ("none", None),
    ):
        found, rows = accumulate(
            dirty[1], prototypes, bias, dirty[0], mask, second=kind, log_normaliser=normaliser, **TILES
        )
        close(found.count, count)
        close(found.first, first)
        assert (found.second is None) == (expected is None)
        if expected is not None:
            close(found.second, expected)
        close(rows, jnp.where(mask, twins.lse(queries, prototypes, bias), 0.0))


def test_statistics_add_over_rows_and_masses_sum_to_rows():
    queries, prototypes, bias = side(0, False)
    features, mask = weights(2, N, D), mask_of()
    whole, _ = accumulate(queries, prototypes, bias, features, mask, **TILES)
    parts = [
        accumulate(queries[rows], prototypes, bias, features[rows], mask[rows], **TILES)[0]
        for rows in (slice(0, 11), slice(11, N))
    ]
    jax.tree.map(lambda a, b, c: close(a, b + c), whole, *parts)
    close(jnp.sum(whole.count), jnp.sum(mask.astype(jnp.float64)))
    close(jnp.sum(whole.first, axis=0), jnp.sum(jnp.where(mask[:, None], features, 0.0), axis=0))


def test_row_weights_scale_rows():
    queries, prototypes, bias = side(0, False)
    features = weights(2, N, D)
    weight = jnp.abs(weights(5, N))
    found, _ = accumulate(queries, prototypes, bias, features, weight, **TILES)
    close(found.first, twins.moments(queries, prototypes, bias, features, weight)[1])


def test_all_rows_masked_and_no_rows_give_zero():
    queries, prototypes, bias = side(0, True)
    features = jnp.full((N, D), jnp.nan)
    for rows in (N, 0):
        found, normaliser = accumulate(
            queries[:rows], prototypes, 1e4 * bias, features[:rows], jnp.zeros(rows, bool), second="diag", **TILES
        )
        assert all(bool(jnp.all(leaf == 0.0)) for leaf in (*found, normaliser))


def test_large_logits_stay_finite_in_float32():
    queries = jnp.asarray([[1e2], [-1e2], [1.0]], jnp.float32)
    prototypes = jnp.asarray([[1e2], [-1e2], [0.0]], jnp.float32)
    bias = jnp.asarray([0.0, 0.0, 1e4], jnp.float32)
    # A normaliser of 1e4 handed over in float32 is itself rounded by half a unit in its last place, 4.9e-4.
    for normaliser, tolerance in ((None, 1e-6), (lse(queries, prototypes, bias), 5e-4)):
        found, _ = accumulate(
            queries, prototypes, bias, queries, jnp.asarray([True, True, True]), log_normaliser=normaliser, tile=2
        )
        np.testing.assert_allclose(found.count, [0.5, 0.5, 2.0], rtol=tolerance)
        np.testing.assert_allclose(found.first[:, 0], [50.0, -50.0, 1.0], rtol=tolerance)


def test_bfloat16_products_keep_counts_in_float32():
    queries, prototypes, bias = (a.astype(jnp.float32) for a in side(0, False))
    features = weights(2, N, D).astype(jnp.float32)
    found, _ = accumulate(
        queries, prototypes, bias, features, jnp.ones(N, bool), second="none", matmul_dtype=jnp.bfloat16, **TILES
    )
    assert found.first.dtype == jnp.float32
    np.testing.assert_allclose(jnp.sum(found.count), N, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(found.first, axis=0), jnp.sum(features, axis=0), atol=N * 2.0**-8)


VARIANCES = {"diag": (K, D), "spherical": (K,), "tied": (D,)}


@pytest.mark.parametrize("covariance", list(VARIANCES))
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_gaussian_scores_are_log_densities(covariance, shift):
    """beta ln(pi_k N(h | mu_k, s2_k)); far from the origin expanded squares would lose 1e8 x 1e-16 without centring."""
    features, means = weights(0, N, D) + shift, weights(1, K, D) + shift
    variances = jnp.abs(weights(2, *VARIANCES[covariance])) + 0.3
    log_weights, beta = weights(3, K), 0.7
    wide = {"diag": variances, "spherical": variances.reshape(-1, 1), "tied": variances.reshape(1, -1)}[covariance]
    gap = features[:, None, :] - means[None, :, :]
    density = -0.5 * jnp.sum(gap**2 / wide[None] + jnp.log(2 * math.pi * wide)[None], axis=-1)
    scores = jax.jit(
        lambda beta: gaussian_scores(features, means, variances, log_weights, covariance=covariance, beta=beta)
    )(beta)
    found = twins.logits(*scores[:3]) + scores.row_offset[:, None]
    close(found, beta * (log_weights[None, :] + density), 1e-12 if shift == 0.0 else 1e-10)


@pytest.mark.parametrize("covariance", list(VARIANCES))
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "two_sweeps"])
def test_gaussian_moments_are_an_e_step(monkeypatch, covariance, chunked):
    """Statistics and log-likelihoods by definition; masked rows may hold anything; peaked components (s2 = 1e-3)."""
    if not chunked:
        monkeypatch.setattr(moments, "completes_rows", lambda options: False)
    features, means, log_weights = weights(0, N, D) + 5.0, weights(1, K, D) + 5.0, jax.nn.log_softmax(weights(3, K))
    mask = mask_of()
    for scale in (1.0, 1e-3):
        variances = scale * (jnp.abs(weights(2, *VARIANCES[covariance])) + 0.3)
        wide = {"diag": variances, "spherical": variances.reshape(-1, 1), "tied": variances.reshape(1, -1)}[covariance]
        gap = features[:, None, :] - means[None, :, :]
        table = -0.5 * jnp.sum(gap**2 / wide[None] + jnp.log(2 * math.pi * wide)[None], axis=-1) + log_weights[None, :]
        share = jax.nn.softmax(table, axis=1) * mask[:, None].astype(jnp.float64)
        dirty = jnp.where(mask[:, None], features, jnp.nan)
        found, likelihood = gaussian_moments(
            dirty, means, variances, log_weights, mask, covariance=covariance, second="diag", **TILES
        )
        close(found.count, jnp.sum(share, axis=0), 1e-9)
        close(found.first, share.T @ features, 1e-9)
        close(found.second, share.T @ features**2, 1e-9)
        close(likelihood, jnp.where(mask, jax.nn.logsumexp(table, axis=1), 0.0), 1e-9)


def test_shift_by_bound_or_by_maximum_gives_the_same():
    """Small logits skip the search for their maximum; at any size the responsibilities are the same."""
    queries, prototypes, bias = side(0, False)
    features, every = weights(2, N, D), jnp.ones(N, bool)
    for scale in (0.1, 1.0, 3.0, 30.0):
        found, rows = accumulate(scale * queries, prototypes, bias, features, every, row_tile=8)
        close(found.first, twins.moments(scale * queries, prototypes, bias, features, jnp.ones(N))[1])
        close(rows, twins.lse(scale * queries, prototypes, bias))


def test_rows_a_chunk_are_those_asked_for_and_whole_registers_otherwise():
    """The block of logits [K, rows]: a caller's `row_tile` as it is; our own choice a multiple of 16."""

    def blocks(rows, count, **options):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, D), (count, D), (count,), (rows, D))]
        run = lambda q, m, c, h: accumulate(q, m, c, h, jnp.ones(rows, bool), second="none", **options)  # noqa: E731
        return str(jax.make_jaxpr(run)(*shapes))

    assert f"f32[{K},8]" in blocks(N, K, row_tile=8)
    assert f"f32[{K},{N}]" in blocks(N, K)
    assert "f32[16384,208]" in blocks(1024, 16_384)


def test_shift_by_bound_keeps_float32_precision_at_its_edge():
    """Logits within 59 of one another, K large: sums neither overflow nor lose the small rows."""
    rows = jnp.asarray([[59.0], [-59.0], [0.0]], jnp.float32)
    prototypes = jnp.concatenate([jnp.ones((2000, 1), jnp.float32), jnp.full((1, 1), 0.5, jnp.float32)])
    bias = jnp.zeros(2001, jnp.float32)
    found, normaliser = accumulate(rows, prototypes, bias, rows, jnp.ones(3, bool), second="none")
    wide = [a.astype(jnp.float64) for a in (rows, prototypes, bias)]
    np.testing.assert_allclose(normaliser, twins.lse(*wide), rtol=1e-6)
    np.testing.assert_allclose(found.count, twins.moments(*wide, wide[0], jnp.ones(3))[0], rtol=1e-5)


def test_excluded_component_has_no_responsibility():
    log_weights = jnp.zeros(K).at[7].set(-jnp.inf)
    features = weights(0, N, D)
    scores = gaussian_scores(features, weights(1, K, D), jnp.ones((K, D)), log_weights)
    found, _ = accumulate(*scores[:3], features, jnp.ones(N, bool), **TILES)
    assert found.count[7] == 0.0
    close(jnp.sum(found.count), jnp.asarray(float(N)))
