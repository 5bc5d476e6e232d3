"""Fashion-MNIST images as places: the distribution of nearest-class distances, from 49 coarse cells of a picture.

    protojax train --config=soft_labels_fashion --config.data.root=fashion_mnist_28.npz
    protojax train --config=soft_labels_fashion:well_scaled --config.data.root=fashion_mnist_28.npz
    protojax train --config=soft_labels_fashion:images --config.data.root=fashion_mnist_28.npz
    protojax train --config=soft_labels_fashion:smoke                                             # synthetic city

Two columns around 1e4 and 2e4 are added unless well_scaled. The archive: docs/data.md. Numbers:
docs/results/soft_labels.md.
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import soft_label_arms as arms


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS, ("smoke", "well_scaled", "images"))
    c = experiment.defaults("soft_labels")
    c.name = "soft_labels_fashion"
    scaling = "well" if "well_scaled" in flags else "badly"
    c.data.source = component("class_distances", scaling=scaling, pixels="images" in flags)
    if "images" in flags:
        c.method.backbone = component("resnet_micro")
    if "smoke" in flags:
        c.data.source = component("synthetic_city")
        c.method.backbone = component("mlp")
    arms.apply(c, arm)
    if "smoke" in flags:
        arms.smoke(c)
    return experiment.fill(c)
