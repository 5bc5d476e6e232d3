"""Tiny ImageNet, long-tailed: 100 or 200 classes, imbalance 10, 50 or 100, at 32 px (research use only; docs/data.md).

    protojax train --config=tinyimagenet_lt --config.data.root=tinyimagenet200_32_jpeg.npz     # 100 classes, factor 100
    protojax train --config=tinyimagenet_lt:joint
    protojax train --config=tinyimagenet_lt --config.data.source.subset=lt200_if10
    protojax train --config=tinyimagenet_lt:smoke                                              # synthetic images

Groups by training counts: head > 100, medium 20-100, tail < 20 images a class.
"""

from ml_collections import ConfigDict

from protojax import arms, experiment
from protojax.config import component, defaults, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS)
    c = defaults()
    c.name = "tinyimagenet_lt"
    c.data.source = component("npz", subset="lt100_if100")
    c.data.batch_size = 256
    c.method.epochs = 200.0
    c.method.backbone = component("resnet18", stem="cifar")
    c.method.head = component("carp", hidden=1024, dim=128, normalise=True)
    c.method.views = component("multicrop", global_size=32, local_count=0, blur_sigma=(0.1, 0.5))
    c.method.estimator = component("mixture", components=2048, features="unit")
    c.method.objective = ConfigDict({"carp": {"block": 512, "temperature": 0.1}})
    c.method.optim = component("adamw", peak_lr=2e-3, weight_decay=0.05)
    c.method.teacher.start = 0.99
    arms.apply(c, arm)
    if "smoke" in flags:
        arms.smoke(c)
    return experiment.fill(c)
