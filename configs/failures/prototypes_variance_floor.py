"""A variance floor above what the features have: every component sits on it.

Fires: variance_floor

    protojax train --config=failures/prototypes_variance_floor --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures
from protojax.config import component


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_variance_floor")
    c.method.estimator = component(
        "mixture", components=16, features="unit", covariance="spherical", variance_floor=1.0
    )
    c.method.steps = 80  # later, components that no image chooses keep the variance of wider days
    return experiment.fill(c)
