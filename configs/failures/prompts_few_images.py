"""Six images a class for eight sub-prompts. A notice: it is told, and spoils nothing by itself.

Fires: near_empty_class

    protojax train --config=failures/prompts_few_images --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.prompts("few_images", "default", argument)
    c.data.source.train = 6
    c.method.epochs, c.method.steps = 0.0, 64
    return c
