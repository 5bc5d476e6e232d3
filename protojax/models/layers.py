"""Layers that the networks share: precision policy, normalisation, drop path, initialisation.

The norms are written here because those of Flax promote dtypes implicitly (an error under strict promotion), take the
variance as E[x^2] - m^2 or keep running moments by other rules than PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array, Key

COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")


def compute_dtype(name: DTypeLike) -> Any:
    """The dtype of activations and matrix products. Parameters, statistics and what leaves a network stay float32
    (float64 when this is float64). Raises ValueError on a dtype that is not floating point."""
    try:
        dtype = jnp.dtype(name)
    except TypeError as error:
        raise ValueError(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}; given {name!r}") from error
    if dtype.name not in COMPUTE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}; given {dtype.name!r}")
    return dtype


def full_dtype(dtype: DTypeLike) -> Any:
    """float64 for float64, else float32: the dtype of parameters, statistics and outputs."""
    return jnp.dtype("float64") if jnp.dtype(dtype) == jnp.float64 else jnp.dtype("float32")


def resnet_init() -> Callable[..., Array]:
    """N(0, 2 / fan_out) (He et al. 2015, in its fan-out form), for convolutions followed by ReLU."""
    return nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def transformer_init() -> Callable[..., Array]:
    """N(0, 0.02^2). ViT, DINO and CARP state it as truncated at |w| = 2, that is at 100 standard deviations, where
    truncation does nothing."""
    return nnx.initializers.normal(0.02)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, exact over the global batch.

    train: y = (x - m) / sqrt(v + epsilon) * scale + bias, m = E[x], v = E[(x - m)^2] in float32 over every row. Under
    `jax.jit` with a sharded batch the mean is over the *global* batch, because the program is written for global
    arrays and XLA inserts the all-reduce; no axis name is needed. A sample mask [N] removes rows from both moments.
    Running moments: r <- (1 - a) r + a moment with a = max(1 - momentum, 1 / (updates + 1)), the variance unbiased
    (times n / (n - 1)), as in PyTorch but for the first 1 / (1 - momentum) updates: these are a plain mean, so that the
    arbitrary initial values 0 and 1 weigh nothing (PyTorch's still weigh 18% after 16 batches, which for a layer whose
    true variance is 1e-3 means a network that evaluates as another one than it trains). Otherwise m and v are the
    running moments, which stay as they are.

    v is taken from the centred values: E[x^2] - m^2 cancels catastrophically in float32 when |m| >> sqrt(v).
    """

    def __init__(
        self,
        features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        zero_scale: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        full = full_dtype(dtype)
        start = jnp.zeros if zero_scale else jnp.ones
        self.scale = nnx.Param(start((features,), full))
        self.bias = nnx.Param(jnp.zeros((features,), full))
        self.mean = nnx.BatchStat(jnp.zeros((features,), full))
        self.var = nnx.BatchStat(jnp.ones((features,), full))
        self.updates = nnx.BatchStat(jnp.zeros((), full))
        self.momentum, self.epsilon, self.dtype = momentum, epsilon, compute_dtype(dtype)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        values = x.astype(self.scale.get_value().dtype)
        if train:
            mean, var = self._moments(values, mask)
        else:
            mean, var = self.mean.get_value(), self.var.get_value()
        last = (1,) * (x.ndim - 1) + (-1,)
        factor = jax.lax.rsqrt(var + self.epsilon) * self.scale.get_value()
        normalised = (values - mean.reshape(last)) * factor.reshape(last) + self.bias.get_value().reshape(last)
        return normalised.astype(self.dtype)

    def _moments(self, values: Array, mask: Array | None) -> tuple[Array, Array]:
        axes = tuple(range(values.ndim - 1))
        if mask is None:
            count = jnp.asarray(math.prod(values.shape[:-1]), values.dtype)
            mean = values.mean(axes)
            var = jnp.square(values - mean.reshape((1,) * len(axes) + (-1,))).mean(axes)
        else:
            weight = mask.astype(values.dtype).reshape((-1,) + (1,) * (values.ndim - 1))
            count = jnp.maximum(weight.sum() * math.prod(values.shape[1:-1]), 1.0)
            mean = (values * weight).sum(axes) / count
            var = (jnp.square(values - mean.reshape((1,) * len(axes) + (-1,))) * weight).sum(axes) / count
        unbiased = var * (count / jnp.maximum(count - 1.0, 1.0))
        updates = self.updates.get_value()
        rate = jnp.maximum(1.0 / (updates + 1.0), 1.0 - self.momentum)
        self.updates.set_value(updates + 1.0)
        for running, moment in ((self.mean, mean), (self.var, unbiased)):
            # Not old + rate (moment - old): at the first update that cancels a small variance against the initial 1.
            running.set_value((1.0 - rate) * running.get_value() + rate * jax.lax.stop_gradient(moment))
        return mean, var


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018) with the call of `BatchNorm`: no statistics, no coupling of rows, mask
    unused. Groups: the greatest common divisor of `features` and 32. x [N, ..., features]."""

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-5,
        zero_scale: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        full = full_dtype(dtype)
        self.scale = nnx.Param((jnp.zeros if zero_scale else jnp.ones)((features,), full))
        self.bias = nnx.Param(jnp.zeros((features,), full))
        self.groups, self.epsilon, self.dtype = math.gcd(32, features), epsilon, compute_dtype(dtype)

    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        scale, bias = self.scale.get_value(), self.bias.get_value()
        groups = x.astype(scale.dtype).reshape((x.shape[0], -1, self.groups, x.shape[-1] // self.groups))
        normalised = _standardise(groups, (1, 3), self.epsilon).reshape(x.shape)
        last = (1,) * (x.ndim - 1) + (-1,)
        return (normalised * scale.reshape(last) + bias.reshape(last)).astype(self.dtype)


class LayerNorm(nnx.Module):
    """y = (x - E[x]) / sqrt(E[(x - E[x])^2] + epsilon) * scale + bias over the last axis, in float32."""

    def __init__(self, features: int, *, epsilon: float, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        full = full_dtype(dtype)
        self.scale = nnx.Param(jnp.ones((features,), full))
        self.bias = nnx.Param(jnp.zeros((features,), full))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        scale, bias = self.scale.get_value(), self.bias.get_value()
        last = (1,) * (x.ndim - 1) + (-1,)
        return _standardise(x.astype(scale.dtype), (-1,), self.epsilon) * scale.reshape(last) + bias.reshape(last)


def _standardise(values: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centred = values - values.mean(axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + epsilon)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
}

NORMS: dict[str, Callable[..., nnx.Module]] = {"batch": BatchNorm, "group": GroupNorm}


def make_norm(name: str, **options: Any) -> Callable[..., Any]:
    """Norm constructor `(features, *, rngs, zero_scale=False) -> module` by name. Raises ValueError on others."""
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}; given {name!r}")
    return functools.partial(NORMS[name], **options)


class Conv(nnx.Conv):
    """A square NHWC convolution, padded by size // 2. On a CPU, 1x1 kernels and maps below 4x4 are computed as one
    matrix product of patches: XLA:CPU runs 3x3 convolutions over 2x2 maps, and gradients of strided ones, 20 to 100
    times slower than that. Elsewhere, and for larger maps, XLA's convolution is the faster one."""

    def __call__(self, inputs: Array, *args: Any, **options: Any) -> Array:
        size, stride = self.kernel_size[0], self.strides[0]  # type: ignore[index]
        ends = [(side + 2 * (size // 2) - size) // stride * stride + 1 for side in inputs.shape[1:3]]
        if jax.default_backend() != "cpu" or (size > 1 and max(ends) > 3 * stride):
            return super().__call__(inputs, *args, **options)
        arrays = inputs, self.kernel[...], None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype(arrays, dtype=self.dtype)
        x = jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
        shifted = [x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] for i in range(size) for j in range(size)]
        out = jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
        return out if bias is None else out + bias[None, None, None, :]


def conv(
    inputs: int, outputs: int, size: int, stride: int = 1, *, dtype: DTypeLike, rngs: nnx.Rngs, bias: bool = False
) -> nnx.Conv:
    """NHWC convolution, padded by size // 2 on every side (as in PyTorch: 'SAME' pads strided layers unevenly)."""
    pad = (size // 2, size // 2)
    return Conv(
        inputs,
        outputs,
        (size, size),
        strides=(stride, stride),
        padding=(pad, pad),
        use_bias=bias,
        dtype=compute_dtype(dtype),
        param_dtype=full_dtype(dtype),
        kernel_init=resnet_init(),
        rngs=rngs,
    )


def drop_path(residual: Array, rate: float | Array, key: Key | None) -> Array:
    """Stochastic depth (Huang et al. 2016): drops a row's residual with probability `rate`, divides kept rows by
    1 - rate, so that the expectation is unchanged. residual [N, ...]; key None: the identity."""
    if key is None:
        return residual
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.bernoulli(key, keep, (residual.shape[0],) + (1,) * (residual.ndim - 1))
    return residual * jnp.where(kept, 1.0 / keep, 0.0).astype(residual.dtype)


def check_images(images: Array, channels: int, multiple: int = 1) -> None:
    """Raises unless images are [N,H,W,channels] floating point with H and W multiples of `multiple`."""
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(f"images must be [N,H,W,{channels}]; given shape {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be floating point, already normalised; given {images.dtype}: run them through the views"
        )
    if images.shape[1] % multiple or images.shape[2] % multiple:
        raise ValueError(
            f"image height and width must be multiples of the patch size {multiple}; given {images.shape[1:3]}: "
            "change the crop size or the patch size"
        )
