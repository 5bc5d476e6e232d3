"""All sub-prompts begin equal and stay so.

    protojax train --config=failures/prompts_zero_init

Fires: identical_prompts

The cure: configs/prompts_synthetic.py (arm default).
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.prompts("zero_init", "zero_init", argument)
