"""A mixture that starts from random directions without centring: a few components win every image.

Fires: dead_prototypes

    protojax train --config=failures/prototypes_random_start --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures
from protojax.config import component


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_random_start")
    c.method.estimator = component(
        "mixture", components=64, features="unit", covariance="spherical", start="random", center=False
    )
    return experiment.fill(c)
