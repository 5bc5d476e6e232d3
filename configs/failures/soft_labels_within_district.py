"""Raw inputs behind a normalised classifier: predictions tell districts apart, and nothing inside one.

Fires: constant_in_group

    protojax train --config=failures/soft_labels_within_district --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.soft_labels("within_district", "original_s2", argument)
    if c.method.epochs:
        c.method.epochs = 6.0
    return c
