"""A second term with a weight of 1e-14: it is there, and it does nothing.

Fires: inert_term

    protojax train --config=failures/prototypes_inert_term --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.joint("prototypes_inert_term")
    c.method.objective.koleo_proto = ConfigDict({"weight": 1e-14})
    c.method.steps = 60
    return experiment.fill(c)
