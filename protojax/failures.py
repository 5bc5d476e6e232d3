"""The smallest run that can fail in a chosen way: what the files of configs/failures/ start from.

Seconds on a laptop, no data file: synthetic images of 16 pixels, the smallest network, a prototype for each of
16 classes in 16 dimensions.
As it stands it is healthy; each failure config changes a line or two and says in its header which detector must fire.
"""

from __future__ import annotations

import ml_collections

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument
from protojax.workloads import prompts_arms, soft_label_arms

STEPS = 160


def tiny(name: str) -> ml_collections.ConfigDict:
    """A decoupled run of `STEPS` steps that is healthy; not yet filled."""
    c = experiment.defaults()
    c.name = f"failures/{name}"
    c.data.source = component("synthetic", size=512, classes=16, side=16)
    c.data.batch_size = 64
    c.method.steps = STEPS
    c.method.backbone = component("resnet_micro", widths=(4, 8, 16))
    c.method.head = component("carp", hidden=32, dim=16, normalise=True)
    c.method.views = component("multicrop", global_size=16, local_count=0, blur_probability=(0.0, 0.0))
    c.method.estimator = component("balanced", components=16)
    c.method.objective = ml_collections.ConfigDict({"carp": {"block": 16, "temperature": 0.1}})
    c.method.optim = component("adamw", peak_lr=2e-3, weight_decay=0.05, warmup_fraction=0.1)
    c.method.teacher.start = 0.98
    c.evals.labels, c.evals.knn_k, c.evals.every = ("fine",), (1, 5), 0.125
    c.run.log_every, c.run.checkpoint_every, c.run.tensorboard, c.run.progress = 10, 1.0, False, False
    return c


def prompts(name: str, arm: str, argument: str) -> ml_collections.ConfigDict:
    """An arm of the prompts workload on the small synthetic features; `argument` may be 'smoke'. Filled."""
    _, flags = parse_argument(argument, (arm,))
    c = experiment.defaults("prompts")
    c.name = f"failure_prompts_{name}"
    c.data.source.preset = "small"
    c.data.batch_size = 16
    prompts_arms.apply(arm, c)
    if "smoke" in flags:
        prompts_arms.smoke(c)
        c.data.source.classes, c.data.source.train, c.data.source.test = 4, 32, 16
        c.data.source.width = 32
    return experiment.fill(c)


def alignment(name: str, arm: str, argument: str) -> ml_collections.ConfigDict:
    """An arm of the alignment workload on the standard synthetic pairs; `argument` may be 'smoke'. Filled."""
    _, flags = parse_argument(argument, (arm,))
    c = experiment.defaults("alignment")
    c.name = f"failure_alignment_{name}"
    c.data.source = component("synthetic_pairs", preset="standard")
    c.evals.every = 0.25
    alignment_arms.apply(c, arm)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)


def soft_labels(name: str, arm: str, preset: str, argument: str) -> ml_collections.ConfigDict:
    """An arm of the soft-label workload on a preset of the synthetic city; `argument` may be 'smoke'. Filled."""
    _, flags = parse_argument(argument, (arm,))
    c = experiment.defaults("soft_labels")
    c.name = f"failures/soft_labels_{name}"
    c.data.source = component("synthetic_city", preset=preset)
    soft_label_arms.apply(c, arm)
    c.run.tensorboard, c.run.progress, c.run.checkpoint_every = False, False, 1.0
    if "smoke" in flags:
        soft_label_arms.smoke(c)
    return experiment.fill(c)
