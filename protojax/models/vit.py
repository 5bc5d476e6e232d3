"""Vision transformers (Dosovitskiy et al. 2021) with layers scanned over depth.

Called as every backbone, `backbone(images [N,H,W,3], train=, key=, mask=)`; gives `pooled [N,F]` and the patch tokens
`tokens [N,T,F]` (row by row), both after the last norm and float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array, Key
from protojax.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    check_images,
    compute_dtype,
    drop_path,
    full_dtype,
    transformer_init,
)

POOLS = ("class", "mean")
ATTENTIONS = (None, "xla", "cudnn")


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Interpolation matrix W [new, old]: y = W x samples the cubic convolution of x at (i + 1/2) old / new - 1/2.

    Kernel of Keys (1981) with a = -0.75, borders repeated, no antialiasing: PyTorch's `bicubic`, which DINO and
    transformers resize position embeddings with (`jax.image.resize` has a = -0.5). The identity when new == old.
    """
    a = -0.75
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(centres).astype(np.int64)
    matrix = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        distance = np.abs(centres - (first + offset))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * a - 4 * a
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(matrix, (np.arange(new), np.clip(first + offset, 0, old - 1)), weight)
    return matrix


class TransformerBlock(nnx.Module):
    """x + scale1 * attention(norm1(x)), then x + scale2 * mlp(norm2(x)); mlp = dense, activation, dense.

    layer_scale: None, or the initial value of the per-channel factors scale1, scale2 (Touvron et al. 2021).
    activation: a name in `layers.ACTIVATIONS`. mask: bool, broadcast to [N,heads,T,T]; a token sees keys that are True.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        epsilon: float,
        layer_scale: float | None,
        attention: str | None,
        activation: str = "gelu",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.dtype, self.full = compute_dtype(dtype), full_dtype(dtype)
        self.heads, self.attention, self.scaled = heads, attention, layer_scale is not None
        self.activation = activation
        dense = functools.partial(
            nnx.Linear, dtype=self.dtype, param_dtype=self.full, kernel_init=transformer_init(), rngs=rngs
        )
        self.norm1 = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.qkv = dense(width, 3 * width)
        self.project = dense(width, width)
        self.norm2 = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.dense1 = dense(width, hidden)
        self.dense2 = dense(hidden, width)
        if layer_scale is not None:
            self.scale1 = nnx.Param(jnp.full((width,), layer_scale, self.full))
            self.scale2 = nnx.Param(jnp.full((width,), layer_scale, self.full))

    def __call__(self, x: Array, rate: Array | float = 0.0, key: Key | None = None, mask: Array | None = None) -> Array:
        keys = (None, None) if key is None else jax.random.split(key, 2)
        for branch, branch_key in zip(("1", "2"), keys, strict=True):
            norm = getattr(self, "norm" + branch)
            rows = norm(x).astype(self.dtype)
            residual = self._attend(rows, mask) if branch == "1" else self._mlp(rows)
            if self.scaled:
                residual = residual * getattr(self, "scale" + branch).get_value().astype(self.dtype)[None, None, :]
            x = x + drop_path(residual, rate, branch_key)
        return x

    def _attend(self, rows: Array, mask: Array | None) -> Array:
        images, tokens, width = rows.shape
        parts = self.qkv(rows).reshape((images, tokens, 3, self.heads, width // self.heads))
        query, key, value = (parts[:, :, i] for i in range(3))
        mixed = _attention(query, key, value, self.attention, mask)
        return self.project(mixed.reshape((images, tokens, width)))

    def _mlp(self, rows: Array) -> Array:
        return self.dense2(ACTIVATIONS[self.activation](self.dense1(rows)))


class ViT(nnx.Module):
    """Patch embedding, position embedding, `depth` blocks, last norm.

    The blocks are one `TransformerBlock` whose parameters have a leading axis `depth`, applied by `jax.lax.scan`:
    one block is compiled, not `depth` of them (scan=False unrolls the same parameters; remat recomputes a block's
    activations in the backward pass). image_size: the native size in pixels; other sizes (multiples of patch_size,
    not necessarily square) get the position embedding resized by `bicubic_matrix`. pool: 'class' (a class token) or
    'mean' (no class token; the mean of the patch tokens). drop_path: stochastic depth, rate rising linearly from 0 at
    the first block to this at the last; drawn from `key`, off when key is None or train=False. attention:
    None (two products and a softmax), or an implementation of `jax.nn.dot_product_attention`: 'xla', 'cudnn' (fused;
    NVIDIA, bfloat16 or float16). mask_token: a learned embedding that stands for patches which the caller hides,
    `masked` int [N,n] (their positions, row by row), before position embeddings are added (BEiT, iBOT).

    Raises ValueError on an unknown pool or attention, image_size no multiple of patch_size, width no multiple of
    heads, and drop_path outside [0, 1).
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        patch_size: int = 16,
        image_size: int = 224,
        hidden: int | None = None,
        pool: str = "class",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        scan: bool = True,
        remat: bool = False,
        attention: str | None = None,
        epsilon: float = 1e-6,
        channels: int = 3,
        mask_token: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check(width, heads, patch_size, image_size, pool, drop_path)
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be None, 'xla' or 'cudnn'; given {attention!r}")
        self.dtype, self.full = compute_dtype(dtype), full_dtype(dtype)
        self.patch_size, self.channels, self.features = patch_size, channels, width
        self.grid, self.depth, self.pool = image_size // patch_size, depth, pool
        self.drop_path, self.scan, self.remat = drop_path, scan, remat
        # uniform, variance 1 / (3 fan_in): PyTorch's default for the patch convolution, which DINO keeps
        self.patch = nnx.Linear(
            patch_size * patch_size * channels,
            width,
            dtype=self.dtype,
            param_dtype=self.full,
            kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            rngs=rngs,
        )
        start = transformer_init()
        if pool == "class":
            self.class_token = nnx.Param(start(rngs.params(), (width,), self.full))
        tokens = self.grid * self.grid + (pool == "class")
        self.position = nnx.Param(start(rngs.params(), (tokens, width), self.full))
        if mask_token:
            self.mask_token = nnx.Param(start(rngs.params(), (width,), self.full))
        block = functools.partial(
            TransformerBlock,
            width,
            heads,
            4 * width if hidden is None else hidden,
            epsilon=epsilon,
            layer_scale=layer_scale,
            attention=attention,
            dtype=dtype,
        )
        self.blocks = stack_blocks(block, depth, rngs)
        self.norm = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        images: Array,
        *,
        train: bool,
        key: Key | None = None,
        mask: Array | None = None,
        masked: Array | None = None,
    ) -> dict[str, Array]:
        x = self._embed(images, masked)
        x = self._run_blocks(x, key if train and self.drop_path > 0 else None)
        x = self.norm(x)
        if self.pool == "class":
            return {"pooled": x[:, 0], "tokens": x[:, 1:]}
        return {"pooled": x.mean(1), "tokens": x}

    def _embed(self, images: Array, masked: Array | None = None) -> Array:
        size = self.patch_size
        check_images(images, self.channels, size)
        count, rows, columns = images.shape[0], images.shape[1] // size, images.shape[2] // size
        # Non-overlapping patches are a transpose and one matrix product; as a convolution they are slow on CPU.
        patches = images.astype(self.dtype).reshape((count, rows, size, columns, size, self.channels))
        patches = patches.transpose((0, 1, 3, 2, 4, 5)).reshape((count, rows * columns, -1))
        x = self.patch(patches)
        if masked is not None:
            if not hasattr(self, "mask_token"):
                raise ValueError("patches can be hidden from a network with a mask token only: give mask_token=True")
            hidden = (masked[:, :, None] == jnp.arange(rows * columns)[None, None, :]).any(1)
            x = jnp.where(hidden[..., None], self.mask_token.get_value().astype(self.dtype)[None, None, :], x)
        x = x + self._positions(rows, columns).astype(self.dtype)[None]
        if self.pool == "class":
            first = (self.class_token.get_value() + self.position.get_value()[0]).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(first[None, None], (count, 1, self.features)), x], axis=1)
        return x

    def _positions(self, rows: int, columns: int) -> Array:
        """Position embedding of a rows x columns grid of patches, [rows * columns, F]."""
        position = self.position.get_value()[int(self.pool == "class") :]
        if (rows, columns) == (self.grid, self.grid):
            return position
        vertical, horizontal = (jnp.asarray(bicubic_matrix(self.grid, n), self.full) for n in (rows, columns))
        native = position.reshape((self.grid, self.grid, self.features))
        resized = jnp.einsum("hi,wj,ijd->hwd", vertical, horizontal, native, precision="highest")
        return resized.reshape((rows * columns, self.features))

    def _run_blocks(self, x: Array, key: Key | None) -> Array:
        graph, state = nnx.split(self.blocks)

        def apply(x: Array, layer: Any) -> tuple[Array, None]:
            params, rate, layer_key = layer
            return nnx.merge(graph, params)(x, rate, layer_key), None

        rates = jnp.asarray(np.linspace(0.0, self.drop_path, self.depth), jnp.float32)
        layers = (nnx.to_pure_dict(state), rates, None if key is None else jax.random.split(key, self.depth))
        body = jax.checkpoint(apply) if self.remat else apply
        if self.scan:
            return jax.lax.scan(body, x, layers)[0]
        for i in range(self.depth):
            x, _ = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
        return x


def _attention(query: Array, key: Array, value: Array, implementation: Any, mask: Array | None = None) -> Array:
    """softmax(query key^T / sqrt(width)) value by head; all [N,T,heads,width]; softmax in float32 or wider."""
    if implementation is not None:
        with jax.numpy_dtype_promotion("standard"):  # it mixes float32 logits with the compute dtype on purpose
            return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
    logits = _wide_einsum("nqhd,nkhd->nhqk", query, key) * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits).astype(value.dtype), value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_einsum(spec: str, left: Array, right: Array) -> Array:
    """einsum with a float32 (float64 for float64) result, whose gradient is products of the compute dtype too.

    Without the rule JAX multiplies the float32 cotangent with bfloat16 operands: a slower product, and one that strict
    dtype promotion refuses on CPU. Every letter of `spec` must occur in exactly two of its three terms."""
    return jnp.einsum(spec, left, right, preferred_element_type=full_dtype(left.dtype))


def _wide_einsum_forward(spec: str, left: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide_einsum(spec, left, right), (left, right)


def _wide_einsum_backward(spec: str, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    left, right = operands
    terms, result = spec.split("->")
    first, second = terms.split(",")
    narrow = cotangent.astype(left.dtype)
    return (
        jnp.einsum(f"{result},{second}->{first}", narrow, right),
        jnp.einsum(f"{result},{first}->{second}", narrow, left),
    )


_wide_einsum.defvjp(_wide_einsum_forward, _wide_einsum_backward)


def stack_blocks(block: Any, depth: int, rngs: nnx.Rngs) -> Any:
    """One module whose parameters lead with an axis of `depth` independent initialisations."""

    def build(key: Key) -> Any:
        return nnx.split(block(rngs=nnx.Rngs(key)))

    graph = jax.eval_shape(build, jax.eval_shape(lambda: jax.random.key(0)))[0]
    params = jax.vmap(lambda key: nnx.to_pure_dict(build(key)[1]))(jax.random.split(rngs.params(), depth))
    return nnx.merge(graph, params)


def _check(width: int, heads: int, patch_size: int, image_size: int, pool: str, drop_path: float) -> None:
    if pool not in POOLS:
        raise ValueError(f"pool must be 'class' or 'mean'; given {pool!r}")
    if image_size % patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size {patch_size}; given {image_size}")
    if width % heads:
        raise ValueError(f"width must be a multiple of heads {heads}; given {width}")
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path is a probability in [0, 1); given {drop_path}")
