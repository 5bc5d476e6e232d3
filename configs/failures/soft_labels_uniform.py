"""Standardised inputs, but logit norm / temperature = 0.25 allows no probability above 0.157.

Fires: uniform_by_construction

    protojax train --config=failures/soft_labels_uniform
    protojax doctor runs/failures/soft_labels_uniform-tiny_scale
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.soft_labels("uniform", "tiny_scale", argument, preset="iid")
