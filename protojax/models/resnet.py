"""Residual networks (He et al. 2016), NHWC, and small ones for two CPU cores.

Bottleneck blocks put the stride on the 3x3 convolution ("v1.5", as torchvision, transformers and CARP's code do).
Every backbone is called as `backbone(images [N,H,W,3], train=, key=, mask=) -> {'pooled': [N,F]}` and says its width
F in `features`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array, Key
from protojax.models.layers import check_images, compute_dtype, conv, full_dtype, make_norm

STEMS = {"imagenet": (7, 2), "cifar": (3, 1)}  # kernel, stride
EXPANSION = {"basic": 1, "bottleneck": 4}


class Block(nnx.Module):
    """y = relu(shortcut(x) + residual(x)); residual = two 3x3 convolutions (basic) or 1x1, 3x3, 1x1 (bottleneck),
    each with a norm, ReLU between. The shortcut is the identity, or a strided 1x1 convolution with a norm where the
    shape changes. `zero_init`: the scale of the last norm starts at zero, so the block starts as its shortcut
    (Goyal et al. 2017)."""

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        *,
        kind: str,
        norm: Callable[..., Any],
        zero_init: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        outputs = width * EXPANSION[kind]
        layers = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        if kind == "bottleneck":
            layers = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.depth = len(layers)
        for i, (n_in, n_out, size, step) in enumerate(layers, 1):
            setattr(self, f"conv{i}", conv(n_in, n_out, size, step, dtype=dtype, rngs=rngs))
            setattr(self, f"norm{i}", norm(n_out, zero_scale=zero_init and i == self.depth, rngs=rngs))
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut_conv = conv(inputs, outputs, 1, stride, dtype=dtype, rngs=rngs)
            self.shortcut_norm = norm(outputs, rngs=rngs)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        shortcut = x
        if self.projects:
            shortcut = self.shortcut_norm(self.shortcut_conv(x), train=train, mask=mask)
        for i in range(1, self.depth + 1):
            x = getattr(self, f"conv{i}")(x)
            x = getattr(self, f"norm{i}")(x, train=train, mask=mask)
            x = jax.nn.relu(x) if i < self.depth else x
        return jax.nn.relu(shortcut + x)


class ResNet(nnx.Module):
    """Stem, stages of blocks, global average pool.

    depths: blocks a stage; stage s has base width `widths[s]`, all but the first halve the resolution. width:
    multiplier of all widths. stem: 'imagenet' (7x7 stride 2, 3x3 max-pool stride 2) or 'cifar' (3x3 stride 1). norm:
    'batch' or 'group'. zero_init: see `Block`. momentum: of the running moments. remat: only the blocks' inputs are
    kept for the backward pass, which computes the blocks again. dtype: of activations and products; pooling and
    `pooled` are float32.
    Raises ValueError on an unknown stem, kind or norm, width <= 0, and depths and widths of unequal length.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        *,
        kind: str = "basic",
        widths: tuple[int, ...] = (64, 128, 256, 512),
        width: float = 1.0,
        stem: str = "imagenet",
        norm: str = "batch",
        zero_init: bool = True,
        momentum: float = 0.9,
        remat: bool = False,
        channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check(kind, stem, depths, widths, width)
        options = {"momentum": momentum} if norm == "batch" else {}
        norms = make_norm(norm, dtype=dtype, **options)
        sizes = [max(1, round(base * width)) for base in widths]
        self.channels, self.stem, self.dtype = channels, stem, compute_dtype(dtype)
        self.pool_dtype, self.remat = full_dtype(dtype), remat
        kernel, stride = STEMS[stem]
        self.stem_conv = conv(channels, sizes[0], kernel, stride, dtype=dtype, rngs=rngs)
        self.stem_norm = norms(sizes[0], rngs=rngs)
        names, inputs = [], sizes[0]
        for s, (depth, size) in enumerate(zip(depths, sizes, strict=True), 1):
            for b in range(1, depth + 1):
                stride = 2 if s > 1 and b == 1 else 1
                block = Block(inputs, size, stride, kind=kind, norm=norms, zero_init=zero_init, dtype=dtype, rngs=rngs)
                names.append(f"stage{s}_block{b}")
                setattr(self, names[-1], block)
                inputs = size * EXPANSION[kind]
        self.blocks, self.features = tuple(names), inputs

    def __call__(
        self, images: Array, *, train: bool, key: Key | None = None, mask: Array | None = None
    ) -> dict[str, Array]:
        check_images(images, self.channels)
        x = self.stem_conv(images.astype(self.dtype))
        x = jax.nn.relu(self.stem_norm(x, train=train, mask=mask))
        if self.stem == "imagenet":
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

        def apply(block: Block, x: Array) -> Array:
            return block(x, train=train, mask=mask)

        apply = nnx.remat(apply) if self.remat and train else apply
        for name in self.blocks:
            x = apply(getattr(self, name), x)
        return {"pooled": x.astype(self.pool_dtype).mean((1, 2))}


def _check(kind: str, stem: str, depths: tuple[int, ...], widths: tuple[int, ...], width: float) -> None:
    if kind not in EXPANSION:
        raise ValueError(f"kind must be 'basic' or 'bottleneck'; given {kind!r}")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(map(repr, STEMS))}; given {stem!r}")
    if len(depths) != len(widths):
        raise ValueError(f"depths {depths} and widths {widths} must have one entry a stage")
    if not width > 0:
        raise ValueError(f"width multiplies the channel counts and must be positive; given {width}")


class MicroResNet(nnx.Module):
    """A residual network for two CPU cores, after the layout of "ResNet-9" (DAWNBench): 3x3 convolutions alone.

    Stage s is a 3x3 convolution to `widths[s]` (norm, ReLU) of stride `strides[s]`, then `depths[s]` basic blocks at
    that width. Width and resolution change outside the blocks, so no block has a 1x1 shortcut: their weight gradients,
    convolutions at full resolution on 3 channels, and those on maps below 4x4 are what XLA:CPU is slow at.
    F = widths[-1]. Options as for `ResNet`.
    """

    def __init__(
        self,
        *,
        depths: tuple[int, ...] = (0, 1, 1),
        widths: tuple[int, ...] = (32, 64, 128),
        strides: tuple[int, ...] = (2, 2, 2),
        width: float = 1.0,
        norm: str = "batch",
        zero_init: bool = True,
        momentum: float = 0.9,
        channels: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check("basic", "cifar", depths, widths, width)
        if len(strides) != len(depths):
            raise ValueError(f"depths {depths} and strides {strides} must have one entry a stage")
        options = {"momentum": momentum} if norm == "batch" else {}
        norms = make_norm(norm, dtype=dtype, **options)
        self.channels, self.dtype, self.pool_dtype = channels, compute_dtype(dtype), full_dtype(dtype)
        names, inputs = [], channels
        for s, (depth, base, stride) in enumerate(zip(depths, widths, strides, strict=True), 1):
            size = max(1, round(base * width))
            setattr(self, f"stage{s}_conv", conv(inputs, size, 3, stride, dtype=dtype, rngs=rngs))
            setattr(self, f"stage{s}_norm", norms(size, rngs=rngs))
            blocks = [f"stage{s}_block{b}" for b in range(1, depth + 1)]
            for name in blocks:
                block = Block(size, size, 1, kind="basic", norm=norms, zero_init=zero_init, dtype=dtype, rngs=rngs)
                setattr(self, name, block)
            names.append(tuple(blocks))
            inputs = size
        self.blocks, self.features = tuple(names), inputs

    def __call__(
        self, images: Array, *, train: bool, key: Key | None = None, mask: Array | None = None
    ) -> dict[str, Array]:
        check_images(images, self.channels)
        x = images.astype(self.dtype)
        for s, blocks in enumerate(self.blocks, 1):
            x = getattr(self, f"stage{s}_conv")(x)
            x = jax.nn.relu(getattr(self, f"stage{s}_norm")(x, train=train, mask=mask))
            for name in blocks:
                x = getattr(self, name)(x, train=train, mask=mask)
        return {"pooled": x.astype(self.pool_dtype).mean((1, 2))}
