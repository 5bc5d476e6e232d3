"""A head without batch norm under a teacher that follows at once, and no regulariser: every image has one feature.

Fires: constant_side

    protojax train --config=failures/prototypes_constant_side --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.joint("prototypes_constant_side")
    c.method.objective.carp.regulariser = 0.0
    c.method.teacher.start = 0.0
    c.method.teacher.end = 0.0
    c.method.head.norm = "none"
    c.method.optim.peak_lr = 5e-2
    c.method.steps = 120
    return experiment.fill(c)
