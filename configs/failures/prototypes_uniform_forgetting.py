"""Uniform forgetting at a high rate: what gets no image forgets until nothing is left.

Fires: statistics_underflow

    protojax train --config=failures/prototypes_uniform_forgetting --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures
from protojax.config import component


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_uniform_forgetting")
    c.method.estimator = component(
        "mixture", components=64, features="unit", covariance="spherical", start="random", center=False,
        forgetting="uniform", eta=0.9,
    )  # fmt: skip
    return experiment.fill(c)
