"""Text pooled at position 0 of a causal tower, as in the published failure: every caption is one vector, the loss is
ln B.

    protojax train --config=failures/alignment_bos

Fires: constant_side, chance_loss, chance_retrieval, equal_parts

The cure: configs/alignment_quickstart.py.
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.alignment("bos", "bos_perceiver", argument)
