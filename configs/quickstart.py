"""Grocery Store photographs (embedded, 64 px): learn without labels, prototypes decoupled from the encoder.

    protojax train --config=quickstart                 # arm decoupled
    protojax train --config=quickstart:joint           # its joint twin
    protojax train --config=quickstart:smoke           # two steps, to see that everything runs

Time and numbers on two CPU cores: docs/results/quickstart.md.
"""

from ml_collections import ConfigDict

from protojax import arms, experiment
from protojax.config import component, defaults, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS)
    c = defaults()
    c.name = "quickstart"
    c.data.source = component("embedded")
    c.data.batch_size = 128
    c.method.steps = 700
    arms.small_images(c, prototypes=512)
    c.evals.every = 0.125
    c.run.checkpoint_every = 0.25
    c.evals.labels = ("fine", "coarse")
    c.evals.groups = "terciles"
    arms.apply(c, arm, flags)
    return experiment.fill(c)
