"""The image and text towers of CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023), frozen: no dropout.

Both give `embedding` [N,D], not normalised, in the common space. With float32 all products are in full precision: a
cosine difference of 0.005 decides which sub-prompt an image goes to.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array, Key
from protojax.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    check_images,
    compute_dtype,
    full_dtype,
    transformer_init,
)
from protojax.models.perceiver import attend, linear
from protojax.models.pretrained.config import ImageTextConfig, Transformer
from protojax.models.vit import TransformerBlock, stack_blocks


class VisionTower(nnx.Module):
    """Normalised images [N,S,S,3] -> {'embedding' [N,D], 'pooled' [N,W], 'tokens' [N,T,W]}, float32.

    clip: patches and a class token, norm, blocks; pooled = norm(class token), embedding = pooled W_p. siglip: patches,
    blocks, norm; pooled = embedding = attention pooling. tokens: the patches after the last block (siglip: and norm),
    row by row. Raises ValueError for images of another size than the config's.
    """

    def __init__(self, config: ImageTextConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        vision, shape = config.vision, config.vision.transformer
        self.clip, self.size, self.patch_size = config.kind == "clip", vision.image_size, vision.patch_size
        self.channels, self.grid = vision.channels, vision.image_size // vision.patch_size
        self.dtype, full = compute_dtype(dtype), full_dtype(dtype)
        inputs = vision.patch_size**2 * vision.channels
        self.patch = linear(inputs, shape.width, bias=not self.clip, dtype=dtype, rngs=rngs)
        draw = transformer_init()
        self.position = nnx.Param(draw(rngs.params(), (self.grid**2 + self.clip, shape.width), full))
        norm: dict[str, Any] = {"epsilon": shape.epsilon, "dtype": dtype, "rngs": rngs}
        if self.clip:
            self.class_token = nnx.Param(draw(rngs.params(), (shape.width,), full))
            self.first_norm = LayerNorm(shape.width, **norm)
            self.project = linear(shape.width, config.embedding, bias=False, dtype=dtype, rngs=rngs)
        else:
            self.pool = AttentionHead(shape, dtype=dtype, rngs=rngs)
        self.blocks = _blocks(shape, dtype, rngs)
        self.norm = LayerNorm(shape.width, **norm)

    def __call__(
        self, images: Array, *, train: bool = False, key: Key | None = None, mask: Array | None = None
    ) -> dict[str, Array]:
        with _precision(self.dtype):
            x = self._embed(images)
            if self.clip:
                x = _run(self.blocks, self.first_norm(x).astype(self.dtype), None)
                pooled = self.norm(x[:, 0])
                embedding = self.project(pooled.astype(self.dtype))
                tokens = x[:, 1:]
            else:
                tokens = self.norm(_run(self.blocks, x, None))
                embedding = pooled = self.pool(tokens)
        return _full({"embedding": embedding, "pooled": pooled, "tokens": tokens}, self.dtype)

    def _embed(self, images: Array) -> Array:
        check_images(images, self.channels)
        count, height, width, _ = images.shape
        if (height, width) != (self.size, self.size):
            raise ValueError(
                f"images are {height} x {width} pixels, this tower reads {self.size} x {self.size}: prepare them with "
                "its preprocessor_config.json"
            )
        edge, grid = self.patch_size, self.grid
        whole = images[:, : grid * edge, : grid * edge].astype(self.dtype)  # a rest below one patch is not read
        patches = whole.reshape((count, grid, edge, grid, edge, self.channels)).transpose((0, 1, 3, 2, 4, 5))
        x = self.patch(patches.reshape((count, grid * grid, -1)))
        position = self.position.get_value().astype(self.dtype)[None]
        if not self.clip:
            return x + position
        first = jnp.broadcast_to(self.class_token.get_value().astype(self.dtype)[None, None], (count, 1, x.shape[-1]))
        return jnp.concatenate([first, x], axis=1) + position


class AttentionHead(nnx.Module):
    """SigLIP's pooling: tokens [N,T,W] -> v + mlp(norm(v)) [N,W], v = Attn(q = one learned probe, kv = tokens)."""

    def __init__(self, shape: Transformer, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads, self.dtype, self.activation = shape.heads, compute_dtype(dtype), shape.activation
        dense = functools.partial(linear, bias=True, dtype=dtype, rngs=rngs)
        self.probe = nnx.Param(transformer_init()(rngs.params(), (shape.width,), full_dtype(dtype)))
        self.query = dense(shape.width, shape.width)
        self.key_value = dense(shape.width, 2 * shape.width)
        self.output = dense(shape.width, shape.width)
        self.norm = LayerNorm(shape.width, epsilon=shape.epsilon, dtype=dtype, rngs=rngs)
        self.dense1, self.dense2 = dense(shape.width, shape.hidden), dense(shape.hidden, shape.width)

    def __call__(self, tokens: Array) -> Array:
        count, length, width = tokens.shape
        each = width // self.heads
        query = self.query(self.probe.get_value().astype(self.dtype)[None]).reshape((1, 1, self.heads, each))
        both = self.key_value(tokens.astype(self.dtype)).reshape((count, length, 2, self.heads, each))
        query = jnp.broadcast_to(query, (count, 1, self.heads, each))
        mixed = self.output(attend(query, both[:, :, 0], both[:, :, 1]).reshape((count, width)))
        hidden = self.dense1(self.norm(mixed).astype(self.dtype))
        return mixed + self.dense2(ACTIVATIONS[self.activation](hidden))


class TextTower(nnx.Module):
    """Token ids [B,S], mask [B,S] or None -> {'embedding' [B,D], 'pooled' [B,W], 'tokens' [B,S,W]}, float32.

    Token and position embeddings, blocks (clip: causal; masked tokens are seen by none), norm = tokens; pooled: the
    token at the config's `pool`; embedding: pooled W_p (siglip: + b). Raises ValueError above `max_length` positions.
    """

    def __init__(self, config: ImageTextConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        text, shape = config.text, config.text.transformer
        self.causal, self.pool, self.eos, self.max_length = config.kind == "clip", text.pool, text.eos, text.max_length
        self.dtype, full = compute_dtype(dtype), full_dtype(dtype)
        draw = transformer_init()
        self.tokens = nnx.Param(draw(rngs.params(), (text.vocabulary, shape.width), full))
        self.positions = nnx.Param(draw(rngs.params(), (text.max_length, shape.width), full))
        self.blocks = _blocks(shape, dtype, rngs)
        self.norm = LayerNorm(shape.width, epsilon=shape.epsilon, dtype=dtype, rngs=rngs)
        self.project = linear(shape.width, config.embedding, bias=not self.causal, dtype=dtype, rngs=rngs)

    def __call__(
        self, ids: Array, mask: Array | None = None, *, train: bool = False, key: Key | None = None
    ) -> dict[str, Array]:
        length = ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"texts of {length} tokens, this tower reads at most {self.max_length}: cut them")
        sees = None if mask is None else mask.astype(bool)[:, None, None, :]
        if self.causal:
            before = jnp.tril(jnp.ones((length, length), bool))[None, None]
            sees = before if sees is None else before & sees
        with _precision(self.dtype):
            x = self.tokens.get_value()[ids] + self.positions.get_value()[None, :length]
            tokens = self.norm(_run(self.blocks, x.astype(self.dtype), sees))
            where = pooled_position(ids, self.pool, self.eos)
            pooled = jnp.take_along_axis(tokens, where[:, None, None], axis=1)[:, 0]
            embedding = self.project(pooled.astype(self.dtype))
        return _full({"embedding": embedding, "pooled": pooled, "tokens": tokens}, self.dtype)


def pooled_position(ids: Array, pool: str, eos: int) -> Array:
    """int32 [B]: position of the token that speaks for each text (`TextConfig.pool`)."""
    if pool == "last":
        return jnp.full((ids.shape[0],), ids.shape[1] - 1, jnp.int32)
    ranked = ids if pool == "argmax" else (ids == eos).astype(jnp.int32)
    return jnp.argmax(ranked, axis=1).astype(jnp.int32)


def logits(image: Array, text: Array, scale: Array | float, bias: Array | float) -> Array:
    """exp(scale) cos(image_n, text_t) + bias [N,T] of embeddings [N,D] and [T,D]; CLIP's bias is 0."""
    image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
    return jnp.exp(scale) * jnp.matmul(image, text.T, precision="highest") + bias


def _blocks(shape: Transformer, dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
    block = functools.partial(
        TransformerBlock, shape.width, shape.heads, shape.hidden, epsilon=shape.epsilon, layer_scale=None,
        attention=None, activation=shape.activation, dtype=dtype,
    )  # fmt: skip
    return stack_blocks(block, shape.depth, rngs)


def _run(blocks: Any, x: Array, mask: Array | None) -> Array:
    graph, state = nnx.split(blocks)

    def apply(x: Array, params: Any) -> tuple[Array, None]:
        return nnx.merge(graph, params)(x, mask=mask), None

    return jax.lax.scan(apply, x, nnx.to_pure_dict(state))[0]


def _precision(dtype: Any) -> AbstractContextManager:
    return jax.default_matmul_precision("highest" if jnp.dtype(dtype).itemsize >= 4 else "default")


def _full(outputs: dict[str, Array], dtype: Any) -> dict[str, Array]:
    return {name: value.astype(full_dtype(dtype)) for name, value in outputs.items()}
