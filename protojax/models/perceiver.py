"""Perceiver resampler: a fixed number of learned latents read any number of tokens (Jaegle et al. 2021; in the form of
Flamingo's resampler, Alayrac et al. 2022, keys and values from the tokens alone)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array
from protojax.models.attention_pool import entropy_ratio, masked_softmax
from protojax.models.layers import LayerNorm, compute_dtype, full_dtype

EPSILON = 1e-6


def attend(query: Array, key: Array, value: Array, mask: Array | None = None, *, causal: bool = False) -> Array:
    """softmax(query key^T / sqrt(width)) value by head, softmax in float32: query [B,L,A,w], key and value [B,N,A,w],
    mask [B,N] of valid keys -> [B,L,A,w]."""
    wide = None if mask is None else mask[:, None, None, :]
    with jax.numpy_dtype_promotion("standard"):  # it mixes float32 logits with the compute dtype on purpose
        return jax.nn.dot_product_attention(query, key, value, mask=wide, is_causal=causal)


def linear(inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=compute_dtype(dtype), param_dtype=full_dtype(dtype), rngs=rngs
    )


class FeedForward(nnx.Module):
    """x -> GELU(x W_1 + b_1) W_2 + b_2, hidden width ratio * W."""

    def __init__(self, width: int, *, ratio: int = 4, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.dtype = compute_dtype(dtype)
        self.expand = linear(width, ratio * width, bias=True, dtype=dtype, rngs=rngs)
        self.reduce = linear(ratio * width, width, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.reduce(jax.nn.gelu(self.expand(x.astype(self.dtype)), approximate=False))


class SelfAttention(nnx.Module):
    """x -> Attn(x, x) projected; heads of W / heads."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.heads, self.dtype = heads, compute_dtype(dtype)
        self.query_key_value = linear(width, 3 * width, bias=False, dtype=dtype, rngs=rngs)
        self.output = linear(width, width, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None, *, causal: bool = False) -> Array:
        batch, count, width = x.shape
        joint = self.query_key_value(x.astype(self.dtype)).reshape(batch, count, 3, self.heads, width // self.heads)
        mixed = attend(joint[:, :, 0], joint[:, :, 1], joint[:, :, 2], mask, causal=causal)
        return self.output(mixed.reshape(batch, count, width))


class _Layer(nnx.Module):
    """One layer on the latents z: cross-attention to given keys and values, optional self-attention, feed-forward."""

    def __init__(self, width: int, heads: int, self_attention: bool, shared: bool, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm: dict[str, Any] = {"epsilon": EPSILON, "dtype": dtype, "rngs": rngs}
        if not shared:
            self.query_norm = LayerNorm(width, **norm)
        self.query = linear(width, width, bias=False, dtype=dtype, rngs=rngs)
        self.output = linear(width, width, bias=True, dtype=dtype, rngs=rngs)
        if self_attention:
            self.self_norm = LayerNorm(width, **norm)
            self.self_attention = SelfAttention(width, heads, dtype=dtype, rngs=rngs)
        self.ffn_norm = LayerNorm(width, **norm)
        self.ffn = FeedForward(width, dtype=dtype, rngs=rngs)


class Attention(NamedTuple):
    """Where latents look. map [B,L,N]: weights of the last layer, mean over heads. entropy [B]: of every head of every
    layer over ln(valid tokens), mean; 1 is flat."""

    map: Array
    entropy: Array


class Resampler(nnx.Module):
    """tokens [B,N,D_in], mask [B,N] -> (latents [B,L,W] float32, where they look or None).

        x = tokens W_p + b_p;  z = latents
        z <- z + Attn(q = LN_q(z), kv = LN_kv(x));  [z <- z + Attn(LN(z), LN(z))];  z <- z + FFN(LN(z))   `depth` times
        z = LN(z)

    x is projected and standardised once: LN_kv's gain and bias of each layer are folded into its key and value kernels,
    so that keys and values of all layers are one product. Query, key and value kernels have no bias. Masked tokens
    get no weight and may hold anything; latents start at N(0, latent_init_std^2). shared_norm: LN_q and LN_kv of a
    layer are one norm. maps=True also returns `Attention`. project: another input projection than W_p, for tokens of
    another kind [B,N,D_other] that the same latents and layers read.

    Raises ValueError when heads do not divide the width or a size is not positive.
    """

    def __init__(
        self,
        inputs: int,
        *,
        width: int = 128,
        latents: int = 16,
        depth: int = 2,
        heads: int = 4,
        self_attention: bool = False,
        shared_norm: bool = False,
        latent_init_std: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if min(inputs, width, latents, depth, heads) < 1:
            raise ValueError(
                f"resampler sizes must be positive; given {inputs=}, {width=}, {latents=}, {depth=}, {heads=}"
            )
        if width % heads:
            raise ValueError(f"resampler: latent width {width} is not a multiple of heads {heads}")
        if not latent_init_std > 0:
            raise ValueError(
                f"resampler: latent_init_std must be positive, given {latent_init_std}: equal latents stay so"
            )
        self.depth, self.heads, self.shared_norm, self.with_self = depth, heads, shared_norm, self_attention
        self.dtype, self.full = compute_dtype(dtype), full_dtype(dtype)
        self.project = linear(inputs, width, bias=True, dtype=dtype, rngs=rngs)
        start = nnx.initializers.normal(latent_init_std)
        self.latents = nnx.Param(start(rngs.params(), (latents, width), self.full))
        draw = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-2, batch_axis=0)
        self.key_value = nnx.Param(draw(rngs.params(), (depth, width, 2 * width), self.full))
        self.norm_scale = nnx.Param(jnp.ones((depth, width), self.full))
        self.norm_bias = nnx.Param(jnp.zeros((depth, width), self.full))
        for i in range(depth):
            setattr(self, f"layer{i}", _Layer(width, heads, self_attention, shared_norm, dtype=dtype, rngs=rngs))
        self.norm = LayerNorm(width, epsilon=EPSILON, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: Array, mask: Array | None = None, *, maps: bool = False, project: nnx.Linear | None = None
    ) -> tuple[Array, Attention | None]:
        if mask is not None:
            tokens = jnp.where(mask[:, :, None], tokens, jnp.zeros((), tokens.dtype))
        keys, values = self._keys_values(tokens, project)
        latents = self.latents.get_value()
        z = jnp.broadcast_to(latents[None], (tokens.shape[0], *latents.shape))
        weights, ratios = None, []
        for i in range(self.depth):
            layer = getattr(self, f"layer{i}")
            query = self._split(layer.query(self._query_norm(i, layer, z).astype(self.dtype)))
            if maps:
                weights = _weights(query, keys[i], mask)
                ratios.append(entropy_ratio(weights.reshape(len(weights), -1, weights.shape[-1]), mask))
            mixed = attend(query, keys[i], values[i], mask).reshape(z.shape)
            z = z + layer.output(mixed).astype(z.dtype)
            if self.with_self:
                z = z + layer.self_attention(layer.self_norm(z)).astype(z.dtype)
            z = z + layer.ffn(layer.ffn_norm(z)).astype(z.dtype)
        seen = None if weights is None else Attention(weights.mean(axis=1), jnp.stack(ratios).mean(axis=0))
        return self.norm(z), seen

    def _keys_values(self, tokens: Array, project: nnx.Linear | None = None) -> tuple[Array, Array]:
        """[depth,B,N,A,W/A] each."""
        x = (self.project if project is None else project)(tokens.astype(self.dtype)).astype(self.full)
        centred = x - x.mean(-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)
        kernel, scale, bias = (p.get_value() for p in (self.key_value, self.norm_scale, self.norm_bias))
        folded, offset = kernel * scale[:, :, None], jnp.einsum("lw,lwo->lo", bias, kernel)
        both = jnp.einsum("bnw,lwo->lbno", unit.astype(self.dtype), folded.astype(self.dtype))
        both = both + offset.astype(self.dtype)[:, None, None, :]
        keys, values = jnp.split(both, 2, axis=-1)
        return self._split(keys), self._split(values)

    def _query_norm(self, index: int, layer: Any, z: Array) -> Array:
        if not self.shared_norm:
            return layer.query_norm(z)
        centred = z - z.mean(-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)
        return (
            unit * self.norm_scale.get_value()[index][None, None, :] + self.norm_bias.get_value()[index][None, None, :]
        )

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)


def _weights(query: Array, key: Array, mask: Array | None) -> Array:
    """Attention weights by head, [B,A,L,N]."""
    full = full_dtype(query.dtype)
    scores = jnp.einsum("blad,bnad->baln", query.astype(full), key.astype(full)) * query.shape[-1] ** -0.5
    return masked_softmax(scores, None if mask is None else mask[:, None, None, :])
