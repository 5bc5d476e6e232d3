"""Captions shuffled among the training images: the training loss may fall, retrieval stays at its honest chance.

    protojax train --config=failures/alignment_shuffled_pairs

Fires: chance_retrieval

The cure: configs/alignment_quickstart.py.
"""

from ml_collections import ConfigDict

from protojax import failures


def get_config(argument: str = "") -> ConfigDict:
    return failures.alignment("shuffled_pairs", "shuffled_pairs", argument)
