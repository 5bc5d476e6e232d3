"""The term that reads the encoder has weight 0: only the prototypes get a gradient.

Fires: dead_parameter

    protojax train --config=failures/prototypes_dead_parameter --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.joint("prototypes_dead_parameter")
    c.method.objective.carp.weight = 0.0
    c.method.objective.koleo_proto = ConfigDict({"weight": 1.0})
    c.method.steps = 60
    return experiment.fill(c)
