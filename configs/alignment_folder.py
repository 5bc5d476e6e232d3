"""Your pictures with captions: a folder that holds images and captions.csv (path,caption[,split]) or captions.jsonl.

    protojax train --config=alignment_folder --config.data.root=FOLDER --workdir=runs/mine
    protojax train --config=alignment_folder:bpe --config.data.root=FOLDER --workdir=runs/mine
    protojax search runs/mine "a red bicycle"
    protojax search runs/mine photo.jpg --width=64

bpe: a byte-pair tokenizer and a text transformer of ours, trained with the alignment (needs the package tokenizers);
without it captions are read by a frozen tower of hashed words and trigrams, which knows no language.
"""

from ml_collections import ConfigDict

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, alignment_arms.ARMS, ("smoke", "bpe"))
    c = experiment.defaults("alignment")
    c.name = "alignment_folder"
    c.data.source = component("captions", text="bpe" if "bpe" in flags else "hashed")
    c.method.alignment.image_features = "conv"
    c.method.alignment.text_pool = "eos" if "bpe" in flags else "mean"
    c.method.alignment.flip = 0.5
    c.method.epochs = 40.0
    alignment_arms.apply(c, arm)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)
