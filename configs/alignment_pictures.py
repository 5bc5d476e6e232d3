"""Small sets of pictures and texts with an encoder of ours, trained with the alignment: what it can and cannot do.

    protojax train --config=alignment_pictures                                # grocery, embedded
    protojax train --config=alignment_pictures:tiles --config.data.root=dcss_tiles_32.npz
    protojax train --config=alignment_pictures:nlvr --config.data.root=nlvr_50x200.npz
    protojax train --config=alignment_pictures:nlvr,shared_resampler --config.data.root=nlvr_50x200.npz

grocery: photographs and the product description of their class (81 texts): zero-shot classification by class text.
tiles: game tiles and their names, where names repeat; test names are new. nlvr: sentences that are true or false of an
image, trained on true ones: retrieval, and matching with hard negatives. No crop and no colour there, since both
change what is true.
"""

from ml_collections import ConfigDict

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument

SETS = ("grocery", "tiles", "nlvr")


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, alignment_arms.ARMS, ("smoke", *SETS))
    chosen = [name for name in SETS if name in flags] or ["grocery"]
    if len(chosen) > 1:
        raise ValueError(f"alignment_pictures: choose one of {', '.join(SETS)}, got {', '.join(chosen)}")
    c = experiment.defaults("alignment")
    c.name = f"alignment_{chosen[0]}"
    c.data.source = component({"tiles": "pairs_npz"}.get(chosen[0], chosen[0]))
    c.method.alignment.image_features = "conv"
    c.method.alignment.image_size = {"grocery": 64, "tiles": 32, "nlvr": 64}[chosen[0]]
    c.method.alignment.text_pool = "mean"
    if chosen[0] == "grocery":
        c.method.alignment.flip = 0.5
    if chosen[0] == "nlvr":
        c.method.alignment.crop_scale, c.method.alignment.jitter = (1.0, 1.0), (0.0, 0.0, 0.0, 0.0)
    c.method.epochs = 40.0
    alignment_arms.apply(c, arm)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)
