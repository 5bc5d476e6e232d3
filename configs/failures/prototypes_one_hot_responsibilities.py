"""Sharp likelihoods on features in one cone, not centred: the first winners take all before the means have moved.

Fires: one_hot_responsibilities

    protojax train --config=failures/prototypes_one_hot_responsibilities --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures
from protojax.config import component


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_one_hot_responsibilities")
    c.method.head.layers = 0  # features of the backbone itself: all lie in one cone
    c.method.estimator = component(
        "mixture",
        components=64,
        features="unit",
        covariance="spherical",
        start="random",
        center=False,
        beta=100.0,
        usage_rate=0.1,
    )
    c.method.steps = 80
    return experiment.fill(c)
