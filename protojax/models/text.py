"""Text: pooling of token states, and a small transformer of our own for captions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array
from protojax.models.attention_pool import masked_mean
from protojax.models.layers import LayerNorm, compute_dtype, full_dtype, transformer_init
from protojax.models.perceiver import EPSILON, FeedForward, SelfAttention, linear

TEXT_POOLS = ("eos", "mean", "bos", "unmasked_mean")


def check_text_pool(pool: str, causal: bool, *, failing_arm: bool = False) -> str:
    """The pool, when it can tell captions apart. 'bos' on a causal tower sees the start token alone: every caption gets
    one vector, the loss stays at ln B and retrieval at chance. Raises ValueError for it unless `failing_arm`."""
    if pool not in TEXT_POOLS:
        raise ValueError(f"text_pool must be one of {', '.join(map(repr, TEXT_POOLS))}; given {pool!r}")
    if pool == "bos" and causal and not failing_arm:
        raise ValueError(
            "text_pool='bos' on a causal tower sees only the start token, so that all text embeddings are identical "
            "and nothing can be learned; use 'eos' or 'mean' (to see it fail, train failures/alignment_bos)"
        )
    return pool


def pool_text(states: Array, mask: Array, eos: Array, pool: str) -> Array:
    """Token states [B,S,D] -> [B,D], float32 at least: 'eos' the state at `eos` [B], 'mean' over valid positions (mask
    [B,S]), and two that fail: 'bos' (position 0) and 'unmasked_mean' (padding averaged in)."""
    check_text_pool(pool, causal=False)
    full = full_dtype(states.dtype)
    if pool == "eos":
        return jnp.take_along_axis(states, eos.astype(jnp.int32)[:, None, None], axis=1)[:, 0].astype(full)
    if pool == "bos":
        return states[:, 0].astype(full)
    return masked_mean(states, mask if pool == "mean" else None)


def check_token_ids(ids: np.ndarray, mask: np.ndarray, vocabulary: int) -> None:
    """Raises ValueError for ids outside the vocabulary and for captions of padding alone, naming rows."""
    ids, mask = np.asarray(ids), np.asarray(mask, bool)
    outside = np.flatnonzero(np.any((ids < 0) | (ids >= vocabulary), axis=1))
    if outside.size:
        worst = ids[outside[0]][(ids[outside[0]] < 0) | (ids[outside[0]] >= vocabulary)][0]
        raise ValueError(
            f"token ids must lie in 0..{vocabulary - 1} (the vocabulary); {outside.size} captions have others, the "
            f"first is caption {outside[0]} with id {worst}: were they made by another tokenizer?"
        )
    empty = np.flatnonzero(~np.any(mask, axis=1))
    if empty.size:
        raise ValueError(f"{empty.size} captions hold padding alone, the first are {empty[:5].tolist()}")


class TextTransformer(nnx.Module):
    """Token ids [B,S] with mask [B,S] -> pooled state [B,W] (float32).

    Token plus position embedding, `depth` pre-norm blocks (self-attention, feed-forward of ratio 4), last norm, pool.
    causal: a position sees itself and those before it (padding stands at the end). 'eos' takes the last valid
    position. `states` gives [B,S,W] before the pool. Raises ValueError for 'bos' on a causal tower (unless
    `failing_arm`), for captions longer than `max_length`, and when heads do not divide the width.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        max_length: int = 77,
        causal: bool = True,
        pool: str = "eos",
        failing_arm: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_text_pool(pool, causal, failing_arm=failing_arm)
        if width % heads:
            raise ValueError(f"text transformer: width {width} is not a multiple of heads {heads}")
        self.depth, self.pool, self.causal, self.max_length, self.features = depth, pool, causal, max_length, width
        self.dtype, full = compute_dtype(dtype), full_dtype(dtype)
        draw = transformer_init()
        self.tokens = nnx.Param(draw(rngs.params(), (vocabulary, width), full))
        self.positions = nnx.Param(0.5 * draw(rngs.params(), (max_length, width), full))
        norm: dict[str, Any] = {"epsilon": EPSILON, "dtype": dtype, "rngs": rngs}
        for i in range(depth):
            setattr(self, f"attention_norm{i}", LayerNorm(width, **norm))
            setattr(self, f"attention{i}", SelfAttention(width, heads, dtype=dtype, rngs=rngs))
            setattr(self, f"ffn_norm{i}", LayerNorm(width, **norm))
            setattr(self, f"ffn{i}", FeedForward(width, dtype=dtype, rngs=rngs))
        self.norm = LayerNorm(width, **norm)

    def __call__(self, ids: Array, mask: Array) -> Array:
        last = jnp.maximum(jnp.sum(mask.astype(jnp.int32), axis=1) - 1, 0)
        return pool_text(self.states(ids, mask), mask, last, self.pool)

    def states(self, ids: Array, mask: Array) -> Array:
        """The last norm's output at every position, [B,S,W]."""
        if ids.shape[1] > self.max_length:
            raise ValueError(f"captions of {ids.shape[1]} tokens do not fit max_length {self.max_length}: cut them")
        x = self.tokens.get_value()[ids] + self.positions.get_value()[None, : ids.shape[1]]
        keys = mask if self.pool != "unmasked_mean" else None
        for i in range(self.depth):
            attended = getattr(self, f"attention{i}")(getattr(self, f"attention_norm{i}")(x), keys, causal=self.causal)
            x = x + attended.astype(x.dtype)
            x = x + getattr(self, f"ffn{i}")(getattr(self, f"ffn_norm{i}")(x)).astype(x.dtype)
        return self.norm(x)


__all__ = ["TEXT_POOLS", "TextTransformer", "check_text_pool", "check_token_ids", "linear", "pool_text"]
