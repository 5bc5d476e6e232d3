"""Grocery Store photographs (embedded, 64 px): learn without labels, prototypes decoupled from the encoder.

    protojax train --config=quickstart                 # arm decoupled
    protojax train --config=quickstart:joint           # its joint twin
    protojax train --config=quickstart:smoke           # two steps, to see that everything runs

Time and numbers on two CPU cores: docs/results/quickstart.md.
"""

from ml_collections import ConfigDict

from protojax import arms, experiment
from protojax.config import component, defaults, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS)
    c = defaults()
    c.name = "quickstart"
    c.data.source = component("embedded")
    c.data.batch_size = 128
    c.method.steps = 800
    c.method.backbone = component("resnet_micro")
    # Whitened: in so short a run features else contract to 15 of 64 directions, and any codebook that follows them.
    c.method.head = component("carp", hidden=256, dim=64, normalise=True, whiten=5)
    # Colour tells groceries apart: the published hue, grey and solarise would train it away.
    c.method.views = component(
        "multicrop",
        global_size=32,
        local_count=0,
        jitter=(0.4, 0.4, 0.2, 0.02),
        grey_probability=0.0,
        solarise_probability=(0.0, 0.0),
        blur_sigma=(0.1, 0.5),
    )
    # Deterministic annealing: EM starts blunt, with prototypes close together, and is sharp after a tenth of the run.
    c.method.estimator = component(
        "balanced",
        components=512,
        features="unit",
        start_sweeps=10,
        temperature=("exponential", 0.2, 0.01, 0.0, 0.1),
    )
    c.method.objective = ConfigDict({"carp": {"block": 128, "temperature": 0.1}})
    c.method.optim = component("adamw", peak_lr=4e-3, weight_decay=0.05, warmup_fraction=0.1)
    c.method.teacher.start = 0.98
    c.evals.every = 0.125
    c.run.checkpoint_every = 0.25
    c.evals.labels = ("fine", "coarse")
    c.evals.groups = "terciles"
    arms.apply(c, arm)
    if "smoke" in flags:
        arms.smoke(c)
    return experiment.fill(c)
