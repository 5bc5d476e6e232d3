"""The arms of the soft-label experiments: failures on purpose, cures, and one arm a published remedy.

`original_*` are settings of the 15-minute-city project on raw inputs (H = 32, dropout 0.5, rate 1e-4, batches of 16).
"""

from __future__ import annotations

import functools

import ml_collections

from protojax.workloads.changes import Change, options, together

_soft = functools.partial(options, "method.soft_label")
_optim = functools.partial(options, "method.optim")
_data = functools.partial(options, "data")


def _original(c: ml_collections.ConfigDict) -> None:
    _soft(width=32, depth=2, dropout=0.5)(c)
    _optim(peak_lr=1e-4, weight_decay=1e-3, clip_norm=None)(c)
    _data(standardise="none", batch_size=16)(c)
    c.method.epochs = 20.0


FIXED = together(
    _soft(label_smoothing=0.15, temperature=4.0, entropy_weight=5.0, entropy_penalty="quadratic", min_entropy=1.5,
          class_weighting="sample"),
    _optim(clip_norm=1.0, final_layer_weight_decay=0.01),
)  # fmt: skip

FAILURES: dict[str, Change] = {
    "original_first": together(
        _original, _soft(temperature=2.0, entropy_weight=2.0, entropy_penalty="linear", min_entropy=1.0)
    ),
    "original_T10": together(
        _original, _soft(temperature=10.0, entropy_weight=2.0, entropy_penalty="linear", min_entropy=1.0)
    ),
    "original_fixed": together(_original, FIXED),
    "original_logitnorm": together(
        _original,
        _soft(
            logit_norm=1.0,
            temperature=4.0,
            maxsup_weight=0.1,
            entropy_weight=0.5,
            min_entropy=0.5,
            allow_dead_terms=True,
        ),
        _optim(clip_norm=1.0, final_layer_weight_decay=0.01),
    ),
    "original_s2": together(_original, _soft(logit_norm=3.0, temperature=1.5)),
    "raw_inputs": _data(standardise="none"),
    "raw_final_norm": together(_data(standardise="none"), _soft(final_norm=True)),
    "tiny_scale": _soft(logit_norm=1.0, temperature=4.0),
    "entropy_too_high": _soft(entropy_weight=10.0, min_entropy=2.0),
    "dead_penalty": _soft(logit_norm=1.5, entropy_weight=5.0, min_entropy=1.5, allow_dead_terms=True),
}
REMEDIES: dict[str, Change] = {
    "smoothing_0.15": _soft(label_smoothing=0.15),
    "smoothing_0.2": _soft(label_smoothing=0.2),
    "smoothing_0.25": _soft(label_smoothing=0.25),
    "temperature_4": _soft(temperature=4.0),
    "temperature_5": _soft(temperature=5.0),
    "temperature_6": _soft(temperature=6.0),
    "linear_2": _soft(entropy_weight=2.0, entropy_penalty="linear"),
    "linear_7": _soft(entropy_weight=7.0, entropy_penalty="linear"),
    "linear_10": _soft(entropy_weight=10.0, entropy_penalty="linear"),
    "quadratic_5": _soft(entropy_weight=5.0),
    "quadratic_7": _soft(entropy_weight=7.0),
    "quadratic_10": _soft(entropy_weight=10.0),
    "min_entropy_1.5": _soft(entropy_weight=5.0, min_entropy=1.5),
    "min_entropy_1.8": _soft(entropy_weight=5.0, min_entropy=1.8),
    "min_entropy_2.0": _soft(entropy_weight=5.0, min_entropy=2.0),
    "clip_none": _optim(clip_norm=None),
    "clip_0.5": _optim(clip_norm=0.5),
    "clip_0.8": _optim(clip_norm=0.8),
    "final_decay_0.01": _optim(final_layer_weight_decay=0.01),
    "final_decay_0.02": _optim(final_layer_weight_decay=0.02),
    "final_decay_0.05": _optim(final_layer_weight_decay=0.05),
    "weights_sample": _soft(class_weighting="sample"),
    "weights_category": _soft(class_weighting="category"),
    "all_six": FIXED,
}
LATER: dict[str, Change] = {
    "logit_norm_6": _soft(logit_norm=6.0),
    "maxsup_0.1": _soft(maxsup_weight=0.1),
    "focal_5": _soft(focal_gamma=5.0),
    "matched_1": _soft(entropy_matched_weight=1.0),
    "spread_1": _soft(spread_weight=1.0),
    "robust": _data(standardise="robust"),
    "rank": _data(standardise="rank"),
    "group_columns_keep": _data(group_columns="keep"),
}
ARMS: dict[str, Change] = {"default": lambda c: None, **FAILURES, **REMEDIES, **LATER}


def apply(c: ml_collections.ConfigDict, arm: str) -> ml_collections.ConfigDict:
    """Turn a default configuration into the arm; sets c.arm."""
    ARMS[arm](c)
    c.arm = arm
    return c


def smoke(c: ml_collections.ConfigDict) -> None:
    """Two steps at the smallest sizes."""
    c.name += "_smoke"
    c.method.epochs, c.method.steps = None, 2
    c.data.batch_size, c.evals.every, c.run.log_every, c.run.steps_per_call = 16, 1.0, 1, 1
    if c.data.source.name == "synthetic_city":
        c.data.source.train_size = 64
