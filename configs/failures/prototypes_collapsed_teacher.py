"""A teacher that follows the student at once and a loss without its regulariser: every image chooses one prototype.

Fires: dead_prototypes

    protojax train --config=failures/prototypes_collapsed_teacher --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.joint("prototypes_collapsed_teacher", components=64)
    c.method.objective.carp.regulariser = 0.0
    c.method.teacher.start = 0.0
    c.method.teacher.end = 0.0
    c.method.optim.peak_lr = 2e-2
    return experiment.fill(c)
