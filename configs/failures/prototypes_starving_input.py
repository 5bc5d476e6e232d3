"""A disk that takes a third of a second for a batch: the device waits.

Fires: starving_input

    protojax train --config=failures/prototypes_starving_input --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import experiment, failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.tiny("prototypes_starving_input")
    c.data.source.size = 128
    c.data.source.delay = 0.3
    c.method.steps = 40
    c.evals.every = 1.0
    c.run.log_every = 5
    return experiment.fill(c)
