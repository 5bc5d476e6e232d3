"""Joint prototypes without a regulariser: encoder and prototypes agree on one of them, and every image chooses it.

Fires: dead_prototypes

    protojax train --config=failures/prototypes_joint --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.joint("prototypes_joint", components=64)
    c.method.objective.carp.regulariser = 0.0
    c.method.optim.peak_lr = 2e-2
    return experiment.fill(c)
