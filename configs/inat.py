"""iNaturalist 2018 (8,142 species, long-tailed) or 2021: decoupled prototypes where the tail matters.

    protojax train --config=inat --config.data.root=$TFDS_DATA_DIR         # 2018, ResNet-50
    protojax train --config=inat:joint,vit_s16                             # the joint twin on ViT-S/16
    protojax train --config=inat:vit_s16,ibot                              # masked patches beside it
    protojax train --config=inat:2021                                      # iNaturalist 2021
    protojax train --config=inat:folder --config.data.root=/data/inat2018  # root/train/<class>/*.jpg, root/val/...
    protojax train --config=inat:smoke                                     # two steps on synthetic images

Published (ResNet-50, decoupled against joint CARP): +5.7 points on classes of at most 20 images. Not run here.
"""

from ml_collections import ConfigDict

from protojax import arms, experiment
from protojax.config import component, defaults, parse_argument

BATCH, EPOCHS, PROTOTYPES = 1024, 100, 65_536
BACKBONES = {"vit_ti16": "vit_ti", "vit_s16": "vit_s", "vit_b16": "vit_b"}


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS, ("smoke", "ibot", "2021", "folder", *BACKBONES))
    c = defaults()
    c.name = "inat2021" if "2021" in flags else "inat2018"
    c.data.batch_size = BATCH
    c.data.test_split = "val" if "2021" in flags or "folder" in flags else "validation"
    year = "2021" if "2021" in flags else "2018"
    c.data.source = component("image_folder", canvas=256, fit="whole") if "folder" in flags else component(
        f"tfds:i_naturalist{year}", canvas=256, fit="whole"
    )  # fmt: skip
    c.method.epochs = float(EPOCHS)
    arms.published_carp(c, PROTOTYPES)
    for flag, name in BACKBONES.items():
        if flag in flags:
            c.name += f"_{flag}"
            c.method.backbone = component(name, patch_size=16)
            c.method.optim = component("adamw", peak_lr=5e-4 * BATCH / 256, weight_decay=0.05, clip_norm=3.0)
            c.method.teacher.start = 0.996
    arms.apply(c, arm, flags)
    return experiment.fill(c)
