"""What a workload gives to the programs around the loop, and what all of them need to turn names into code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from protojax import optim
from protojax.api import Probe, Recipe, TrainState
from protojax.config import Component, Config, check_options, options_of
from protojax.schedules import make_schedule

# Arguments that the experiment supplies itself: no options of a configuration.
GIVEN = ("inputs", "dtype", "rngs", "engine", "total_steps", "root", "self", "depths", "mask_token")


class Workload(NamedTuple):
    """A family of experiments, as the table in `experiment.py` names it.

    build(config) -> Recipe: every name, option and shape that can be checked is checked here.
    begin(cfg): changes the defaults of every key into those of this workload, for config files to start from.
    fill(cfg): puts the defaults of every component into a ConfigDict, so that the command line can change them.
    summarise(config, result) -> its part of summary.json (result: train.Result). lines(summary) -> for the terminal.
    report_data(config, workdir, probe): writes what the report draws beside numbers (report_data.npz).
    hollow(config, workdir) -> a recipe with the shapes of the run that needs none of its data: what loading wants.
    loaded(recipe, state, config, workdir) -> what `protojax.load` gives.
    begun(config, recipe, workdir): files that belong to the model and must be there before the first step.
    """

    build: Callable[[Config], Recipe]
    begin: Callable[[ml_collections.ConfigDict], None]
    fill: Callable[[ml_collections.ConfigDict], None]
    summarise: Callable[[Config, Any], dict[str, Any]]
    lines: Callable[[Mapping[str, Any]], list[str]]
    report_data: Callable[[Config, Path, Probe], Any]
    hollow: Callable[[Config, Path], Recipe]
    loaded: Callable[[Recipe, TrainState, Config, Path], Any]
    begun: Callable[[Config, Recipe, Path], None] = lambda config, recipe, workdir: None


def part(what: str, component: Component, table: Mapping[str, Callable], **given: Any) -> Any:
    """Call the function behind a component with its options and with what the experiment supplies.

    Raises ValueError or TypeError as `config.check_options` does."""
    options = {k: v for k, v in component.options.items() if k != "weight"}
    function = check_options(what, component.name, table, options, [*given, *GIVEN])
    return function(**options, **given)


def filled(table: Mapping[str, Callable], component: Any) -> ml_collections.ConfigDict:
    """A component of a ConfigDict with every option of the function behind it at its default."""
    component = dict(component)
    out = ml_collections.ConfigDict(component, convert_dict=False)
    if component["name"] not in table:
        return out  # `build` says what is wrong with it
    for name, parameter in options_of(table[component["name"]]).items():
        if name in GIVEN or name in component:
            continue
        if parameter.default is None:
            out[name] = config_dict.placeholder(_optional_type(parameter))
        elif parameter.default is not inspect.Parameter.empty and isinstance(
            parameter.default, bool | int | float | str | tuple
        ):
            out[name] = parameter.default
    return out


def fill_parts(method: ml_collections.ConfigDict, tables: Mapping[str, Mapping[str, Callable]]) -> None:
    """`filled` for several components of one group: key -> table."""
    for name, table in tables.items():
        method[name] = filled(table, method[name])


def fill_objective(method: ml_collections.ConfigDict, table: Mapping[str, Callable]) -> None:
    """The terms of the objective with their options; a term is named after its function unless it gives a name."""
    method.objective = ml_collections.ConfigDict(
        {k: {"weight": 1.0, **filled(table, {**v, "name": v.get("name", k)})} for k, v in method.objective.items()}
    )


def _optional_type(parameter: inspect.Parameter) -> Any:
    """The type of an option that is None by default, from its annotation ('float | None')."""
    names = {"int": int, "float": float, "str": str, "bool": bool}
    words = str(parameter.annotation).replace("|", " ").split()
    return next((names[w] for w in words if w in names), object)


def total_steps(config: Config, size: int) -> int:
    """Steps of the run: as given, or epochs x examples / batch, at least one."""
    method = config.method
    return method.steps or max(1, round((method.epochs or 0) * size / config.data.batch_size))


def optimiser(config: Config, steps: int) -> tuple[Any, Any, float | None]:
    """(transformation, learning-rate schedule, clip_norm) of `config.method.optim`."""
    transformation, rate = part("optimiser", config.method.optim, optim.OPTIMIZERS, total_steps=steps)
    return transformation, rate, config.method.optim.options.get("clip_norm")


def momentum(config: Config, steps: int) -> Any:
    """Schedule of the teacher's EMA coefficient."""
    teacher = config.method.teacher
    shape = (teacher.schedule, teacher.start, teacher.end) if teacher.schedule == "cosine" else teacher.start
    return make_schedule(shape, steps, "momentum")


def input_names(*more: str, estimator: bool = True, teacher: bool = True) -> list[str]:
    """Names of what the step gives to an objective, for `objectives.check_inputs`; `more`: embeddings, head parts."""
    names = ["student", "mask", "batch", "head", "step", "key"]
    names += ["target", "prediction", "estimator"] if estimator else []
    return [*names, *(["teacher"] if teacher else []), *more]
