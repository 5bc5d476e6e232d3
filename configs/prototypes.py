"""The decoupled default on data sets of different kind, without tuning in between: what the studies train.

    protojax train --config=prototypes                                                          # groceries (embedded)
    protojax train --config=prototypes:omniglot --config.data.root=omniglot901_28.npz           # handwritten characters
    protojax train --config=prototypes:fashion,joint --config.data.root=fashion_mnist_28.npz    # clothes
    protojax train --config=prototypes:tiny,resnet18 --config.data.root=tinyimagenet200_32_jpeg.npz   # on a GPU
    protojax train --config=prototypes:tiny,vit_ti,ibot --config.data.root=tinyimagenet200_32_jpeg.npz
    protojax train --config=prototypes:smoke                                                    # two steps, synthetic

A data set decides what is below in DATA and nothing else; a network (micro for CPUs, resnet18, vit_ti) what
`arms.NETWORKS` says. Files: docs/data.md. Figures: docs/results.
"""

from typing import Any

from ml_collections import ConfigDict

from protojax import arms, experiment
from protojax.config import component, defaults, parse_argument

# K prototypes, batch and steps; how often it is evaluated (large sets: k-NN and audit cost more than training).
DATA: dict[str, dict[str, Any]] = {
    "grocery": {
        "source": component("embedded"), "labels": ("fine", "coarse"), "prototypes": 512, "steps": 700, "every": 0.125,
    },
    "omniglot": {
        # Fifteen of the twenty hands that drew each character are for training: 9,885 images of 659 characters.
        "source": component("npz"), "root": "omniglot901_28.npz", "prototypes": 2048, "steps": 1000, "every": 0.125,
        "splits": ("evaluation[drawer<=15]", "evaluation[drawer>15]"),
    },
    "fashion": {
        "source": component("npz"), "root": "fashion_mnist_28.npz", "prototypes": 4096, "steps": 1000, "every": 0.25,
    },
    "tiny_mini": {
        "source": component("npz"), "root": "tinyimagenet_mini20_32.npz", "prototypes": 512, "steps": 800,
        "every": 0.25,
    },
    "tiny": {
        "source": component("npz"), "root": "tinyimagenet200_32_jpeg.npz", "prototypes": 16_384, "batch_size": 256,
        "steps": 8000, "every": 0.25,
    },
}  # fmt: skip


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS, ("smoke", "ibot", *DATA, *arms.NETWORKS))
    names = {what: [k for k in known if k in flags] for what, known in (("data", DATA), ("network", arms.NETWORKS))}
    for what, given in names.items():
        if len(given) > 1:
            raise ValueError(f"a run has one {what}, but {argument!r} names {given}.")
    name, network = (names["data"] or ["grocery"])[0], (names["network"] or ["micro"])[0]
    found = DATA[name]
    c = defaults()
    c.name = f"prototypes_{name}" + ("" if network == "micro" else f"_{network}")
    c.data.source = found["source"].copy_and_resolve_references()
    c.data.root = found.get("root")
    c.data.train_split, c.data.test_split = found.get("splits", ("train", "test"))
    c.data.batch_size = found.get("batch_size", 128)
    c.method.steps = found["steps"]
    arms.small_images(c, found["prototypes"], network)
    c.evals.every = found["every"]
    c.run.checkpoint_every = 0.25
    c.evals.labels = found.get("labels", ("fine",))
    c.evals.groups = "terciles"
    arms.apply(c, arm, flags)
    return experiment.fill(c)
