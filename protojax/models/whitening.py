"""Whitening as a layer: the last norm of a projection head whose features must not contract to a few directions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array
from protojax.models.layers import full_dtype
from protojax.ops.inverse_root import inverse_root


class Whitening(nnx.Module):
    """y = (x - m) W, W = C^(-1/2) of the batch's covariance, without learnable parameters.

    Batch norm equalises the variances of the coordinates and leaves them free to be copies of one another; whitening
    equalises those of all directions (decorrelated batch norm, Huang et al. 2018; for self-supervision W-MSE, Ermolov
    et al. 2021). Gradients flow through m and C. Few `iterations` whiten the strong directions alone: see
    `ops.inverse_root`.

    train: moments over the rows of the global batch (mask [N]: those rows alone); otherwise the running ones, which
    move as `layers.BatchNorm`'s do: r <- (1 - a) r + a moment, a = max(1 - momentum, 1 / (updates + 1)). x [N,D];
    float32 (float64 under dtype float64).
    """

    def __init__(
        self,
        features: int,
        *,
        iterations: int = 5,
        shrink: float = 1e-3,
        momentum: float = 0.9,
        dtype: DTypeLike = jnp.float32,
    ):
        full = full_dtype(dtype)
        self.mean = nnx.BatchStat(jnp.zeros((features,), full))
        self.covariance = nnx.BatchStat(jnp.eye(features, dtype=full))
        self.updates = nnx.BatchStat(jnp.zeros((), full))
        self.iterations, self.shrink, self.momentum = iterations, shrink, momentum

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        values = x.astype(self.mean.get_value().dtype)
        if train:
            mean, covariance = self._moments(values, mask)
        else:
            mean, covariance = self.mean.get_value(), self.covariance.get_value()
        root = inverse_root(covariance, iterations=self.iterations, shrink=self.shrink)
        return jnp.matmul(values - mean[None, :], root, precision=jax.lax.Precision.HIGHEST)

    def _moments(self, values: Array, mask: Array | None) -> tuple[Array, Array]:
        weight = jnp.ones(values.shape[:1], values.dtype) if mask is None else mask.astype(values.dtype)
        count = jnp.maximum(weight.sum(), 1.0)
        mean = (values * weight[:, None]).sum(0) / count
        centred = (values - mean[None, :]) * weight[:, None]
        covariance = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST) / count
        updates = self.updates.get_value()
        rate = jnp.maximum(1.0 / (updates + 1.0), 1.0 - self.momentum)
        self.updates.set_value(updates + 1.0)
        for running, moment in ((self.mean, mean), (self.covariance, covariance)):
            running.set_value((1.0 - rate) * running.get_value() + rate * jax.lax.stop_gradient(moment))
        return mean, covariance
