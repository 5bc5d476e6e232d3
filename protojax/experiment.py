"""Config -> Recipe: the table of workloads, each of which maps its names to code in a file of its own.

`build(config)` checks every name, option and shape that can be checked before anything is compiled. `fill(cfg)` puts
the defaults of every component into a ConfigDict, so that the command line can change any of them.
"""

from __future__ import annotations

import importlib

import ml_collections

from protojax import config as config_lib
from protojax.api import Recipe
from protojax.config import Config, suggest
from protojax.workloads.base import Workload

# Imported when asked for: a workload costs nothing to those who use another.
WORKLOADS: dict[str, str] = {
    name: f"protojax.workloads.{name}" for name in ("prototypes", "soft_labels", "prompts", "alignment")
}


def workload(name: str) -> Workload:
    """The workload `config.method.workload` names. Raises ValueError for an unknown name."""
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}{suggest(name, WORKLOADS)}. Known: {sorted(WORKLOADS)}.")
    return importlib.import_module(WORKLOADS[name]).WORKLOAD


def defaults(name: str = "prototypes") -> ml_collections.ConfigDict:
    """Every key with the default that it has in a workload, for config files to start from."""
    cfg = config_lib.defaults()
    cfg.method.workload = name
    workload(name).begin(cfg)
    return cfg


def fill(cfg: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The ConfigDict with all options of its components at their defaults, locked against new keys."""
    workload(cfg.method.workload).fill(cfg)
    cfg.lock()
    return cfg


def build(config: Config) -> Recipe:
    """The recipe of a configuration. Raises ValueError or TypeError with what was expected, given, and what to do."""
    recipe = workload(config.method.workload).build(config)
    return recipe._replace(micro_batches=config.method.micro_batches)
