"""The published recipe: one sub-prompt wins every image of its class and the other seven are idle.

    protojax train --config=failures/prompts_winner_takes_all

Fires: winner_take_all

The cure: configs/prompts_synthetic.py (arm default).
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.prompts("winner_takes_all", "original_k8", argument)
