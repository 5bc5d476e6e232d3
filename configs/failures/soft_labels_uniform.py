"""Standardised inputs, but logit norm / temperature = 0.25 allows no probability above 0.157.

Must fire: uniform_by_construction.

    protojax train --config=failures/soft_labels_uniform
    protojax doctor runs/failures/soft_labels_uniform-tiny_scale
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import soft_label_arms as arms


def get_config(argument: str = "") -> ConfigDict:
    _, flags = parse_argument(argument, ("tiny_scale",), ("smoke",))
    c = experiment.defaults("soft_labels")
    c.name = "failures/soft_labels_uniform"
    c.data.source = component("synthetic_city", preset="iid")
    arms.apply(c, "tiny_scale")
    c.run.tensorboard, c.run.progress, c.run.checkpoint_every = False, False, 1.0
    if "smoke" in flags:
        arms.smoke(c)
    return experiment.fill(c)
