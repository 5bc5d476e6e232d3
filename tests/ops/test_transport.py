"""Sinkhorn through the streamed log-sum-exp: the plan's marginals and the dense iterations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.ops.transport import balanced_potentials
from protojax.ops.unit import unit
from tests.ops.cases import TILES, close, weights

pytestmark = pytest.mark.usefixtures("x64")
M, COUNT, WIDTH, TEMPERATURE = 37, 9, 5, 0.2


def case():
    prior = jax.nn.softmax(weights(2, COUNT))
    return unit(weights(0, M, WIDTH)), unit(weights(1, COUNT, WIDTH)), jnp.log(prior)


def potentials(features, prototypes, log_prior, start=None, *, iterations, mask=None, **options):
    start = jnp.zeros(prototypes.shape[0]) if start is None else start
    options = {"temperature": TEMPERATURE} | TILES | options
    return balanced_potentials(features, prototypes, log_prior, start, iterations=iterations, mask=mask, **options)


def test_iterations_equal_dense_sinkhorn():
    features, prototypes, log_prior = case()
    kernel = np.exp(np.asarray(features @ prototypes.T) / TEMPERATURE)
    column = np.ones(COUNT)
    for _ in range(3):
        row = (1.0 / M) / (kernel @ column)
        column = np.exp(np.asarray(log_prior)) / (kernel.T @ row)
    found = potentials(features, prototypes, log_prior, iterations=3)
    close(found, jnp.asarray(np.log(column)))


def test_converged_plan_has_both_marginals_and_is_a_fixed_point():
    features, prototypes, log_prior = case()
    mask = jnp.arange(M) % 4 != 0
    found = potentials(features, prototypes, log_prior, iterations=500, mask=mask)
    share = jax.nn.softmax(features @ prototypes.T / TEMPERATURE + found[None, :], axis=1)
    close(jnp.mean(share[mask], axis=0), jnp.exp(log_prior), 1e-9)
    again = potentials(features, prototypes, log_prior, found, iterations=1, mask=mask)
    close(again - again[0], found - found[0], 1e-9)
    dirty = jnp.where(mask[:, None], features, jnp.nan)
    close(potentials(dirty, prototypes, log_prior, iterations=500, mask=mask), found)


def test_nothing_to_do_returns_the_start():
    features, prototypes, log_prior = case()
    start = weights(3, COUNT)
    close(potentials(features, prototypes, log_prior, start, iterations=0), start)
    close(potentials(features, prototypes, log_prior, start, iterations=2, mask=jnp.zeros(M, bool)), start)
    close(potentials(features[:0], prototypes, log_prior, start, iterations=2), start)


def test_sharp_temperature_stays_finite_in_float32_and_carries_no_gradient():
    features, prototypes, log_prior = (a.astype(jnp.float32) for a in case())
    start = jnp.zeros(COUNT, jnp.float32)

    def total(features):
        return jnp.sum(potentials(features, prototypes, log_prior, start, iterations=5, temperature=1e-4))

    value, gradient = jax.value_and_grad(total)(features)
    assert bool(jnp.isfinite(value))
    assert not jnp.any(gradient)
