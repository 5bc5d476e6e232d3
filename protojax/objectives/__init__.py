"""Objectives: what turns embeddings into a scalar. Each function returns an `api.Objective`; `combine` adds them up."""

from protojax.objectives.carp import carp
from protojax.objectives.combine import combine
from protojax.objectives.common import check_inputs, input_names
from protojax.objectives.dino import dino
from protojax.objectives.ibot import ibot
from protojax.objectives.koleo import koleo, koleo_proto
from protojax.objectives.soft_label import soft_label
from protojax.objectives.swav import swav

__all__ = [
    "carp",
    "check_inputs",
    "combine",
    "dino",
    "ibot",
    "input_names",
    "koleo",
    "koleo_proto",
    "soft_label",
    "swav",
]
