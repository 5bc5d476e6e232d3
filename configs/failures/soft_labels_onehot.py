"""Raw inputs: columns of 1e4 beside shares become logits of thousands, and predictions one-hot.

Fires: one_hot, exploding_logits, unscaled_inputs, clamp_ceiling, below_constant

    protojax train --config=failures/soft_labels_onehot
    protojax doctor runs/failures/soft_labels_onehot-original_first
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.soft_labels("onehot", "original_first", argument, preset="seven")
