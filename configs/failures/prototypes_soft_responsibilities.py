"""Responsibilities so soft that every component sees every image: all means go to the mean of the data.

Fires: duplicate_prototypes

    protojax train --config=failures/prototypes_soft_responsibilities --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures
from protojax.config import component


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_soft_responsibilities")
    c.method.estimator = component(
        "mixture", components=64, features="unit", covariance="spherical", center=False, beta=0.002, eta=0.2
    )
    c.method.steps = 80  # later one of them takes all
    return experiment.fill(c)
