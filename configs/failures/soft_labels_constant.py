"""Logit normalisation over raw inputs: one constant, nearly uniform prediction for every place.

Fires: constant, uniform_by_construction, dead_penalty

    protojax train --config=failures/soft_labels_constant
    protojax doctor runs/failures/soft_labels_constant-original_logitnorm
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.soft_labels("constant", "original_logitnorm", argument, preset="seven")
