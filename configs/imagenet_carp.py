"""ImageNet-1k with CARP's published recipe (Silva & Ramirez Rivera 2023), prototypes decoupled (Arteaga et al. 2026).

    protojax train --config=imagenet_carp --config.data.root=$TFDS_DATA_DIR
    protojax train --config=imagenet_carp:joint           # CARP as published
    protojax train --config=imagenet_carp:smoke           # two steps on synthetic images

ResNet-50, K = 65,536 in blocks of 512, two 224 and six 96 px views, LARS 0.45 x batch / 256. Published (joint, linear /
k-NN): 100 epochs 72.5 / 63.5, 400 epochs 75.3 / 67.7; decoupled 69.5 k-NN. Not run here: it takes days of accelerators.
"""

from ml_collections import ConfigDict

from protojax import arms, experiment
from protojax.config import component, defaults, parse_argument

BATCH, EPOCHS, PROTOTYPES = 1024, 100, 65_536


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS)
    c = defaults()
    c.name = "imagenet_carp"
    c.data.source = component("tfds:imagenet2012", canvas=256)
    c.data.batch_size = BATCH
    c.data.test_split = "validation"
    c.method.epochs = float(EPOCHS)
    arms.published_carp(c, PROTOTYPES)
    arms.apply(c, arm, flags)
    return experiment.fill(c)
