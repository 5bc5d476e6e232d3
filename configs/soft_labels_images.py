"""Images with label distributions: annotators' votes, or what a trained encoder believes.

    protojax train --config=soft_labels_images --config.data.root=votes.npz
    protojax teach runs/quickstart-decoupled --out=teacher.npz                     # its k-NN votes as targets
    protojax train --config=soft_labels_images --config.data.root=teacher.npz
    protojax train --config=soft_labels_images:siblings                            # embedded photographs
    protojax train --config=soft_labels_images:smoke

The archive: `images` [N,H,W,3] uint8, `targets` [N,C], `split` [N], optional `categories`, `group`.
siblings: half of the target on the class, half spread over its coarse siblings.
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import soft_label_arms as arms


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS, ("smoke", "siblings"))
    c = experiment.defaults("soft_labels")
    c.name = "soft_labels_images"
    c.data.source = component("sibling_images" if {"siblings", "smoke"} & set(flags) else "images")
    c.method.backbone = component("resnet_micro")
    c.method.epochs = 20.0
    arms.apply(c, arm)
    if "smoke" in flags:
        arms.smoke(c)
    return experiment.fill(c)
