"""A term without gradient.

    protojax train --config=failures/prompts_entropy_stopped

Fires: dead_term

The cure: configs/prompts_synthetic.py (arm default).
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.prompts("entropy_stopped", "entropy_stopped", argument)
