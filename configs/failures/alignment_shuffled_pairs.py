"""Captions shuffled among the training images: the training loss may fall, retrieval stays at its honest chance.

    protojax train --config=failures/alignment_shuffled_pairs

Must fire: chance_retrieval. The cure: configs/alignment_quickstart.py.
"""

from ml_collections import ConfigDict

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument

ARM = "shuffled_pairs"


def get_config(argument: str = "") -> ConfigDict:
    _, flags = parse_argument(argument, (ARM,))
    c = experiment.defaults("alignment")
    c.name = "failure_alignment_shuffled_pairs"
    c.data.source = component("synthetic_pairs", preset="standard")
    c.evals.every = 0.25
    alignment_arms.apply(c, ARM)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)
