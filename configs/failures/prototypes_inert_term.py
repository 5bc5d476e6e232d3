"""A second term with a weight of 1e-14: it is there, and it does nothing.

Fires: inert_term

    protojax train --config=failures/prototypes_inert_term --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures
from protojax.config import component


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_inert_term")
    c.arm = "joint"
    c.method.estimator = component("learned", components=16, features="unit")
    c.method.objective.koleo_proto = ConfigDict({"weight": 1e-14})
    c.method.steps = 60
    return experiment.fill(c)
