"""A recipe that compiles in seconds: synthetic images, the smallest network, any arm."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import ml_collections

from protojax import configs_path, experiment
from protojax import session as session_lib
from protojax.api import Recipe
from protojax.config import Config, freeze


def config_dict(name: str, argument: str = "") -> ml_collections.ConfigDict:
    """get_config(argument) of a config file, as the command line would load it."""
    spec = importlib.util.spec_from_file_location("a_config", configs_path.find(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def toy_config(arm: str = "decoupled", **changes: Any) -> Config:
    """The quickstart's smoke variant, changed: keys with '__' for dots, as in method__optim__peak_lr=1.0."""
    c = config_dict("quickstart", f"{arm},smoke")
    c.method.steps = 6
    c.method.views.global_size = 16
    c.method.backbone.widths = (4, 8, 8)
    c.method.head.hidden, c.method.head.dim = 16, 8
    c.evals.every, c.run.checkpoint_every = 0.5, 0.5
    c.run.log_every, c.run.progress, c.run.tensorboard, c.run.report = 2, False, False, False
    for key, value in changes.items():
        *path, last = key.split("__")
        at = c
        for part in path:
            at = at[part]
        at[last] = value
    return freeze(c)


def toy_options(config: Config, workdir: pathlib.Path, **changes: Any) -> session_lib.Options:
    from protojax.running import fingerprint

    options = session_lib.Options(
        workdir, config.run, config.system, config.evals.every, fingerprint(config), say=lambda text: None
    )
    return options._replace(**changes)


def toy_recipe(arm: str = "decoupled", **changes: Any) -> Recipe:
    return experiment.build(toy_config(arm, **changes))
