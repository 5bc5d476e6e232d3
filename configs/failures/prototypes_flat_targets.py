"""A temperature so high that every assignment is uniform: the loss stays at ln(block).

Fires: chance_loss

    protojax train --config=failures/prototypes_flat_targets --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_flat_targets")
    c.method.objective.carp.temperature = 100.0
    return experiment.fill(c)
