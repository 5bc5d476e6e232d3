"""A diversity loss drives vectors apart that own no images.

    protojax train --config=failures/prompts_diversity_20

Fires: diverse_unused

The cure: configs/prompts_synthetic.py (arm default).
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.prompts("diversity_20", "diversity_20", argument)
