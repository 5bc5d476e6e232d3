"""A learning rate of zero: nothing moves.

    protojax train --config=failures/alignment_lr_zero

Fires: milestone

The cure: configs/alignment_quickstart.py.
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.alignment("lr_zero", "lr_zero", argument)
