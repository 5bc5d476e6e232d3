"""The arms of the alignment experiments: what differs between them is a line each.

perceiver: a resampler over the image tokens (default). direct: project and attention-pool. shared_resampler: the same
resampler reads the text too. The suspects of the published failure, which are none: latent_std_one, latent_std_width,
attention_pool, batch64, the learning rates, shared_norm. The cause: bos_*. original: all its settings together.
Further failing arms are honest controls.
"""

from __future__ import annotations

import functools

import ml_collections

from protojax.workloads.changes import Change, options, together

_aligner = functools.partial(options, "method.alignment")
_optim = functools.partial(options, "method.optim")


def _preset(name: str) -> Change:
    def change(c: ml_collections.ConfigDict) -> None:
        if c.data.source.name == "synthetic_pairs":
            c.data.source.preset = name

    return change


_BOS = _aligner(text_pool="bos", failing_arm=True)
_DIRECT = _aligner(image_path="direct")
_PREFIX_NONE = _aligner(prefix_mode="none", contrastive_weight=1.0)

ARMS: dict[str, Change] = {
    "perceiver": lambda c: None,
    "direct": _DIRECT,
    "class_token": _aligner(image_path="class_token"),
    "token_mean": _aligner(image_path="token_mean"),
    "mean_text": _aligner(text_pool="mean"),
    "latent_std_one": _aligner(latent_init_std=1.0),
    "latent_std_width": _aligner(latent_init_std=128**-0.5),
    "attention_pool": _aligner(latent_pool="attention"),
    "multihead_pool": _aligner(latent_pool="multihead"),
    "self_attention": _aligner(latent_self_attention=True),
    "shared_norm": _aligner(shared_norm=True),
    "shared_resampler": _aligner(shared_resampler=True),
    "batch64": options("data", batch_size=64),
    "batch256": options("data", batch_size=256),
    "lr_low": _optim(peak_lr=2e-4),
    "lr_middle": _optim(peak_lr=5e-4),
    "lr_half": _optim(peak_lr=1e-3),
    "prefix_single": _aligner(prefix_mode="single"),
    "prefix_sum": _aligner(prefix_mode="sum"),
    "learned_temperature": _aligner(temperature_mode="learned"),
    "sigmoid": _aligner(loss="sigmoid", temperature_mode="learned", temperature=0.1),
    "bos_perceiver": _BOS,
    "bos_direct": together(_BOS, _DIRECT),
    # Ten epochs were planned and thirteen run; the rate, the batch and the shared norm are its own too.
    "original": together(
        _BOS, _aligner(shared_norm=True, prefix_mode="single", text_dropout=0.1, latent_init_std=0.02),
        _optim(peak_lr=2e-4, planned_fraction=10 / 13, clamped=False), options("data", batch_size=128),
    ),
    "bos_batch64": together(_BOS, options("data", batch_size=64)),
    "bos_direct_batch64": together(_BOS, _DIRECT, options("data", batch_size=64)),
    "constant_image": _aligner(constant_image=True),
    "unmasked_mean": together(_aligner(text_pool="unmasked_mean", failing_arm=True), _preset("long")),
    "frozen_resampler": _optim(frozen=("resampler",)),
    "prefix_none": _PREFIX_NONE,
    "prefix_none_lr_middle": together(_PREFIX_NONE, _optim(peak_lr=5e-4)),
    "lr_zero": _optim(peak_lr=0.0),
    "shuffled_pairs": _aligner(shuffled_pairs=True),
    "unclamped_cosine": _optim(planned_fraction=0.5, clamped=False),
}  # fmt: skip


def apply(c: ml_collections.ConfigDict, arm: str) -> None:
    """Changes a filled or unfilled configuration into its arm."""
    c.arm = arm
    ARMS[arm](c)


def smoke(c: ml_collections.ConfigDict) -> None:
    """Two steps on tiny sizes: to see that everything runs."""
    c.name += "_smoke"
    c.method.epochs = 0.0
    c.method.steps = 2
    c.data.batch_size = c.evals.batch_size = 16
    c.evals.every = 1.0
    c.run.checkpoint_every = 1.0
    for name, value in {
        "width": 32, "prefix_dims": (32, 16, 8), "num_latents": 4, "latent_width": 16, "depth": 1, "heads": 2
    }.items():  # fmt: skip
        c.method.alignment[name] = value
    if c.data.source.name == "synthetic_pairs":
        c.data.source.size, c.data.source.test_size = 64, 32
