"""Optimisers against their formulas: who decays, who is scaled, what clips, and where schedules end."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import optim
from protojax.config import options_of

STEPS = 20
PARAMS = {
    "kernel": jnp.asarray([[3.0, -4.0], [0.0, 12.0]]),
    "bias": jnp.asarray([2.0, -1.0]),
    "scale": jnp.asarray(5.0),
}
GRADIENT = {
    "kernel": jnp.asarray([[0.3, 0.0], [-0.4, 1.2]]),
    "bias": jnp.asarray([0.5, 0.25]),
    "scale": jnp.asarray(-2.0),
}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


def updates(name: str, gradients=(GRADIENT,), params=PARAMS, **options):
    """The updates of consecutive gradients at fixed parameters."""
    transformation, _ = optim.OPTIMIZERS[name](total_steps=STEPS, **options)
    state, found = transformation.init(params), []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as the training step does
        for gradient in gradients:
            update, state = transformation.update(gradient, state, params)
            found.append(update)
    return found


CONSTANT = {"peak_lr": 0.5, "end_lr": 0.5, "warmup_fraction": 0.0}  # the rate is 0.5 at every step


# ---------------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_rate_rises_falls_and_is_clamped_after_the_end(name):
    _, rate = optim.OPTIMIZERS[name](total_steps=100, peak_lr=2.0, end_lr=0.5, warmup_fraction=0.1)
    steps = np.arange(101)
    warm, progress = steps / 100 < 0.1, np.clip((steps / 100 - 0.1) / 0.9, 0, 1)
    expected = np.where(warm, 2.0 * steps / 100 / 0.1, 0.5 + 1.5 * 0.5 * (1 + np.cos(np.pi * progress)))
    found = np.asarray([float(rate(jnp.int32(step))) for step in steps])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert [float(rate(jnp.int32(step))) for step in (100, 101, 10_000)] == [0.5] * 3


def test_without_warm_up_the_first_rate_is_the_peak():
    assert float(optim.warmup_cosine(10, 0.3, 0.0, 0.0)(jnp.int32(0))) == pytest.approx(0.3)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_warm_up_outside_the_run_is_refused(fraction):
    with pytest.raises(ValueError, match="0 <= warmup < until <= 1, got warmup"):
        optim.adamw(total_steps=10, warmup_fraction=fraction)


# ------------------------------------------------------------------------------------------------- weight decay
def test_adamw_decays_kernels_only():
    """At zero gradient Adam's step is zero, so the update is decay alone: -rate * decay * w on kernels, 0 elsewhere."""
    (update,) = updates("adamw", (ZERO,), weight_decay=0.1, **CONSTANT)
    np.testing.assert_allclose(update["kernel"], -0.5 * 0.1 * PARAMS["kernel"], rtol=1e-6)
    assert not np.any(update["bias"])
    assert not np.any(update["scale"])


def test_first_step_of_adam_is_the_sign_of_the_gradient():
    """m / (1 - b1) = g and v / (1 - b2) = g^2 after one step: -rate g / (|g| + 1e-8)."""
    (update,) = updates("adamw", weight_decay=0.0, **CONSTANT)
    for name, value in GRADIENT.items():
        np.testing.assert_allclose(update[name], -0.5 * np.sign(value), rtol=1e-5, atol=1e-7)


def test_adamw_decay_follows_its_cosine_to_the_end():
    found = updates("adamw", (ZERO,) * (STEPS + 3), weight_decay=0.04, weight_decay_end=0.4, **CONSTANT)
    decay = [float(-u["kernel"][0, 0] / (0.5 * PARAMS["kernel"][0, 0])) for u in found]
    progress = np.minimum(np.arange(STEPS + 3) / STEPS, 1.0)
    np.testing.assert_allclose(decay, 0.4 + (0.04 - 0.4) * 0.5 * (1 + np.cos(np.pi * progress)), rtol=1e-5)


def test_sgd_is_momentum_on_the_decayed_gradient():
    """v <- 0.9 v + (g + decay w); update = -rate v. No decay on vectors and scalars."""
    first, second = updates("sgd", (GRADIENT, ZERO), weight_decay=0.1, momentum=0.9, **CONSTANT)
    decay = {k: 0.1 * v if v.ndim >= 2 else 0.0 * v for k, v in PARAMS.items()}
    for name, gradient in GRADIENT.items():
        velocity = gradient + decay[name]
        np.testing.assert_allclose(first[name], -0.5 * velocity, rtol=1e-6)
        np.testing.assert_allclose(second[name], -0.5 * (0.9 * velocity + decay[name]), rtol=1e-6)


# --------------------------------------------------------------------------------------------------------- LARS
def test_lars_scales_kernels_by_their_trust_ratio_and_leaves_vectors_alone():
    """Kernel: -rate eta |w| / |g + wd w| (g + wd w). Rank <= 1: plain -rate g, no decay, no ratio (You et al. 2017)."""
    (update,) = updates("lars", weight_decay=0.1, trust_coefficient=0.01, **CONSTANT)
    w, g = np.asarray(PARAMS["kernel"]), np.asarray(GRADIENT["kernel"])
    direction = g + 0.1 * w
    expected = -0.5 * 0.01 * np.linalg.norm(w) / np.linalg.norm(direction) * direction
    np.testing.assert_allclose(update["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(update["bias"], -0.5 * GRADIENT["bias"], rtol=1e-6)
    np.testing.assert_allclose(update["scale"], -0.5 * GRADIENT["scale"], rtol=1e-6)


def test_lars_does_not_see_the_scale_of_a_kernel_gradient_but_that_of_a_vector():
    """Without decay the kernel's step is rate eta |w| g / |g|: multiplying the gradient by 1000 changes nothing."""
    options = {"weight_decay": 0.0, **CONSTANT}
    (small,) = updates("lars", (GRADIENT,), **options)
    (large,) = updates("lars", (jax.tree.map(lambda g: 1000.0 * g, GRADIENT),), **options)
    np.testing.assert_allclose(small["kernel"], large["kernel"], rtol=1e-5)
    assert float(jnp.linalg.norm(small["kernel"])) == pytest.approx(0.5 * 1e-3 * 13.0, rel=1e-5)  # |w| = 13
    np.testing.assert_allclose(1000.0 * small["bias"], large["bias"], rtol=1e-5)


def test_lars_momentum_carries_the_scaled_step():
    first, second = updates("lars", (GRADIENT, ZERO), weight_decay=0.0, momentum=0.9, **CONSTANT)
    for name in GRADIENT:
        np.testing.assert_allclose(second[name], 0.9 * first[name], rtol=1e-5)


# ----------------------------------------------------------------------------------------------------- clipping
def test_clipping_bounds_the_global_norm_and_leaves_smaller_gradients_alone():
    norm = math.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in GRADIENT.values()))
    options = {"weight_decay": 0.0, "momentum": 0.0, **CONSTANT}
    (clipped,) = updates("sgd", clip_norm=1.0, **options)
    (free,) = updates("sgd", clip_norm=2 * norm, **options)
    for name, gradient in GRADIENT.items():
        np.testing.assert_allclose(clipped[name], -0.5 * gradient / norm, rtol=1e-5)
        np.testing.assert_allclose(free[name], -0.5 * gradient, rtol=1e-6)


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_clip_norm_that_is_not_positive_is_refused(name, value):
    with pytest.raises(ValueError, match="clip_norm: expected a positive number or None"):
        optim.OPTIMIZERS[name](total_steps=10, clip_norm=value)


def test_every_optimiser_takes_the_shared_options():
    shared = {"total_steps", "peak_lr", "end_lr", "warmup_fraction", "weight_decay", "clip_norm"}
    assert all(shared <= set(options_of(f)) for f in optim.OPTIMIZERS.values())


# ---------------------------------------------------------------------------------------------------------- EMA
def test_ema_is_a_convex_combination_and_moves_no_leaf_at_momentum_one():
    old, new = PARAMS, GRADIENT
    mixed = optim.ema(old, new, jnp.float32(0.75))
    for name in old:
        np.testing.assert_allclose(mixed[name], 0.75 * old[name] + 0.25 * new[name], rtol=1e-6)
    for momentum, expected in ((1.0, old), (0.0, new)):
        kept = optim.ema(old, new, jnp.float32(momentum))
        assert all(np.array_equal(kept[name], expected[name]) for name in old)
