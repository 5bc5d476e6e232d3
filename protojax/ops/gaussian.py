"""Gaussian log-densities as logits q . m + c, so that a mixture's E-step is the streamed log-sum-exp."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from protojax.ops.checks import accumulation_dtype, floating

Array = jax.Array
Covariance = Literal["diag", "spherical", "tied"]


class Scores(NamedTuple):
    """queries [N,P], prototypes [K,P], bias [K], row_offset [N]: logit_nk = q_n . m_k + c_k + row_offset_n."""

    queries: Array
    prototypes: Array
    bias: Array
    row_offset: Array


class Expansion(NamedTuple):
    """How a feature becomes a query: see `expand`."""

    covariance: str
    origin: Array
    inverse: Array | None
    constant: Array
    scale: Array


def gaussian_scores(
    features: Array,
    means: Array,
    variances: Array,
    log_weights: Array,
    *,
    covariance: Covariance = "diag",
    beta: float | Array = 1.0,
) -> Scores:
    """beta * ln(pi_k N(h_n | mu_k, s2_k)) written as q_n . m_k + c_k + row_offset_n.

    Args:
      features: [N,D]. means: [K,D]. log_weights: [K], ln pi_k (-inf excludes a component).
      variances: [K,D] for 'diag', [K] for 'spherical', [D] for 'tied' (one diagonal for all); positive.
      beta: inverse temperature of deterministic annealing (Ueda & Nakano 1998), a scalar, possibly traced.

    'tied' whitens once, so P = D and row_offset holds -beta/2 |(h_n - a) / s|^2; 'diag' has P = 2D with queries
    [h - a, (h - a)^2], 'spherical' P = D + 1 with [h - a, |h - a|^2]. The origin a is the average of the means: the
    density does not depend on it, the rounding error of expanded squares does. All results float32 at least.

    Raises ValueError for shapes that disagree with `covariance`, TypeError for integer or float16 arrays."""
    prototypes, bias, how = gaussian_keys(features, means, variances, log_weights, covariance=covariance, beta=beta)
    return Scores(expand(features, how), prototypes, bias, row_offset(features, how))


def gaussian_keys(
    features: Array,
    means: Array,
    variances: Array,
    log_weights: Array,
    *,
    covariance: Covariance = "diag",
    beta: float | Array = 1.0,
) -> tuple[Array, Array, Expansion]:
    """(prototypes [K,P], bias [K], how to expand features): the components' half of `gaussian_scores`, same arguments.

    The features are looked at for their shape and dtype only."""
    features, means = floating("features", features, 2), floating("means", means, 2)
    log_weights = floating("log_weights", log_weights, 1)
    count, width = means.shape
    shapes = {"diag": (count, width), "spherical": (count,), "tied": (width,)}
    if covariance not in shapes:
        raise ValueError(f"covariance must be 'diag', 'spherical' or 'tied', got {covariance!r}")
    if count == 0:
        raise ValueError(f"means must hold at least one row, got shape {means.shape} (K = 0)")
    if features.shape[1] != width:
        raise ValueError(f"features and means must have the same width, got {features.shape} and {means.shape}")
    variances = floating("variances", variances, len(shapes[covariance]))
    if variances.shape != shapes[covariance] or log_weights.shape != (count,):
        raise ValueError(
            f"covariance={covariance!r} with means {means.shape} needs variances of shape {shapes[covariance]} and "
            f"log_weights of shape {(count,)}, got {variances.shape} and {log_weights.shape}"
        )
    total = accumulation_dtype(features, means, variances, log_weights)
    means, variances, log_weights = (array.astype(total) for array in (means, variances, log_weights))
    # Expanded squares cancel catastrophically far from the origin: move it among the means.
    origin = jnp.mean(means, axis=0)
    means = means - origin[None, :]
    scale = jnp.asarray(beta, total)
    constant = jnp.asarray(0.5 * width * math.log(2.0 * math.pi), total)
    inverse = jax.lax.rsqrt(variances) if covariance == "tied" else None
    if inverse is not None:
        prototypes = means * inverse[None, :]
        normaliser = 0.5 * jnp.sum(prototypes * prototypes, axis=1)
        constant = constant + 0.5 * jnp.sum(jnp.log(variances))
    elif covariance == "diag":
        precision = 1.0 / variances
        prototypes = jnp.concatenate([means * precision, -0.5 * precision], axis=1)
        normaliser = 0.5 * jnp.sum(means * means * precision + jnp.log(variances), axis=1)
    else:
        precision = 1.0 / variances
        prototypes = jnp.concatenate([means * precision[:, None], -0.5 * precision[:, None]], axis=1)
        normaliser = 0.5 * (precision * jnp.sum(means * means, axis=1) + width * jnp.log(variances))
    expansion = Expansion(covariance, origin, inverse, -scale * constant, scale)
    return scale * prototypes, scale * (log_weights - normaliser), expansion


def expand(features: Array, how: Expansion) -> Array:
    """Queries [N,P] of features [N,D], h from the origin: [h, h^2] (diag), [h, |h|^2] (spherical), h / s (tied)."""
    centred = features.astype(how.origin.dtype) - how.origin[None, :]
    if how.inverse is not None:
        return centred * how.inverse[None, :]
    square = centred * centred
    if how.covariance == "spherical":
        square = jnp.sum(square, axis=1)[:, None]
    return jnp.concatenate([centred, square], axis=1)


def row_offset(features: Array, how: Expansion) -> Array:
    """What the logits of a row lack [N], equal for all prototypes."""
    offset = jnp.broadcast_to(how.constant, features.shape[:1])
    if how.inverse is None:
        return offset
    return offset - how.scale * (0.5 * jnp.sum(expand(features, how) ** 2, axis=1))
