"""The smallest run that can fail in a chosen way: what the files of configs/failures/ start from.

One a workload, on synthetic data: seconds on a laptop, no data file. As it stands each is healthy, over 20 seeds
(`benchmarks/healthy.py`); a failure config changes a few lines and says in its header which detectors must fire.
"""

from __future__ import annotations

import ml_collections

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument
from protojax.workloads import prompts_arms, soft_label_arms

STEPS = 160


def healthy(name: str) -> ml_collections.ConfigDict:
    """`tiny` as it should be: features are whitened, and there is a prototype for each of the 8 pairs of colours. More
    than the images have kinds would repeat one another."""
    c = tiny(name)
    c.method.head.whiten = 5
    c.method.estimator.components = c.method.objective.carp.block = 8
    return c


def tiny(name: str) -> ml_collections.ConfigDict:
    """Prototypes: a decoupled run of `STEPS` steps on images of 16 pixels and 16 classes, 16 prototypes in 16
    dimensions, with the published head, which lets features contract; not yet filled."""
    c = experiment.defaults()
    c.name = f"failures/{name}"
    c.data.source = component("synthetic", size=512, classes=16, side=16)
    c.data.batch_size = 64
    c.method.steps = STEPS
    c.method.backbone = component("resnet_micro", widths=(4, 8, 16))
    c.method.head = component("carp", hidden=32, dim=16, normalise=True, whiten=0)
    # Two kinds of stripes share their colours, which tell the other kinds apart: hue and grey would train that away.
    c.method.views = component(
        "multicrop", global_size=16, local_count=0, jitter=(0.4, 0.4, 0.0, 0.0), grey_probability=0.0,
        blur_probability=(0.0, 0.0), solarise_probability=(0.0, 0.0),
    )  # fmt: skip
    c.method.estimator = component("balanced", components=16, memory=32)  # as measured: docs/results/doctor.md
    c.method.objective = ml_collections.ConfigDict({"carp": {"block": 16, "temperature": 0.1}})
    c.method.optim = component("adamw", peak_lr=2e-3, weight_decay=0.05, warmup_fraction=0.1)
    c.method.teacher.start = 0.98
    c.evals.labels, c.evals.knn_k, c.evals.every = ("fine",), (1, 5), 0.125
    c.run.log_every, c.run.checkpoint_every, c.run.tensorboard, c.run.progress = 10, 1.0, False, False
    return c


def joint(name: str, components: int = 16) -> ml_collections.ConfigDict:
    """`tiny` with prototypes that learn with the encoder."""
    c = tiny(name)
    c.arm = "joint"
    c.method.estimator = component("learned", components=components, features="unit")
    return c


def prompts(name: str, arm: str = "default", argument: str = "") -> ml_collections.ConfigDict:
    """An arm of the prompts workload on the small synthetic features; `argument` may be 'smoke'. Filled."""
    _, flags = parse_argument(argument, (arm,))
    c = experiment.defaults("prompts")
    c.name = f"failures/prompts_{name}"
    c.data.source.preset = "small"
    c.data.batch_size = 16
    c.evals.every = 0.2
    prompts_arms.apply(arm, c)
    if "smoke" in flags:
        prompts_arms.smoke(c)
        c.data.source.classes, c.data.source.train, c.data.source.test = 4, 32, 16
        c.data.source.width = 32
    return _filled(c)


def alignment(name: str, arm: str = "perceiver", argument: str = "") -> ml_collections.ConfigDict:
    """An arm of the alignment workload on few, easy synthetic pairs; `argument` may be 'smoke'. Filled."""
    _, flags = parse_argument(argument, (arm,))
    c = experiment.defaults("alignment")
    c.name = f"failures/alignment_{name}"
    c.data.source = component("synthetic_pairs", preset="easy", size=2048, test_size=256)
    c.data.batch_size = c.evals.batch_size = 64
    c.method.epochs = 8.0
    sizes = {"width": 64, "prefix_dims": (64, 32, 16), "num_latents": 8, "latent_width": 32, "depth": 1, "heads": 2}
    c.method.alignment = component("aligner", **sizes)
    c.evals.every = 0.125
    alignment_arms.apply(c, arm)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return _filled(c)


def soft_labels(
    name: str, arm: str = "default", argument: str = "", *, preset: str = "iid"
) -> ml_collections.ConfigDict:
    """An arm of the soft-label workload on a preset of the synthetic city; `argument` may be 'smoke'. Filled."""
    _, flags = parse_argument(argument, (arm,))
    c = experiment.defaults("soft_labels")
    c.name = f"failures/soft_labels_{name}"
    c.data.source = component("synthetic_city", preset=preset)
    soft_label_arms.apply(c, arm)
    c.method.epochs = 20.0
    if "smoke" in flags:
        soft_label_arms.smoke(c)
    return _filled(c)


def _filled(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    c.run.tensorboard, c.run.progress, c.run.checkpoint_every = False, False, 1.0
    return experiment.fill(c)
