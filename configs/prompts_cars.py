"""Mixture of prompts on Stanford Cars (196 classes, about 33 training images each), from a feature cache.

    protojax train --config=prompts_cars --config.data.root=features_cars.npz
    protojax train --config=prompts_cars:original --config.data.root=features_cars.npz   # the published recipe

The cache (.npz) holds image, label, base, class_names, split and optional level_NAME arrays: docs/prompts.md.
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import prompts_arms


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, prompts_arms.ARMS)
    c = experiment.defaults("prompts")
    c.name = "prompts_cars"
    c.data.source = component("cache", base="text")
    c.data.batch_size = 32
    c.method.prompts.num_prompts = 8
    prompts_arms.apply(arm, c)
    if "smoke" in flags:
        prompts_arms.smoke(c)
        c.method.prompts.num_prompts = 2
    return experiment.fill(c)
