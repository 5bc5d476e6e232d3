"""An entropy penalty whose threshold is above the entropy of most targets: it punishes the truth.

Fires: penalty_fights_truth

    protojax train --config=failures/soft_labels_entropy_too_high --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.soft_labels("entropy_too_high", "entropy_too_high", argument)
