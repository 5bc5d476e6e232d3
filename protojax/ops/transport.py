"""Entropic optimal transport between rows and prototypes, through the streamed log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from protojax.ops.checks import accumulation_dtype, floating, logit_arguments
from protojax.ops.kernels import plan, replicated, row_sweep

Array = jax.Array


def balanced_potentials(
    features: Array,
    prototypes: Array,
    log_prior: Array,
    potentials: Array,
    *,
    temperature: float | Array,
    iterations: int,
    mask: Array | None = None,
    tile: int = 2048,
    row_tile: int | None = None,
    matmul_dtype: DTypeLike | None = None,
) -> Array:
    """Column potentials f [K] after Sinkhorn iterations for the plan with row mass 1/M and column mass exp(log_prior).

    One iteration (Cuturi 2013, in logarithms), with s_nk = h_n . m_k / temperature:
        u_n = LSE_k(s_nk + f_k);   f_k = log_prior_k + ln M - LSE_n(s_nk - u_n).
    Afterwards responsibilities are softmax_k(h_n . m_k / temperature + f_k): rows sum to one exactly, column means
    approach exp(log_prior_k) as iterations grow. The column sweep is `lse` with rows and prototypes exchanged.

    Args:
      features: [M,D] rows (a memory, say). prototypes: [K,D]. log_prior: [K], normalised.
      potentials: [K], where to start: zeros, or the last step's (a warm start makes a few iterations enough).
      temperature: positive; iterations: how many, static, 0 returns `potentials`.
      mask: [M] bool; False rows are ignored. With no row left the potentials are returned unchanged.

    No gradient passes. Raises as `lse` does; ValueError for a negative number of iterations."""
    features, prototypes, potentials = logit_arguments(features, prototypes, potentials)
    log_prior = floating("log_prior", log_prior, 1)
    if log_prior.shape != potentials.shape:
        raise ValueError(f"log_prior must have the shape of potentials {potentials.shape}, got {log_prior.shape}")
    if iterations < 0:
        raise ValueError(f"iterations must be 0 or more, got {iterations}")
    if mask is not None and mask.shape != features.shape[:1]:
        raise ValueError(f"mask must have one value a row ({features.shape[0]}), got shape {mask.shape}")
    total = accumulation_dtype(features, prototypes, log_prior, potentials)
    kept = jnp.ones(features.shape[:1], bool) if mask is None else mask.astype(bool)
    rows = jnp.where(kept[:, None], features, jnp.zeros((), features.dtype)).astype(total)
    rows, prototypes, log_prior, start = (
        lax.stop_gradient(array) for array in (rows, prototypes.astype(total), log_prior, potentials)
    )
    # One division, of the smaller side of both sweeps: the rows enter once as queries and once as keys.
    rows = rows / jnp.asarray(temperature, total)
    log_prior, start = log_prior.astype(total), start.astype(total)
    number = jnp.sum(kept.astype(total))
    log_number = jnp.log(jnp.maximum(number, jnp.ones((), total)))
    # Split over devices, the rows stay where they are and the column sweep adds partial sums: K numbers, never rows.
    options = plan(rows, prototypes, start, tile, row_tile, matmul_dtype)
    by_column = options._replace(keys_split=True)
    prototypes = replicated(prototypes)

    def iteration(_, current):
        excess = row_sweep(rows, prototypes, current, None, None, options)[0]
        bias = jnp.where(kept, -excess, jnp.full((), -jnp.inf, total))
        return log_prior + log_number - row_sweep(prototypes, rows, bias, None, None, by_column)[0]

    if features.shape[0] == 0:
        return start
    result = lax.fori_loop(0, iterations, iteration, start)
    return jnp.where(number > 0.0, result, start)
