"""The loss reads the shortest prefix alone: what is behind it is noise, and retrieval with it is worse.

Fires: prefix_order

    protojax train --config=failures/alignment_prefix_order --workdir=runs/failure
    protojax doctor runs/failure
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    c = failures.alignment("prefix_order", "perceiver", argument)
    c.method.alignment.contrastive_weight = 0.0
    c.method.alignment.prefix_mode = "sum"
    c.method.alignment.prefix_weights = (0.0, 0.0, 1.0)
    return c
