"""Many vectors to one: masked mean, one learned score a token, or a learned query with several heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array, Key
from protojax.models.layers import LayerNorm, compute_dtype, full_dtype, transformer_init

POOLS = ("mean", "simple", "multihead")


def masked_softmax(scores: Array, mask: Array | None) -> Array:
    """softmax over the last axis, float32 at least; entries where mask (same shape, or broadcast) is False get 0. A row
    without any True entry is uniform over nothing: all zeros, and no NaN in its gradient."""
    scores = scores.astype(full_dtype(scores.dtype))
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    mask = jnp.broadcast_to(mask, scores.shape)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(mask, weights, jnp.zeros((), scores.dtype))


def masked_mean(tokens: Array, mask: Array | None) -> Array:
    """Mean of tokens [B,N,D] over their valid positions (mask [B,N]), float32 at least; masked tokens may hold NaN."""
    full = full_dtype(tokens.dtype)
    if mask is None:
        return jnp.mean(tokens.astype(full), axis=1)
    kept = jnp.where(mask[:, :, None], tokens, jnp.zeros((), tokens.dtype)).astype(full)
    return jnp.sum(kept, axis=1) / jnp.maximum(jnp.sum(mask.astype(full), axis=1), 1.0)[:, None]


def entropy_ratio(weights: Array, mask: Array | None) -> Array:
    """H(a) / ln(valid tokens) of attention weights [B,A,N]: 1 is flat. [B], mean over A; 1 for a single token."""
    logs = jnp.log(jnp.where(weights > 0.0, weights, 1.0))
    entropy = -jnp.mean(jnp.sum(weights * logs, axis=-1), axis=1)
    tokens = jnp.full((weights.shape[0],), weights.shape[-1], weights.dtype)
    if mask is not None:
        tokens = jnp.sum(mask.astype(weights.dtype), axis=1)
    return jnp.where(tokens > 1.0, entropy / jnp.log(jnp.maximum(tokens, 2.0)), 1.0)


class AttentionPool(nnx.Module):
    """tokens [B,N,D], mask [B,N] -> (vector [B,D], weights [B,A,N]).

    'mean': masked mean of the tokens as they are (weights uniform, A = 1). 'simple': u = LayerNorm(tokens),
    a = softmax_n(u_n . w), sum_n a_n u_n (the score has no bias: the softmax ignores one, its gradient would be 0).
    'multihead': u as above, one learned query; head h weighs its slice of u V_h by softmax(q_h . u K_h / sqrt(D / A)),
    then one output projection. dropout: of the weights, in training, when a key is given (kept ones are scaled up).

    Raises ValueError for another pool, or a width that `heads` does not divide.
    """

    def __init__(
        self,
        width: int,
        *,
        pool: str = "simple",
        heads: int = 4,
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(map(repr, POOLS))}; given {pool!r}")
        if pool == "multihead" and width % heads:
            raise ValueError(f"multihead pooling of width {width} needs heads that divide it; given {heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"attention dropout must lie in [0, 1); given {dropout}")
        self.pool, self.heads, self.dropout = pool, heads if pool == "multihead" else 1, dropout
        self.dtype, self.full = compute_dtype(dtype), full_dtype(dtype)
        if pool == "mean":
            return
        self.norm = LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        draw = transformer_init()
        if pool == "simple":
            self.score = nnx.Param(draw(rngs.params(), (width,), self.full))
            return
        self.query = nnx.Param(draw(rngs.params(), (width,), self.full))
        self.key_value = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (width, 2 * width), self.full))
        options = {"dtype": self.dtype, "param_dtype": self.full, "rngs": rngs}
        self.output = nnx.Linear(width, width, **options)

    def __call__(
        self, tokens: Array, mask: Array | None = None, *, train: bool = False, key: Key | None = None
    ) -> tuple[Array, Array]:
        if self.pool == "mean":
            ones = jnp.zeros(tokens.shape[:2], self.full)[:, None, :]
            weights = masked_softmax(ones, None if mask is None else mask[:, None, :])
            return masked_mean(tokens, mask), weights
        if mask is not None:  # masked tokens may hold anything; a NaN would survive a weight of 0
            tokens = jnp.where(mask[:, :, None], tokens, jnp.zeros((), tokens.dtype))
        units = self.norm(tokens)
        wide = None if mask is None else mask[:, None, :]
        if self.pool == "simple":
            scores = jnp.sum(units * self.score.get_value()[None, None, :], axis=-1)[:, None, :]
            weights = masked_softmax(scores, wide)
            kept = self._drop(weights, train, key)
            return jnp.einsum("bn,bnd->bd", kept[:, 0], units, precision="highest"), weights
        batch, count, width = units.shape
        kernel = self.key_value.get_value().astype(self.dtype)
        both = (units.astype(self.dtype) @ kernel).reshape(batch, count, 2, self.heads, width // self.heads)
        keys, values = both[:, :, 0].astype(self.full), both[:, :, 1].astype(self.full)
        query = self.query.get_value().reshape(self.heads, -1)
        scores = jnp.einsum("bnhd,hd->bhn", keys, query) * (width // self.heads) ** -0.5
        weights = masked_softmax(scores, wide)
        joined = jnp.einsum("bhn,bnhd->bhd", self._drop(weights, train, key), values).reshape(batch, width)
        return self.output(joined.astype(self.dtype)).astype(self.full), weights

    def _drop(self, weights: Array, train: bool, key: Key | None) -> Array:
        if not train or key is None or self.dropout == 0.0:
            return weights
        kept = jax.random.bernoulli(key, 1.0 - self.dropout, weights.shape)
        return jnp.where(kept, weights / (1.0 - self.dropout), jnp.zeros((), weights.dtype))
