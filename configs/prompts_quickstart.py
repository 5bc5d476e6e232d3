"""Mixture of prompts on real photographs: the embedded Grocery Store set, 43 coarse classes, 81 fine ones as modes.

    protojax train --config=prompts_quickstart              # K = 8, base = class mean: no download, no text tower
    protojax prompts show runs/prompts_quickstart-default --class=Apple --out=apple.png
    protojax train --config=prompts_quickstart:fine         # 81 fine classes, descriptions, coarse level in the table
    protojax train --config=prompts_quickstart:smoke

Half a minute of one CPU core: top-1 30 % (nearest class mean 18 %, linear probes 24, 26 %), 7.8 of 8 sub-prompts in
use. The features are unit pixels: a floor, good for seeing what sub-prompts claim. A feature cache of a real tower
comes from `protojax embed --weights=FOLDER`, and `data.source = component('cache')` reads it (docs/prompts.md).
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import prompts_arms


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, prompts_arms.ARMS, ("smoke", "fine"))
    c = experiment.defaults("prompts")
    c.name = "prompts_quickstart"
    label, side = ("fine" if "fine" in flags else "coarse"), (8 if "smoke" in flags else 16)
    c.data.source = component("grocery", label=label, base="class_mean", side=side)
    c.data.batch_size = 64
    prompts_arms.apply(arm, c)
    if "smoke" in flags:
        prompts_arms.smoke(c)
        c.method.prompts.num_prompts = 2
    return experiment.fill(c)
