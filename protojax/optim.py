"""Optimisers from optax, with decay on kernels only, gradient clipping and schedules in fractions of the run.

Names: 'adamw', 'sgd', 'lars' (You et al. 2017, as CARP and SwAV use it: no decay and no trust ratio for tensors of
rank <= 1). All take the same schedule: linear warm-up over `warmup_fraction` of the run, cosine from `peak_lr` to
`end_lr`, clamped after the end (a resumed run past its end does not warm up again).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import optax
import optax.contrib

from protojax.api import Array, PyTree
from protojax.schedules import make_schedule

Schedule = Callable[[Array], Array]


def warmup_cosine(total_steps: int, peak: float, end: float, warmup_fraction: float) -> Schedule:
    """step -> value: peak * f / w for f < w, else end + (peak - end) (1 + cos(pi (f - w) / (1 - w))) / 2, with
    f = step / total_steps clamped to [0, 1] and w = warmup_fraction."""
    spec = {"kind": "cosine", "start": peak, "end": end, "warmup": warmup_fraction}
    return make_schedule(spec, total_steps, "learning rate")


def _kernels(tree: PyTree) -> PyTree:
    """True for tensors of rank >= 2: what decay and trust ratios apply to (not biases, not norms)."""
    return jax.tree.map(lambda x: x.ndim >= 2, tree)


def _final_kernel(tree: PyTree) -> PyTree:
    """True for the kernel of the layer named 'out'."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: [str(getattr(k, "key", "")) for k in path[-2:]] == ["out", "kernel"], tree
    )


def adamw(
    *,
    total_steps: int,
    peak_lr: float = 1e-3,
    end_lr: float = 0.0,
    warmup_fraction: float = 0.05,
    weight_decay: float = 0.05,
    weight_decay_end: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    clip_norm: float | None = None,
    final_layer_weight_decay: float = 0.0,
    schedule: str = "cosine",
) -> tuple[optax.GradientTransformation, Schedule]:
    """AdamW (Loshchilov & Hutter 2019). weight_decay_end: cosine to this value over the run (DINO: 0.04 -> 0.4).
    final_layer_weight_decay: on top, for the kernel of the layer named 'out' (the classifier), decoupled. schedule:
    'cosine', or 'plateau': the warm-up, then peak_lr, halved each time that the mean training loss of a twentieth of
    the run has not fallen for five of them. Returns (transformation, learning-rate schedule). Raises ValueError for
    another schedule or a negative decay."""
    if schedule not in ("cosine", "plateau"):
        raise ValueError(f"adamw, schedule: expected 'cosine' or 'plateau', got {schedule!r}.")
    if not final_layer_weight_decay >= 0:
        raise ValueError(f"adamw, final_layer_weight_decay: expected a number >= 0, got {final_layer_weight_decay!r}.")
    if schedule == "plateau":
        end_lr = peak_lr
    lr = warmup_cosine(total_steps, peak_lr, end_lr, warmup_fraction)
    ends = ("cosine", weight_decay, weight_decay if weight_decay_end is None else weight_decay_end)
    decay = weight_decay if weight_decay_end is None else make_schedule(ends, total_steps, "weight decay")
    moves = optax.adamw(lr, b1=b1, b2=b2, weight_decay=decay, mask=_kernels)
    if final_layer_weight_decay:
        moves = optax.chain(
            optax.scale_by_adam(b1=b1, b2=b2),
            optax.add_decayed_weights(decay, _kernels),
            optax.add_decayed_weights(final_layer_weight_decay, _final_kernel),
            optax.scale_by_learning_rate(lr),
        )
    if schedule == "plateau":
        window = max(1, round(total_steps / 20))
        moves = optax.chain(
            moves, optax.contrib.reduce_on_plateau(factor=0.5, patience=5, rtol=0.0, accumulation_size=window)
        )
    return _clipped(moves, clip_norm), lr


def sgd(
    *,
    total_steps: int,
    peak_lr: float = 0.1,
    end_lr: float = 0.0,
    warmup_fraction: float = 0.05,
    weight_decay: float = 1e-4,
    momentum: float = 0.9,
    nesterov: bool = False,
    clip_norm: float | None = None,
) -> tuple[optax.GradientTransformation, Schedule]:
    """SGD with momentum; decay is added to the gradient (as in PyTorch). Returns (transformation, schedule)."""
    lr = warmup_cosine(total_steps, peak_lr, end_lr, warmup_fraction)
    chain = optax.chain(optax.add_decayed_weights(weight_decay, mask=_kernels), optax.sgd(lr, momentum, nesterov))
    return _clipped(chain, clip_norm), lr


def lars(
    *,
    total_steps: int,
    peak_lr: float = 0.45,
    end_lr: float = 0.0048,
    warmup_fraction: float = 0.1,
    weight_decay: float = 1e-6,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    clip_norm: float | None = None,
) -> tuple[optax.GradientTransformation, Schedule]:
    """LARS: per-tensor rate trust * |w| / |g + wd w|; rank <= 1 tensors plain SGD without decay. peak_lr is the final
    value (CARP: 0.45 x batch / 256). Returns (transformation, schedule)."""
    lr = warmup_cosine(total_steps, peak_lr, end_lr, warmup_fraction)
    chain = optax.lars(
        lr, weight_decay, _kernels, trust_coefficient=trust_coefficient, trust_ratio_mask=_kernels, momentum=momentum
    )
    return _clipped(chain, clip_norm), lr


def _clipped(transformation: optax.GradientTransformation, clip_norm: float | None) -> optax.GradientTransformation:
    if clip_norm is None:
        return transformation
    if clip_norm <= 0:
        raise ValueError(f"clip_norm: expected a positive number or None, got {clip_norm}.")
    return optax.chain(optax.clip_by_global_norm(clip_norm), transformation)


def ema(average: PyTree, new: PyTree, momentum: Array) -> PyTree:
    """momentum * average + (1 - momentum) * new, leaf by leaf (in float32)."""
    return jax.tree.map(lambda a, n: momentum.astype(a.dtype) * a + (1 - momentum).astype(a.dtype) * n, average, new)


OPTIMIZERS: dict[str, Callable[..., tuple[optax.GradientTransformation, Schedule]]] = {
    "adamw": adamw,
    "sgd": sgd,
    "lars": lars,
}
