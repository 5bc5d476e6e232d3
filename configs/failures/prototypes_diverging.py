"""A learning rate that no network survives.

Fires: not_finite

    protojax train --config=failures/prototypes_diverging --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures
from protojax.config import component


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_diverging")
    c.method.optim = component("sgd", peak_lr=1e30, warmup_fraction=0.0)
    return experiment.fill(c)
