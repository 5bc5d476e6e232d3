"""Logit normalisation over raw inputs: one constant, nearly uniform prediction for every place.

Must fire: constant, uniform_by_construction, dead_penalty.

    protojax train --config=failures/soft_labels_constant
    protojax doctor runs/failures/soft_labels_constant-original_logitnorm
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import soft_label_arms as arms


def get_config(argument: str = "") -> ConfigDict:
    _, flags = parse_argument(argument, ("original_logitnorm",), ("smoke",))
    c = experiment.defaults("soft_labels")
    c.name = "failures/soft_labels_constant"
    c.data.source = component("synthetic_city", preset="seven")
    arms.apply(c, "original_logitnorm")
    c.run.tensorboard, c.run.progress, c.run.checkpoint_every = False, False, 1.0
    if "smoke" in flags:
        arms.smoke(c)
    return experiment.fill(c)
