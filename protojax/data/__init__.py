"""Where images come from: records (random access) -> sources (batches addressed by step). See docs/data.md."""

from protojax.data.longtail import exponential_longtail, groups
from protojax.data.records import Records, class_counts, concatenate, holdout, make_records, restrict, subset
from protojax.data.registry import SPLITS, open_records
from protojax.data.sampler import make_source

__all__ = [
    "SPLITS",
    "Records",
    "class_counts",
    "concatenate",
    "exponential_longtail",
    "groups",
    "holdout",
    "make_records",
    "make_source",
    "open_records",
    "restrict",
    "subset",
]
