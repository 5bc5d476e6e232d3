"""A term without gradient.

    protojax train --config=failures/prompts_entropy_stopped

Must fire: dead_term. The cure: configs/prompts_synthetic.py (arm default).
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import parse_argument
from protojax.workloads import prompts_arms

ARM = "entropy_stopped"


def get_config(argument: str = "") -> ConfigDict:
    _, flags = parse_argument(argument, (ARM,))
    c = experiment.defaults("prompts")
    c.name = "failure_prompts_entropy_stopped"
    c.data.source.preset = "small"
    c.data.batch_size = 16
    prompts_arms.apply(ARM, c)
    if "smoke" in flags:
        c.method.epochs, c.method.steps = 0.0, 2
        c.data.batch_size = 8
        c.data.source.classes, c.data.source.train, c.data.source.test = 4, 32, 16
        c.data.source.width = 32
        c.evals.every = c.run.checkpoint_every = 1.0
        c.run.steps_per_call = 1
    return experiment.fill(c)
