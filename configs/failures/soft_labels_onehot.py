"""Raw inputs: columns of 1e4 beside shares become logits of thousands, and predictions one-hot.

Must fire: one_hot, exploding_logits, unscaled_inputs.

    protojax train --config=failures/soft_labels_onehot
    protojax doctor runs/failures/soft_labels_onehot-original_first
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import soft_label_arms as arms


def get_config(argument: str = "") -> ConfigDict:
    _, flags = parse_argument(argument, ("original_first",), ("smoke",))
    c = experiment.defaults("soft_labels")
    c.name = "failures/soft_labels_onehot"
    c.data.source = component("synthetic_city", preset="seven")
    arms.apply(c, "original_first")
    c.run.tensorboard, c.run.progress, c.run.checkpoint_every = False, False, 1.0
    if "smoke" in flags:
        arms.smoke(c)
    return experiment.fill(c)
