"""The published setting of the aligner that stayed at chance: caches of frozen towers, 577 image tokens of width 1,024.

    protojax train --config=alignment_pixmo --config.data.root=cache.npz            # perceiver, end-of-text pooling
    protojax train --config=alignment_pixmo:direct --config.data.root=cache.npz
    protojax train --config=alignment_pixmo:bos_perceiver --config.data.root=cache.npz   # as published: loss = ln B

cache.npz: image_tokens [M,577,1024], text_eos_state, text_mean, text_bos [M,D_text], caption_id, is_test, fingerprint,
causal (docs/alignment.md). The learning rate is 2e-3 x 128 / 1,024.
"""

from ml_collections import ConfigDict

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, alignment_arms.ARMS)
    c = experiment.defaults("alignment")
    c.name = "alignment_pixmo"
    c.data.source = component("pairs_npz")
    c.method.dtype = "bfloat16"
    c.method.epochs = 10.0
    c.method.optim = component("adamw", peak_lr=2.5e-4)
    c.method.alignment.width = 4096
    c.method.alignment.prefix_dims = (4096, 2048, 1024, 512, 256, 128)
    c.method.alignment.num_latents = 64
    c.method.alignment.latent_width = 1024
    c.method.alignment.depth = 4
    c.method.alignment.heads = 8
    c.method.alignment.order = "pool_then_project"
    alignment_arms.apply(c, arm)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)
