"""A learning rate of zero over frozen prototypes: what is measured is the initialisation.

Fires: nothing_learned

    protojax train --config=failures/prototypes_nothing_learned --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures
from protojax.config import component


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_nothing_learned")
    c.arm = "frozen"
    c.method.estimator = component("frozen", components=16, features="unit")
    c.method.optim.peak_lr = 0.0
    c.method.steps = 120
    return experiment.fill(c)
