"""Mixture of prompts on synthetic features whose modes are known: the sets of the acceptance table.

    protojax train --config=prompts_synthetic                      # the default, preset standard
    protojax train --config=prompts_synthetic:original_k8,small    # the published recipe: one winner a class
    protojax train --config=prompts_synthetic:smoke                # two steps, to see that everything runs

Arms and what each shows: docs/prompts.md. Numbers: docs/results/prompts.md.
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import parse_argument
from protojax.data.prompts_synthetic import PRESETS
from protojax.workloads import prompts_arms


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, prompts_arms.ARMS, ("smoke", *PRESETS))
    sets = [name for name in PRESETS if name in flags]
    preset = sets[0] if sets else "standard"
    c = experiment.defaults("prompts")
    c.name = "prompts_synthetic"
    c.data.source.preset = preset
    c.data.batch_size = PRESETS[preset].batch
    c.method.prompts.num_prompts = PRESETS[preset].prompts
    prompts_arms.apply(arm, c)
    if "smoke" in flags:
        prompts_arms.smoke(c)
        c.data.source.classes, c.data.source.train, c.data.source.test = 4, 16, 16
        c.data.source.width = 32
    return experiment.fill(c)
