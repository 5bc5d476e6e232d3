"""The arms of the prompt experiments: what each changes in the default, in one place.

The default has the class-mean-centred E-step, the usage price and the plus-plus start, assigns each image to one
sub-prompt, and has temperatures at which nothing saturates. `original` is the published recipe, which has none of this;
the six published remedies are added to it one at a time.
"""

from __future__ import annotations

import functools

import ml_collections

from protojax.config import suggest
from protojax.workloads.changes import Change, options, together

_set = functools.partial(options, "method.prompts")


def _untrained(c: ml_collections.ConfigDict) -> None:
    """A learning rate at which nothing moves: the control without training, in the same loop."""
    c.method.optim.peak_lr = 1e-12
    c.method.epochs, c.method.steps = 0.0, 2


PUBLISHED_TEMPERATURES = _set(cls_temperature=0.07, tau_end=0.05, hard_assignment=False, usage_half_life=1.0)
ORIGINAL = together(
    PUBLISHED_TEMPERATURES,
    _set(offset_init="normal", offset_std=0.01, e_step_centre="none", balance="none", offset_penalty=1e-3),
)

ARMS: dict[str, Change] = {
    "default": together(),
    # the published recipe, and its remedies one by one
    "original": ORIGINAL,
    "original_k8": together(ORIGINAL, _set(num_prompts=8)),
    "original_k32": together(ORIGINAL, _set(num_prompts=32)),
    "diversity_20": together(ORIGINAL, _set(diversity_weight=20.0)),
    "tau_end_0.3": together(ORIGINAL, _set(tau_end=0.3)),
    "entropy_live": together(ORIGINAL, _set(entropy_weight=1.0)),
    "offset_penalty_0": together(ORIGINAL, _set(offset_penalty=0.0)),
    "orthogonal": together(ORIGINAL, _set(offset_init="orthogonal")),
    "minimum_distance": together(ORIGINAL, _set(diversity_weight=20.0, diversity_form="hinge", diversity_margin=0.5)),
    "original_fixed": together(ORIGINAL, _set(diversity_weight=2.8, tau_end=0.3, entropy_weight=0.01)),
    # failures on purpose
    "entropy_stopped": together(
        ORIGINAL, _set(entropy_weight=1.0, regulariser_gradient="stopped", allow_dead_terms=True)
    ),
    "repository_final": together(
        ORIGINAL,
        _set(diversity_weight=20.0, entropy_weight=8.0, min_usage_weight=15.0, min_usage_threshold=0.1,
             mixture_weight=0.2, tau_start=6.0, tau_end=3.0, regulariser_gradient="stopped", allow_dead_terms=True),
    ),
    "zero_init": together(ORIGINAL, _set(offset_init="zero")),
    "sinkhorn_only": together(ORIGINAL, _set(balance="sinkhorn")),
    "price_100": _set(price=100.0),
    "many_prompts": _set(num_prompts=64),
    "tau_fixed_1": together(ORIGINAL, _set(tau_schedule="constant", tau_start=1.0)),
    "lambda_0": together(ORIGINAL, _set(mixture_weight=0.0)),
    # parts of the cure
    "centre_only": together(ORIGINAL, _set(e_step_centre="class")),
    "centre_global": together(ORIGINAL, _set(e_step_centre="global")),
    "price_only": together(ORIGINAL, _set(balance="price")),
    "plus_plus_only": together(ORIGINAL, _set(offset_init="plus_plus")),
    "centre_price": _set(offset_init="normal"),
    "centre_plus_plus": _set(balance="none"),
    "sinkhorn": _set(balance="sinkhorn"),
    "text_shifted": together(ORIGINAL, options("data.source", base="text_shifted")),
    "class_mean": together(ORIGINAL, options("data.source", base="class_mean")),
    # variants of the default
    "published_temperatures": PUBLISHED_TEMPERATURES,
    "cls_temperature_0.07": _set(cls_temperature=0.07),
    "soft_assignment": _set(hard_assignment=False),
    "hard_from_start": _set(hard_from=0.0),
    "tau_end_0.05": _set(tau_end=0.05),
    "half_life_1": _set(usage_half_life=1.0),
    "lse": _set(cls_pool="lse"),
    "tau_geometric": _set(tau_schedule="geometric"),
    "online_em": together(PUBLISHED_TEMPERATURES, _set(offsets="online_em")),
    # controls
    "uniform_plan": _set(uniform_plan=True, hard_assignment=False),
    "single_prompt": _set(num_prompts=1),
    "random_control": together(ORIGINAL, _untrained),
    "initialised_control": _untrained,
}  # fmt: skip

REMEDIES = ("diversity_20", "tau_end_0.3", "entropy_live", "offset_penalty_0", "orthogonal", "minimum_distance")


def apply(arm: str, cfg: ml_collections.ConfigDict) -> None:
    """Turn a configuration of the default into one of an arm. Raises ValueError for an unknown name."""
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}{suggest(arm, ARMS)}. Known: {list(ARMS)}.")
    cfg.arm = arm
    ARMS[arm](cfg)


def smoke(cfg: ml_collections.ConfigDict) -> None:
    """Two steps of eight examples; how small the data is stays with the config file."""
    cfg.method.epochs, cfg.method.steps = 0.0, 2
    cfg.data.batch_size = 8
    cfg.evals.every = cfg.run.checkpoint_every = 1.0
    cfg.run.steps_per_call = 1
