"""Networks over tables, stars of neighbours and images with a classifier of distributions on top.

B samples, F features, S neighbours, E edge features, H width, C categories.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array, Encoder, Key, PyTree
from protojax.models.encoder import BACKBONES
from protojax.models.functional import functional
from protojax.models.layers import compute_dtype, full_dtype

xavier = nnx.initializers.glorot_uniform()


def dropout(x: Array, rate: float, key: Key | None, train: bool) -> Array:
    """x with entries zeroed at `rate` and the rest scaled up; unchanged without a key, at rate 0 or in evaluation."""
    if not train or key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


class MLP(nnx.Module):
    """h = x W_in + b; `depth` blocks h <- h + dropout(LayerNorm(h W + b)), ReLU after all blocks but the last. [B,H].

    Residual: inputs reach the classifier, so a column of scale 10^4 becomes logits of 10^3. Raises ValueError for
    width < 1, depth < 0 or a dropout outside [0, 1).
    """

    def __init__(self, inputs: int, *, width: int = 128, depth: int = 2, dropout: float = 0.2, heads: int = 4,
                 dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):  # fmt: skip
        check_sizes(width, depth, dropout)
        self.depth, self.rate, self.features = depth, float(dropout), width
        linear = _linear(dtype, rngs)
        self.enter = linear(inputs, width)
        for i in range(depth):
            setattr(self, f"dense{i}", linear(width, width))
            setattr(self, f"norm{i}", _norm(width, dtype, rngs))

    def __call__(self, inputs: Mapping[str, Array], *, train: bool, key: Key | None) -> Array:
        h = self.enter(inputs["features"])
        for i in range(self.depth):
            new = getattr(self, f"norm{i}")(getattr(self, f"dense{i}")(h)).astype(h.dtype)
            own = None if key is None else jax.random.fold_in(key, i)
            h = h + dropout(new, self.rate, own, train)
            h = jax.nn.relu(h) if i + 1 < self.depth else h
        return h


class StarGraph(nnx.Module):
    """A target node attends to its S neighbours: neighbours receive nothing, so one read-out a block suffices.

    Per block, `heads` heads of width H / heads: query from the target, keys and values from the neighbours, edge
    features [B,S,E] added to both; softmax over the unmasked neighbours (zero where a sample has none);
    h <- h + dropout(LayerNorm(attention + h W_skip)). inputs: features [B,F], neighbours [B,S,F], edges [B,S,E],
    neighbour_mask [B,S]. Raises ValueError when heads does not divide the width.
    """

    def __init__(self, inputs: int, *, edges: int, width: int = 128, depth: int = 2, dropout: float = 0.2,
                 heads: int = 4, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):  # fmt: skip
        check_sizes(width, depth, dropout)
        if heads < 1 or width % heads:
            raise ValueError(f"star_graph: heads must divide the width, got width = {width} and heads = {heads}.")
        self.depth, self.heads, self.rate, self.features = depth, heads, float(dropout), width
        linear = _linear(dtype, rngs)
        self.enter = linear(inputs, width)
        for i in range(depth):
            for name, given in (("query", width), ("key", width), ("value", width), ("skip", width), ("edge", edges)):
                setattr(self, f"{name}{i}", linear(given, width))
            setattr(self, f"norm{i}", _norm(width, dtype, rngs))

    def __call__(self, inputs: Mapping[str, Array], *, train: bool, key: Key | None) -> Array:
        h, around = self.enter(inputs["features"]), self.enter(inputs["neighbours"])
        mask = inputs["neighbour_mask"].astype(bool)
        for i in range(self.depth):
            layer = lambda name, i=i: getattr(self, f"{name}{i}")  # noqa: E731
            edge = layer("edge")(inputs["edges"])
            read = self._attend(layer("query")(h), layer("key")(around) + edge, layer("value")(around) + edge, mask)
            own = None if key is None else jax.random.fold_in(key, i)
            new = layer("norm")(read + layer("skip")(h)).astype(h.dtype)
            h = h + dropout(new, self.rate, own, train)
            h = jax.nn.relu(h) if i + 1 < self.depth else h
        return h

    def _attend(self, query: Array, keys: Array, values: Array, mask: Array) -> Array:
        split = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)  # noqa: E731
        query, keys, values = split(query), split(keys), split(values)
        scores = jnp.einsum("bad,bsad->bas", query, keys).astype(jnp.result_type(float)) * (query.shape[-1] ** -0.5)
        scores = jnp.where(mask[:, None, :], scores, -1e30)
        weights = jnp.where(mask[:, None, :], jax.nn.softmax(scores, axis=-1), 0.0)
        return jnp.einsum("bas,bsad->bad", weights.astype(values.dtype), values).reshape(query.shape[0], -1)


class _Image(nnx.Module):
    """An image backbone on one view [B,h,w,3]."""

    def __init__(self, backbone: Callable[..., Any], *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.backbone = backbone(dtype=dtype, rngs=rngs)
        self.features = self.backbone.features

    def __call__(self, inputs: Mapping[str, Array], *, train: bool, key: Key | None) -> Array:
        return self.backbone(inputs["image"], train=train, key=key, mask=inputs.get("mask"))["pooled"]


class Classifier(nnx.Module):
    """a = h W_out + b_out; optionally a <- s a / (|a| + 1e-8); z = a / T. Gives 'logits' z [B,C] and 'backbone' h.

    final_norm: a LayerNorm before the classifier (an arm: it hides unscaled inputs). zero_kernel: W_out starts at zero
    and b_out at `bias`: the first prediction is softmax(bias), for example the best constant.
    """

    def __init__(self, trunk: Callable[..., Any], categories: int, *, logit_norm: float | None, temperature: float,
                 final_norm: bool, bias: tuple[float, ...] | None, dtype: DTypeLike, rngs: nnx.Rngs):  # fmt: skip
        self.trunk = trunk(dtype=dtype, rngs=rngs)
        full = full_dtype(dtype)
        self.scale, self.temperature, self.full = logit_norm, float(temperature), full
        self.norm = _norm(self.trunk.features, dtype, rngs) if final_norm else None
        kernel = xavier if bias is None else nnx.initializers.zeros_init()
        start = nnx.initializers.zeros_init() if bias is None else _given(bias)
        self.out = nnx.Linear(
            self.trunk.features,
            categories,
            dtype=full,
            param_dtype=full,
            kernel_init=kernel,
            bias_init=start,
            rngs=rngs,
        )

    def __call__(self, inputs: Mapping[str, Array], *, train: bool, key: Key | None) -> dict[str, Array]:
        hidden = self.trunk(inputs, train=train, key=key).astype(self.full)
        hidden = hidden if self.norm is None else self.norm(hidden)
        a = self.out(hidden)
        if self.scale is not None:
            # the square root of a sum of squares has no gradient at zero: the floor is inside
            norm = jnp.sqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True) + 1e-24)
            a = self.scale * a / (norm + 1e-8)
        return {"logits": a / self.temperature, "backbone": hidden}


def soft_label_encoder(
    trunk: str,
    categories: int,
    *,
    features: int = 0,
    edges: int = 0,
    sizes: Mapping[str, Any] | None = None,
    backbone_options: Mapping[str, Any] | None = None,
    logit_norm: float | None = None,
    temperature: float = 1.0,
    final_norm: bool = False,
    bias: tuple[float, ...] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Encoder:
    """`api.Encoder` of a trunk ('mlp', 'star_graph' or a name in BACKBONES) with a `Classifier` on top.

    sizes: width, depth, dropout and heads of the first two; backbone_options: of an image backbone. Raises ValueError
    for temperature or logit_norm that is not positive.
    """
    for name, value in (("temperature", temperature), ("logit_norm", logit_norm)):
        if value is not None and not value > 0:
            raise ValueError(f"soft_label, {name}: expected a positive number, got {value!r}.")
    make: Callable[..., Any]
    if trunk == "mlp":
        make = functools.partial(MLP, features, **(sizes or {}))
    elif trunk == "star_graph":
        make = functools.partial(StarGraph, features, edges=edges, **(sizes or {}))
    else:
        make = functools.partial(_Image, functools.partial(BACKBONES[trunk], **(backbone_options or {})))
    network = functional(Classifier, make, categories, logit_norm=logit_norm, temperature=temperature,
                         final_norm=final_norm, bias=bias, dtype=dtype)  # fmt: skip

    def apply(variables: PyTree, inputs: PyTree, train: bool, key: Key | None) -> tuple[dict[str, Array], PyTree]:
        return network.apply(variables, inputs, train=train, key=key)

    return Encoder(lambda key, inputs: network.init(key), apply)


def _given(values: tuple[float, ...]) -> Callable[..., Array]:
    """An initialiser that gives these values."""
    return lambda key, shape, dtype=jnp.float32, **_: jnp.asarray(values, dtype).reshape(shape)


def check_sizes(width: int, depth: int, dropout: float) -> None:
    """Raises ValueError for width < 1, depth < 0 or a dropout outside [0, 1)."""
    if width < 1 or depth < 0 or not 0 <= dropout < 1:
        raise ValueError(
            f"soft_label: expected width >= 1, depth >= 0 and dropout in [0, 1), got {width}, {depth} and {dropout}."
        )


def _linear(dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[[int, int], nnx.Linear]:
    full, compute = full_dtype(dtype), compute_dtype(dtype)
    return lambda i, o: nnx.Linear(i, o, dtype=compute, param_dtype=full, kernel_init=xavier, rngs=rngs)


def _norm(width: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, dtype=full_dtype(dtype), param_dtype=full_dtype(dtype), rngs=rngs)
