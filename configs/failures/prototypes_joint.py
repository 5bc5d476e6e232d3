"""Joint prototypes without a regulariser: encoder and prototypes agree on one of them, and every image chooses it.

Fires: dead_prototypes

    protojax train --config=failures/prototypes_joint --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures
from protojax.config import component


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_joint")
    c.arm = "joint"
    c.method.estimator = component("learned", components=64, features="unit")
    c.method.objective.carp.regulariser = 0.0
    c.method.optim.peak_lr = 2e-2
    return experiment.fill(c)
