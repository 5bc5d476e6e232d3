"""Image-text alignment on synthetic pairs of known content: a resampler that learns, prefixes that hold.

    protojax train --config=alignment_quickstart                  # arm perceiver
    protojax train --config=alignment_quickstart:direct           # projection and attention pool
    protojax train --config=alignment_quickstart:bos_perceiver    # the published failure: constant text, loss = ln B
    protojax train --config=alignment_quickstart:smoke            # two steps, to see that everything runs

Time and numbers: docs/results/alignment.md. Arms: protojax/alignment_arms.py.
"""

from ml_collections import ConfigDict

from protojax import alignment_arms, experiment
from protojax.config import component, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, alignment_arms.ARMS)
    c = experiment.defaults("alignment")
    c.name = "alignment_quickstart"
    c.data.source = component("synthetic_pairs", preset="standard")
    c.evals.every = 0.0625
    alignment_arms.apply(c, arm)
    if "smoke" in flags:
        alignment_arms.smoke(c)
    return experiment.fill(c)
