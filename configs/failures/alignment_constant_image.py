"""All image tokens are one token: the image side cannot say anything.

    protojax train --config=failures/alignment_constant_image

Must fire: constant_side (image), chance_loss, chance_retrieval. The cure: configs/alignment_quickstart.py.
"""

from ml_collections import ConfigDict

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument

ARM = "constant_image"


def get_config(argument: str = "") -> ConfigDict:
    _, flags = parse_argument(argument, (ARM,))
    c = experiment.defaults("alignment")
    c.name = "failure_alignment_constant_image"
    c.data.source = component("synthetic_pairs", preset="standard")
    c.evals.every = 0.25
    alignment_arms.apply(c, ARM)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)
