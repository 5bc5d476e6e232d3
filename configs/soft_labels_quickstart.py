"""Distances to eight services in a synthetic city: predict their distribution, neither one-hot nor constant.

    protojax train --config=soft_labels_quickstart                    # iid; about a minute on two CPU cores
    protojax train --config=soft_labels_quickstart:district           # districts that training never saw
    protojax train --config=soft_labels_quickstart:raw_inputs,seven   # what goes wrong without standardised inputs
    protojax train --config=soft_labels_quickstart:graph              # a star of neighbours around each point
    protojax train --config=soft_labels_quickstart:smoke

Flags: iid (default), district, seven, well_scaled, nasty, graph, large. Arms: protojax/workloads/soft_label_arms.py.
Numbers: docs/results/soft_labels.md.
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import soft_label_arms as arms

FLAGS = ("smoke", "iid", "district", "seven", "well_scaled", "nasty", "graph", "large")


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS, FLAGS)
    c = experiment.defaults("soft_labels")
    c.name = "soft_labels_quickstart"
    preset = next((f for f in ("district", "seven") if f in flags), "iid")
    c.data.source = component(
        "synthetic_city",
        preset=preset,
        scaling="well" if "well_scaled" in flags else "badly",
        nasty="nasty" in flags,
        neighbours=8 if "graph" in flags else 0,
        train_size=8000 if "large" in flags else 1844,
    )
    if "nasty" in flags:
        c.data.impute = "median"
    if "graph" in flags:
        c.method.backbone = component("star_graph")
    if "large" in flags:
        c.method.epochs = 60.0
    arms.apply(c, arm)
    if "smoke" in flags:
        arms.smoke(c)
    return experiment.fill(c)
