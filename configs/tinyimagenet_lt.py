"""Tiny ImageNet, long-tailed: 100 or 200 classes, imbalance 10, 50 or 100, at 32 px (research use only; docs/data.md).

    protojax train --config=tinyimagenet_lt --config.data.root=tinyimagenet200_32_jpeg.npz     # 100 classes, factor 100
    protojax train --config=tinyimagenet_lt:joint
    protojax train --config=tinyimagenet_lt --config.data.source.subset=lt200_if10
    protojax train --config=tinyimagenet_lt:micro                        # the small network and 1,500 steps, for CPUs
    protojax train --config=tinyimagenet_lt:smoke                                              # synthetic images

Groups by training counts: head > 100, medium 20-100, tail < 20 images a class.
"""

from ml_collections import ConfigDict

from protojax import arms, experiment
from protojax.config import component, defaults, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS, ("smoke", "micro"))
    c = defaults()
    c.name = "tinyimagenet_lt"
    c.data.source = component("npz", subset="lt100_if100")
    c.data.batch_size = 256
    c.method.epochs = 200.0
    if "micro" in flags:
        c.data.batch_size, c.method.epochs, c.method.steps = 128, None, 1500
    arms.small_images(c, prototypes=2048, network="micro" if "micro" in flags else "resnet18")
    arms.apply(c, arm, flags)
    return experiment.fill(c)
