"""A learning rate at which nothing moves: what is measured is the initialisation.

Fires: nothing_learned

    protojax train --config=failures/prompts_untrained --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.prompts("untrained", "random_control", argument)
