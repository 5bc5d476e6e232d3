"""All image tokens are one token: the image side cannot say anything.

    protojax train --config=failures/alignment_constant_image

Fires: constant_side, chance_loss, chance_retrieval, flat_attention

The cure: configs/alignment_quickstart.py.
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.alignment("constant_image", "constant_image", argument)
