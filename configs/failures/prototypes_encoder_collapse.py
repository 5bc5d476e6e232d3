"""Joint prototypes without a regulariser in a wide space: features keep a few of 64 directions.

Fires: encoder_collapse

    protojax train --config=failures/prototypes_encoder_collapse --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.joint("prototypes_encoder_collapse")
    c.method.objective.carp.regulariser = 0.0
    c.method.head.dim = 64
    c.method.optim.peak_lr = 2e-2
    c.method.steps = 80
    return experiment.fill(c)
