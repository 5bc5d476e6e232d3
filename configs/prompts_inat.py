"""Mixture of prompts on iNaturalist (10,000 species and their genus, family and order), from a feature cache.

    protojax train --config=prompts_inat --config.data.root=features_inat.npz
    protojax train --config=prompts_inat:original --config.data.root=features_inat.npz   # the published recipe

The cache (.npz) holds image, label, base, class_names, split and optional level_NAME arrays: docs/prompts.md.
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import prompts_arms


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, prompts_arms.ARMS)
    c = experiment.defaults("prompts")
    c.name = "prompts_inat"
    c.data.source = component("cache", base="text")
    c.data.batch_size = 128
    c.method.prompts.num_prompts = 32
    prompts_arms.apply(arm, c)
    if "smoke" in flags:
        prompts_arms.smoke(c)
        c.method.prompts.num_prompts = 2
    return experiment.fill(c)
