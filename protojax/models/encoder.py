"""Backbone and head over several views: the `api.Encoder` of the image workloads.

inputs: {'global': [Vg,B,H,W,3], 'local': [Vl,B,h,w,3] (optional), 'mask': [B] (optional)}, and positions of patches
of the global views, int [Vg,B,n]: 'masked', which the network does not see, or 'patches', which it does. Views of one
size are one forward pass, so batch norm sees one set of moments a resolution, as in the multi-crop wrappers of SwAV,
DINO and CARP; the running moments move once a resolution, global views first. The head runs once, on all V*B rows.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array, Encoder, Key, PyTree
from protojax.models.functional import functional
from protojax.models.heads import HEADS
from protojax.models.resnet import MicroResNet, ResNet
from protojax.models.vit import ViT

BACKBONES: dict[str, Callable[..., nnx.Module]] = {
    "resnet_micro": MicroResNet,
    "resnet18": functools.partial(ResNet, (2, 2, 2, 2)),
    "resnet34": functools.partial(ResNet, (3, 4, 6, 3)),
    "resnet50": functools.partial(ResNet, (3, 4, 6, 3), kind="bottleneck"),
    "resnet101": functools.partial(ResNet, (3, 4, 23, 3), kind="bottleneck"),
    "vit_ti": functools.partial(ViT, 192, 12, 3),
    "vit_s": functools.partial(ViT, 384, 12, 6),
    "vit_b": functools.partial(ViT, 768, 12, 12),
    "vit_l": functools.partial(ViT, 1024, 24, 16),
    # For two CPU cores and images of 32 px.
    "vit_micro": functools.partial(ViT, 128, 4, 4, patch_size=8, image_size=32),
}

VIEW_GROUPS = ("global", "local")


def make_encoder(
    backbone: str | Callable[..., nnx.Module],
    head: str | Callable[..., nnx.Module] = "carp",
    *,
    backbone_options: Mapping[str, Any] | None = None,
    head_options: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    tokens: bool = False,
    patches: bool = False,
) -> Encoder:
    """A backbone with a projection head as `api.Encoder`.

    backbone: a name in `BACKBONES` or a factory `(*, dtype, rngs, **options) -> module` with the attribute `features`
    (F) and the call of `resnet.ResNet`. head: a name in `HEADS` or a factory `(F, *, dtype, rngs, **options)`. dtype:
    of activations and matrix products; parameters and embeddings are float32.

    apply gives `image [V,B,D]` (head) and `backbone [V,B,F]`, global views first, and `tokens [Vg,B,T,F]` of the
    global views when `tokens` (backbones with patch tokens only). patches: a second head of the same kind, of its own
    weights, for patch tokens, and a mask token; `tokens [Vg,B,n,D]` are then its output at the n positions that the
    inputs name ('masked' or 'patches'; none without them). With train=False the running moments are used and
    returned unchanged. key=None turns drop path off even when train=True: what a teacher in training mode wants.

    Raises ValueError on an unknown name (with the nearest one), and from `apply` and `init` on inputs of other
    shapes; TypeError on images that are not floating point.
    """
    options = {**(backbone_options or {}), **({"mask_token": True} if patches else {})}
    if patches and isinstance(backbone, str) and not backbone.startswith("vit"):
        raise ValueError(f"patches=True needs a backbone with patch tokens (a vit_*); given {backbone!r}")
    factory = functools.partial(_lookup(BACKBONES, backbone, "backbone"), **options)
    head_factory = functools.partial(_lookup(HEADS, head, "head"), **(head_options or {}))
    network = functional(_MultiView, factory, head_factory, dtype=dtype, tokens=tokens, patches=patches)

    def init(key: Key, inputs: PyTree) -> PyTree:
        _check_inputs(inputs)
        return network.init(key)

    def apply(variables: PyTree, inputs: PyTree, train: bool, key: Key | None) -> tuple[dict[str, Array], PyTree]:
        _check_inputs(inputs)
        return network.apply(variables, inputs, train=train, key=key)

    return Encoder(init, apply)


class _MultiView(nnx.Module):
    """Rows are laid out image by image ([B,V] -> B*V, not [V,B]): with B sharded, merging the axes and joining the
    views are then local to a device; the other order would move every image between devices."""

    def __init__(
        self,
        backbone: Callable[..., Any],
        head: Callable[..., Any],
        *,
        dtype: DTypeLike,
        tokens: bool,
        patches: bool,
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone(dtype=dtype, rngs=rngs)
        self.head = head(self.backbone.features, dtype=dtype, rngs=rngs)
        self.tokens = tokens
        if patches:
            self.patch_head = head(self.backbone.features, dtype=dtype, rngs=rngs)

    def __call__(self, inputs: PyTree, *, train: bool, key: Key | None) -> dict[str, Array]:
        groups = [name for name in VIEW_GROUPS if name in inputs]
        keys = [None] * (len(groups) + 1) if key is None else list(jax.random.split(key, len(groups) + 1))
        mask, pooled, embeddings = inputs.get("mask"), [], {}
        hidden = _rows(inputs["masked"]) if "masked" in inputs else None
        asked = _rows(inputs["patches"]) if "patches" in inputs else hidden
        for name, group_key in zip(groups, keys, strict=False):
            views = jnp.swapaxes(inputs[name], 0, 1)  # [B,V,H,W,3]
            images, count = views.shape[:2]
            rows = views.reshape((images * count, *views.shape[2:]))
            unseen = {"masked": hidden} if hidden is not None and name == "global" else {}
            features = self.backbone(rows, train=train, key=group_key, mask=_repeat(mask, count), **unseen)
            pooled.append(features["pooled"].reshape((images, count, -1)))
            if self.tokens and name == "global":
                embeddings["tokens"] = _global_tokens(features, images, count)
            if asked is not None and name == "global":
                chosen = jnp.take_along_axis(features["tokens"], asked[:, :, None], axis=1)
                chosen = self._project(chosen, train, _repeat(mask, count))
                embeddings["tokens"] = jnp.swapaxes(chosen.reshape((images, count, *chosen.shape[1:])), 0, 1)
        backbone = jnp.concatenate(pooled, axis=1)
        images, count, width = backbone.shape
        image = self.head(
            backbone.reshape((images * count, width)), train=train, key=keys[-1], mask=_repeat(mask, count)
        )
        embeddings["image"] = jnp.swapaxes(image.reshape((images, count, -1)), 0, 1)
        embeddings["backbone"] = jnp.swapaxes(backbone, 0, 1)
        return embeddings

    def _project(self, tokens: Array, train: bool, mask: Array | None) -> Array:
        """Patch tokens [N,n,F] through their head [N,n,D]; mask [N]."""
        rows, count, width = tokens.shape
        kept = None if mask is None else jnp.broadcast_to(mask[:, None], (rows, count)).reshape(-1)
        projected = self.patch_head(tokens.reshape((rows * count, width)), train=train, key=None, mask=kept)
        return projected.reshape((rows, count, -1))


def _rows(positions: Array) -> Array:
    """[V,B,n] -> [B*V,n], image by image."""
    moved = jnp.swapaxes(positions, 0, 1)
    return moved.reshape((-1, moved.shape[2]))


def _global_tokens(features: Mapping[str, Array], images: int, count: int) -> Array:
    if "tokens" not in features:
        raise ValueError("tokens=True needs a backbone with patch tokens (a vit_*); this one has pooled features only")
    tokens = features["tokens"]
    return jnp.swapaxes(tokens.reshape((images, count, *tokens.shape[1:])), 0, 1)


def _repeat(mask: Array | None, count: int) -> Array | None:
    """[B] -> [B*count], image by image."""
    return None if mask is None else jnp.broadcast_to(mask[:, None], (mask.shape[0], count)).reshape(-1)


def _lookup(registry: Mapping[str, Any], name: Any, what: str) -> Any:
    if not isinstance(name, str):
        return name
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, registry, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}: {hint}known: {', '.join(sorted(registry))}")


def _check_inputs(inputs: Any) -> None:
    """Raises unless inputs is {'global': [Vg,B,H,W,3], 'local': optional, 'mask': optional}, with one B."""
    if not isinstance(inputs, Mapping) or "global" not in inputs:
        given = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(f"encoder inputs must be a dict with 'global' [V,B,H,W,3]; given {given}")
    batch = inputs["global"].shape[1:2]
    for name in VIEW_GROUPS:
        if name in inputs and (inputs[name].ndim != 5 or inputs[name].shape[1:2] != batch):
            raise ValueError(
                f"encoder input {name!r} must be [V,B,H,W,3] with the B of 'global' {batch}; "
                f"given shape {inputs[name].shape}"
            )
    for name in ("masked", "patches"):
        if name in inputs and (inputs[name].ndim != 3 or inputs[name].shape[:2] != inputs["global"].shape[:2]):
            raise ValueError(
                f"encoder input {name!r} must be positions [V,B,n] of the global views "
                f"{inputs['global'].shape[:2]}; given shape {inputs[name].shape}"
            )
    if "mask" in inputs and inputs["mask"].shape != batch:
        raise ValueError(f"encoder input 'mask' must be [B] = {batch}; given shape {inputs['mask'].shape}")


def count_parameters(tree: PyTree) -> int:
    """Number of scalars in a tree of arrays or `ShapeDtypeStruct`s, e.g. of `jax.eval_shape(init, ...)['params']`."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
