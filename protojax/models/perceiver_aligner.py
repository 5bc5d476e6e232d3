"""Two towers into one space: image tokens through a resampler or a pool, text states through a projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array, Encoder, Key, PyTree
from protojax.models.attention_pool import AttentionPool, entropy_ratio, masked_mean
from protojax.models.functional import functional
from protojax.models.layers import LayerNorm, compute_dtype, full_dtype
from protojax.models.perceiver import EPSILON, Attention, Resampler, linear
from protojax.models.resnet import MicroResNet
from protojax.models.text import TextTransformer
from protojax.ops.unit import unit

IMAGE_PATHS = ("perceiver", "direct", "class_token", "token_mean")
ORDERS = ("project_then_pool", "pool_then_project")
IDENTICAL = 0.01  # total variation below which two attention maps are one


class ConvTokens(MicroResNet):
    """MicroResNet without its pool: images [B,H,W,3] -> tokens [B,h w,F], row by row."""

    def __call__(self, images: Array, *, train: bool, key: Key | None = None, mask: Array | None = None) -> Any:
        x = images.astype(self.dtype)
        for s, blocks in enumerate(self.blocks, 1):
            x = getattr(self, f"stage{s}_conv")(x)
            x = jax.nn.relu(getattr(self, f"stage{s}_norm")(x, train=train, mask=mask))
            for name in blocks:
                x = getattr(self, name)(x, train=train, mask=mask)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class ImageHead(nnx.Module):
    """Image tokens [B,N,D_image], mask [B,N] -> (embedding [B,D], measures).

    image_path 'perceiver': Resampler, then `latent_pool`: 'mean' mean_l z_l W_o, 'attention' the single-score pool of
    z W_o, 'multihead' a learned query over z W_o. 'direct': tokens W_p, then the pool `direct_pool` ('simple',
    'multihead', 'mean') at width D; order 'pool_then_project' pools at width D_image first (1 / (D / D_image) of the
    memory). 'class_token', 'token_mean': one vector of the tokens, projected. measures, where they exist, in
    evaluation: 'attention_entropy' [B] (see `perceiver.Attention`), 'attention_map' [B,L,N], 'identical_maps' [B]
    (share of the latents whose map another one has too, within a total variation of 0.01), 'latent_cosine' [B] (mean
    cosine between the latents), 'latent_rank' [B] (their effective rank, 1 to L).
    """

    def __init__(
        self,
        inputs: int,
        *,
        width: int = 512,
        image_path: str = "perceiver",
        num_latents: int = 16,
        latent_width: int = 128,
        depth: int = 2,
        heads: int = 4,
        latent_pool: str = "mean",
        latent_init_std: float = 0.02,
        latent_self_attention: bool = False,
        shared_norm: bool = False,
        drop_class_token: bool = True,
        has_class_token: bool = True,
        direct_pool: str = "simple",
        order: str = "project_then_pool",
        pool_dropout: float = 0.1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check(image_path, order, latent_pool, has_class_token)
        self.path, self.order, self.latent_pool = image_path, order, latent_pool
        self.drop_class = image_path == "perceiver" and drop_class_token and has_class_token
        self.dtype, self.full = compute_dtype(dtype), full_dtype(dtype)
        shared: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        if image_path == "perceiver":
            self.resampler = Resampler(
                inputs, width=latent_width, latents=num_latents, depth=depth, heads=heads,
                self_attention=latent_self_attention, shared_norm=shared_norm, latent_init_std=latent_init_std,
                **shared,            )  # fmt: skip
            self.project = linear(latent_width, width, bias=True, **shared)
            kind = {"attention": "simple"}.get(latent_pool, latent_pool)
            self.pool = AttentionPool(width, pool=kind, heads=heads, dropout=pool_dropout, **shared)
            return
        self.project = linear(inputs, width, bias=True, **shared)
        if image_path == "direct":
            size = width if order == "project_then_pool" else inputs
            self.pool = AttentionPool(size, pool=direct_pool, heads=heads, dropout=pool_dropout, **shared)

    def __call__(
        self, tokens: Array, mask: Array | None, *, train: bool, key: Key | None
    ) -> tuple[Array, dict[str, Array]]:
        if self.path == "perceiver":
            return self._perceiver(tokens, mask, train, key)
        if self.path != "direct":
            vector = tokens[:, 0] if self.path == "class_token" else masked_mean(tokens, mask)
            return self._projected(vector), {}
        if self.order == "project_then_pool":
            vector, weights = self.pool(self._projected(tokens), mask, train=train, key=key)
        else:
            pooled, weights = self.pool(tokens, mask, train=train, key=key)
            vector = self._projected(pooled)
        return vector, {} if train else {"attention_entropy": entropy_ratio(weights, mask)}

    def _perceiver(self, tokens: Array, mask: Array | None, train: bool, key: Key | None) -> Any:
        if self.drop_class:
            tokens, mask = tokens[:, 1:], None if mask is None else mask[:, 1:]
        latents, seen = self.resampler(tokens, mask, maps=not train)
        vector = self._pooled(latents, self._projected, train, key)
        return vector, {} if seen is None else _measures(latents, seen)

    def of_text(
        self, states: Array, mask: Array, into: nnx.Linear, out: nnx.Linear, *, train: bool, key: Key | None
    ) -> Array:
        """Text states [B,S,D_text] with mask [B,S] read by the same latents, layers and latent pool, between
        projections of their own: [B,D]."""
        latents, _ = self.resampler(states, mask, project=into)
        own = lambda x: out(x.astype(self.dtype)).astype(self.full)  # noqa: E731
        return self._pooled(latents, own, train, key)

    def _pooled(self, latents: Array, projected: Callable[[Array], Array], train: bool, key: Key | None) -> Array:
        if self.latent_pool == "mean":  # the projection is linear: the mean first is the same and cheaper
            return projected(latents.mean(axis=1))
        return self.pool(projected(latents), train=train, key=key)[0]

    def _projected(self, x: Array) -> Array:
        return self.project(x.astype(self.dtype)).astype(self.full)


def _measures(latents: Array, seen: Attention) -> dict[str, Array]:
    """Of latents [B,L,W] and where they look; see `ImageHead`."""
    count, units = latents.shape[1], unit(latents)
    total = jnp.square(units.sum(axis=1)).sum(axis=-1)
    # One latent at a time: all of them at once would be [B,L,L,N].
    apart = jax.lax.map(
        lambda one: 0.5 * jnp.abs(seen.map - one[:, None, :]).sum(axis=-1), jnp.moveaxis(seen.map, 1, 0)
    )
    own = jnp.eye(count, dtype=bool)[:, None, :]
    gram = jnp.einsum("blw,bmw->blm", latents, latents, precision="highest")
    shares = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram), 0.0))
    shares = shares / jnp.maximum(shares.sum(axis=-1, keepdims=True), jnp.finfo(shares.dtype).tiny)
    logs = jnp.log(jnp.where(shares > 0.0, shares, 1.0))
    return {
        "attention_entropy": seen.entropy,
        "attention_map": seen.map,
        "identical_maps": jnp.any((apart < IDENTICAL) & ~own, axis=-1).astype(apart.dtype).mean(axis=0),
        "latent_cosine": (total - count) / max(count * (count - 1), 1),
        "latent_rank": jnp.exp(-jnp.sum(shares * logs, axis=-1)),
    }


def _check(path: str, order: str, latent_pool: str, has_class_token: bool) -> None:
    if path not in IMAGE_PATHS:
        raise ValueError(f"image_path must be one of {', '.join(map(repr, IMAGE_PATHS))}; given {path!r}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}; given {order!r}")
    if latent_pool not in ("mean", "attention", "multihead"):
        raise ValueError(f"latent_pool must be 'mean', 'attention' or 'multihead'; given {latent_pool!r}")
    if path == "class_token" and not has_class_token:
        raise ValueError("image_path='class_token' needs image tokens with a class token in front; these have none")


class Aligner(nnx.Module):
    """inputs -> {'image' [1,B,D], 'text' [B,D], 'backbone' [1,B,D_image or F], and in evaluation the measures}.

    inputs: 'image_tokens' [B,N,D_image] with 'image_mask' [B,N] (optional), or 'image' float [B,H,W,3] for a tower of
    ours (`tower`: ConvTokens with these options); 'text' [B,D_text], pooled states of a frozen text tower, or
    'text_ids' and 'text_mask' [B,S] for a text transformer of ours (`text_tower` holds its options). Embeddings are
    unit rows; in training `caption_id` [B] of the inputs goes with them. sizes: 'image', 'text' (widths), 'vocabulary',
    'positions' of what is given.

    shared_resampler: the image's resampler and latent pool read the text too, every position of it, between
    projections of the text's own; inputs are then 'text_states' [B,S,D_text] with 'text_mask', or ids for the
    transformer. Raises ValueError for it without a resampler (image_path other than 'perceiver').
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        width: int = 512,
        tower: Mapping[str, Any] | None = None,
        text_tower: Mapping[str, Any] | None = None,
        shared_resampler: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if shared_resampler and options.get("image_path", "perceiver") != "perceiver":
            raise ValueError(f"shared_resampler needs image_path='perceiver', got {options['image_path']!r}")
        self.shared = shared_resampler
        self.dtype, self.full = compute_dtype(dtype), full_dtype(dtype)
        self.has_tower, self.has_text = tower is not None, text_tower is not None
        inputs = sizes.get("image", 0)
        if tower is not None:
            self.tower = ConvTokens(dtype=dtype, rngs=rngs, **tower)
            inputs = self.tower.features
            self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (sizes["positions"], inputs), self.full))
            self.token_norm = LayerNorm(inputs, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        self.image_head = ImageHead(inputs, width=width, dtype=dtype, rngs=rngs, **options)
        text_width = sizes.get("text", 0)
        if text_tower is not None:
            self.text_tower = TextTransformer(sizes["vocabulary"], dtype=dtype, rngs=rngs, **text_tower)
            text_width = self.text_tower.features
        if shared_resampler:
            latent_width = options.get("latent_width", 128)
            self.text_adapt = linear(text_width, latent_width, bias=True, dtype=dtype, rngs=rngs)
            text_width = latent_width
        self.text_project = linear(text_width, width, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, inputs: Mapping[str, Array], *, train: bool, key: Key | None) -> dict[str, Array]:
        mask = inputs.get("image_mask")
        if self.has_tower:
            tokens = self.token_norm(self.tower(inputs["image"], train=train)) + self.positions.get_value()[None]
        else:
            tokens = inputs["image_tokens"]
        image, measures = self.image_head(tokens, mask, train=train, key=key)
        text = self._text(inputs, train, key)
        pooled = masked_mean(tokens, mask)
        drawn = {"caption_id": inputs["caption_id"]} if train and "caption_id" in inputs else {}
        return {"image": unit(image)[None], "text": unit(text), "backbone": pooled[None], **drawn, **measures}

    def _text(self, inputs: Mapping[str, Array], train: bool, key: Key | None) -> Array:
        if not self.shared:
            states = self.text_tower(inputs["text_ids"], inputs["text_mask"]) if self.has_text else inputs["text"]
            return self.text_project(states.astype(self.dtype)).astype(self.full)
        mask = inputs["text_mask"]
        states = self.text_tower.states(inputs["text_ids"], mask) if self.has_text else inputs["text_states"]
        own = None if key is None else jax.random.fold_in(key, 1)  # not the image's draws
        return self.image_head.of_text(states, mask, self.text_adapt, self.text_project, train=train, key=own)


def make_aligner(sizes: Mapping[str, int], **options: Any) -> Encoder:
    """`api.Encoder` of an `Aligner`; options as there. Raises ValueError, from init and apply too, for inputs that do
    not fit: both widths are named."""
    network = functional(Aligner, dict(sizes), **options)

    def init(key: Key, inputs: PyTree) -> PyTree:
        _check_inputs(inputs, sizes)
        return network.init(key)

    def apply(variables: PyTree, inputs: PyTree, train: bool, key: Key | None) -> tuple[dict[str, Array], PyTree]:
        _check_inputs(inputs, sizes)
        return network.apply(variables, inputs, train=train, key=key)

    return Encoder(init, apply)


def _check_inputs(inputs: Any, sizes: Mapping[str, int]) -> None:
    for name, size in (("image_tokens", "image"), ("text", "text"), ("text_states", "text")):
        if name in inputs and inputs[name].shape[-1] != sizes.get(size):
            raise ValueError(
                f"aligner input {name!r} has width {inputs[name].shape[-1]}, but the heads were made for width "
                f"{sizes.get(size)}: is it the cache of another tower?"
            )
    sides = (
        [name for name in ("image_tokens", "image") if name in inputs],
        [name for name in ("text", "text_states", "text_ids") if name in inputs],
    )
    if not all(sides):
        raise ValueError(f"aligner inputs need an image side and a text side, got {sorted(inputs)}")
