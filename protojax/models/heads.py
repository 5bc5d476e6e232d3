"""Projection heads between the backbone and the prototypes.

The prototype layer itself is not here: it is the codebook, which an estimator owns (`api.Estimator`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from protojax.api import Array, Key
from protojax.models.layers import BatchNorm, compute_dtype, full_dtype, transformer_init
from protojax.models.whitening import Whitening

INITIALIZERS: dict[str, Callable[[], Callable[..., Array]]] = {
    "normal": transformer_init,
    "xavier": nnx.initializers.glorot_uniform,
}


class Head(nnx.Module):
    """MLP: `layers` dense layers, widths hidden, ..., hidden, dim; norm and GELU (exact, erf) after all but the last.

    whiten: Newton iterations of a whitening of the output over the global batch (`models.whitening`; 5 whiten the
    strong directions, 0: none, as published). Without it short trainings contract the features to a few directions,
    and every codebook that follows them.

    norm: 'batch' or 'none'. Dense layers that feed a batch norm or the whitening have no bias: the norm subtracts it,
    so its gradient is identically zero and weight decay alone would move it (CARP's and DINO's code keep such biases;
    the function is the same). All others have one. normalise: l2-normalised output, h / max(||h||, 1e-12). init:
    'normal' (N(0, 0.02^2), both papers) or 'xavier' (uniform), biases zero.
    layers = 0 is the identity (dim must then be the input width); layers = 1 is a linear map. Output float32.

    Raises ValueError on an unknown norm or init, negative layers or whiten, and layers = 0 with dim != inputs.
    """

    def __init__(
        self,
        inputs: int,
        *,
        layers: int = 3,
        hidden: int = 2048,
        dim: int = 256,
        norm: str = "batch",
        normalise: bool = False,
        init: str = "normal",
        momentum: float = 0.9,
        whiten: int = 0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check(inputs, layers, hidden, dim, norm, init, whiten)
        self.layers, self.norm, self.normalise, self.whiten = layers, norm, normalise, whiten
        self.features = dim
        self.dtype, self.full = compute_dtype(dtype), full_dtype(dtype)
        widths = [inputs] + [hidden] * (layers - 1) + [dim]
        for i in range(1, layers + 1):
            inner = i < layers
            centred = norm == "batch" if inner else bool(whiten)
            dense = nnx.Linear(
                widths[i - 1],
                widths[i],
                use_bias=not centred,
                dtype=self.dtype,
                param_dtype=self.full,
                kernel_init=INITIALIZERS[init](),
                rngs=rngs,
            )
            setattr(self, f"dense{i}", dense)
            if inner and norm == "batch":
                setattr(self, f"norm{i}", BatchNorm(widths[i], momentum=momentum, dtype=dtype, rngs=rngs))

        if whiten:
            self.whitening = Whitening(dim, iterations=whiten, momentum=momentum, dtype=dtype)

    def __call__(self, rows: Array, *, train: bool, key: Key | None = None, mask: Array | None = None) -> Array:
        x = rows
        for i in range(1, self.layers + 1):
            x = getattr(self, f"dense{i}")(x.astype(self.dtype))
            if i < self.layers:
                if self.norm == "batch":
                    x = getattr(self, f"norm{i}")(x, train=train, mask=mask)
                x = jax.nn.gelu(x, approximate=False)
        x = x.astype(self.full)
        if self.whiten:
            x = self.whitening(x, train=train, mask=mask)
        if self.normalise:
            # max inside the root: the gradient at a zero row is zero, not NaN
            x = x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
        return x


def _check(inputs: int, layers: int, hidden: int, dim: int, norm: str, init: str, whiten: int) -> None:
    if norm not in ("batch", "none"):
        raise ValueError(f"head norm must be 'batch' or 'none'; given {norm!r}")
    if init not in INITIALIZERS:
        raise ValueError(f"head init must be one of {', '.join(map(repr, INITIALIZERS))}; given {init!r}")
    if isinstance(whiten, bool) or not isinstance(whiten, int) or whiten < 0:
        raise ValueError(f"head whiten must be a number of iterations, 0 for none; given {whiten!r}")
    if layers < 0 or hidden < 1 or dim < 1:
        raise ValueError(f"head needs layers >= 0, hidden >= 1 and dim >= 1; given {layers}, {hidden}, {dim}")
    if layers == 0 and dim != inputs:
        raise ValueError(f"the identity head keeps the backbone's width {inputs}; given dim={dim}: leave dim out")


def identity(inputs: int, *, normalise: bool = False, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> Head:
    """The backbone's features, normalised on request."""
    return Head(inputs, layers=0, norm="none", dim=inputs, normalise=normalise, dtype=dtype, rngs=rngs)


# Partials, so that every option and its default can be read off the table.
HEADS: dict[str, Callable[..., Head]] = {
    # Silva & Ramirez Rivera 2023: inputs -> 2048 -> 2048 -> 256, batch norm, output not normalised.
    "carp": functools.partial(Head, layers=3, norm="batch", normalise=False),
    # Caron et al. 2021: inputs -> 2048 -> 2048 -> 256, no norm, l2-normalised output.
    "dino": functools.partial(Head, layers=3, norm="none", normalise=True),
    "linear": functools.partial(Head, layers=1, norm="none"),
    "identity": identity,
}
