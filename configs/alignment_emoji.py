"""Emoji and their names (embedded Noto set): an encoder of ours, trained with the alignment; new concepts in the test.

    protojax train --config=alignment_emoji
    protojax train --config=alignment_emoji:direct
    protojax train --config=alignment_emoji:cross_style --config.data.root=FOLDER   # emoji_*_64.npz of four styles
    protojax train --config=alignment_emoji:cross_style,patches --config.data.root=FOLDER

cross_style: train on Noto, Twemoji and OpenMoji, retrieve in EmojiTwo (all names known). patches: raw pixel patches as
frozen tokens instead of the convolutional tower.
"""

from ml_collections import ConfigDict

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, alignment_arms.ARMS, ("smoke", "cross_style", "patches", "no_flags"))
    c = experiment.defaults("alignment")
    c.name = "alignment_emoji"
    c.data.source = component("emoji_styles" if "cross_style" in flags else "emoji", flags="no_flags" not in flags)
    c.method.alignment.image_features = "patches" if "patches" in flags else "conv"
    c.method.alignment.image_size = 32
    c.method.alignment.text_pool = "mean"
    c.method.epochs = 40.0
    alignment_arms.apply(c, arm)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)
