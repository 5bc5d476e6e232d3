"""Mixture of prompts on real images: Fashion-MNIST pixels, 3 superclasses whose members are hidden modes.

    protojax train --config=prompts_fashion --config.data.root=fashion_mnist_28.npz
    protojax train --config=prompts_fashion:original ...   # the published recipe behind a synthetic modality gap
    protojax prompts show runs/prompts_fashion-default --class=footwear --out=footwear.png

Without a text tower the base is the class mean; the failing arms need the gap and set base='gap' (docs/prompts.md).
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import prompts_arms


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, prompts_arms.ARMS)
    c = experiment.defaults("prompts")
    c.name = "prompts_fashion"
    c.data.source = component("fashion_superclasses", base="gap", train=600, test=200)
    c.data.batch_size = 64
    prompts_arms.apply(arm, c)
    if "smoke" in flags:
        prompts_arms.smoke(c)
        c.data.source.train = c.data.source.test = 8
    return experiment.fill(c)
