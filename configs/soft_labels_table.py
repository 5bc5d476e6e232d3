"""Your own table: columns of features, and a distribution (or distances) a row.

    protojax train --config=soft_labels_table --config.data.root=places.csv --workdir=runs/places
    protojax train --config=soft_labels_table --config.data.root=places.parquet --config.data.distance_scale=200.0
    protojax train --config=soft_labels_table --config.data.root=votes.npz --config.data.source.split=random
    protojax predict runs/places --data=new_places.csv
    protojax train --config=soft_labels_table:smoke                                           # synthetic city

Columns target_NAME (rows sum to 1), or distance_NAME with data.distance_scale; optional columns `group` (no group is
split) and `split`; every other column is a feature. docs/soft_labels.md says what is checked and how to tune.
"""

from ml_collections import ConfigDict

from protojax import experiment
from protojax.config import component, parse_argument
from protojax.workloads import soft_label_arms as arms


def get_config(argument: str = "") -> ConfigDict:
    arm, flags = parse_argument(argument, arms.ARMS)
    c = experiment.defaults("soft_labels")
    c.name = "soft_labels_table"
    c.data.source = component("synthetic_city" if "smoke" in flags else "table")
    arms.apply(c, arm)
    if "smoke" in flags:
        arms.smoke(c)
    return experiment.fill(c)
