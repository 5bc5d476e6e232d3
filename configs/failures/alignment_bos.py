"""Text pooled at position 0 of a causal tower, as in the published failure: every caption is one vector, the loss is
ln B.

    protojax train --config=failures/alignment_bos

Must fire: constant_side (text), chance_loss, chance_retrieval. The cure: configs/alignment_quickstart.py.
"""

from ml_collections import ConfigDict

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument

ARM = "bos_perceiver"


def get_config(argument: str = "") -> ConfigDict:
    _, flags = parse_argument(argument, (ARM,))
    c = experiment.defaults("alignment")
    c.name = "failure_alignment_bos"
    c.data.source = component("synthetic_pairs", preset="standard")
    c.evals.every = 0.25
    alignment_arms.apply(c, ARM)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)
