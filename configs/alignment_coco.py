"""COCO captions by TFDS (`coco_captions`, prepared as ArrayRecord): five captions an image, one drawn each step.

    protojax train --config=alignment_coco --config.data.root=TFDS_DATA_DIR
    protojax train --config=alignment_coco:direct --config.data.root=TFDS_DATA_DIR

An accelerator's configuration: both towers are ours and trained with the alignment, bfloat16. Not run by us on COCO
itself (the set was out of reach): sizes are a starting point.
"""

from ml_collections import ConfigDict

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, alignment_arms.ARMS)
    c = experiment.defaults("alignment")
    c.name = "alignment_coco"
    c.data.source = component("tfds_captions:coco_captions", canvas=144, text="bpe", vocabulary=16000, longest=48)
    c.data.test_split = "val"
    c.data.batch_size = 1024
    c.method.dtype = "bfloat16"
    c.method.epochs = 30.0
    c.method.optim = component("adamw", peak_lr=5e-4, weight_decay=0.05)
    c.method.alignment.image_features = "conv"
    c.method.alignment.image_size = 128
    c.method.alignment.tower_widths = (64, 128, 256, 512)
    c.method.alignment.tower_depths = (0, 2, 2, 2)
    c.method.alignment.crop_scale = (0.5, 1.0)
    c.method.alignment.flip = 0.5
    c.method.alignment.latent_width = 512
    c.method.alignment.num_latents = 32
    c.method.alignment.heads = 8
    c.method.alignment.text_width = 512
    c.method.alignment.text_depth = 6
    c.method.alignment.text_heads = 8
    alignment_arms.apply(c, arm)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)
