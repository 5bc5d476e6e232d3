"""Configuration: ml_collections files in, frozen and validated dataclasses out.

A config file has `get_config(argument='') -> ConfigDict`, starts from :func:`defaults` and changes keys; the command
line changes more (`--config.data.batch_size=256`). :func:`freeze` turns the result into a :class:`Config` and refuses
unknown keys (with a suggestion), wrong types and values out of range. Nothing past this file sees a ConfigDict.

Groups `method`, `data`, `evals` (and `seed`) change results; `system` and `run` must not, and a test says so.
Pluggable parts are *components*: `{'name': 'mixture', 'prototypes': 512, ...}`; the options of a component are the
keyword arguments of the function that `experiment.py` maps its name to, checked there before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict


@dataclasses.dataclass(frozen=True)
class Component:
    """A name and the keyword arguments for the function behind it."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """EMA of the student. Momentum goes from `start` to `end` over the run: 'cosine' or 'constant'."""

    start: float = 0.99
    end: float = 1.0
    schedule: str = "cosine"


@dataclasses.dataclass(frozen=True)
class Method:
    """What is learned and how. Exactly one of `epochs` and `steps` is set (0 unsets one).

    logit_center: momentum of DINO's centre of the teacher's logits (0.9 there); None: no centre.
    rows: what an estimator is fitted to: 'views', the teacher's features of all global views, or 'plain', those of each
        image once and whole, as evaluations see it.
    products: dtype of the operands of products with prototypes; 'bfloat16' halves their time on accelerators at an
    error
        of about 2^-9 of a cosine, which a temperature of 0.01 turns into 0.2 of a logit. Sums stay float32.
    micro_batches: parts of a batch that are encoded one after another, for memory; exact but for batch norm.
    soft_label, prompts, alignment: the options of those workloads; None elsewhere (`experiment.defaults(workload)`).
    """

    workload: str = "prototypes"
    epochs: float | None = None
    steps: int | None = None
    backbone: Component = Component("resnet18")
    head: Component = Component("carp")
    estimator: Component = Component("mixture")
    objective: Mapping[str, Component] = dataclasses.field(default_factory=lambda: {"carp": Component("carp")})
    views: Component = Component("carp")
    optim: Component = Component("adamw")
    teacher: Teacher = Teacher()
    dtype: str = "float32"
    products: str = "float32"
    logit_center: float | None = None
    rows: str = "views"
    micro_batches: int = 1
    soft_label: Component | None = None
    prompts: Component | None = None
    alignment: Component | None = None


@dataclasses.dataclass(frozen=True)
class LongTail:
    """Exponential resampling of the training split: class at rank r of C keeps n_max * factor^(-r/(C-1)); 1 = off."""

    factor: float = 1.0
    seed: int = 0
    max_per_class: int | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """Where examples come from. batch_size is global. `source` options go to the reader (docs/data.md).

    Tables only (docs/soft_labels.md): standardise 'standard', 'robust', 'rank' or 'none'; group_columns 'auto' (drops
    what is constant within groups where the groups are too few to learn from it) or 'keep'; clip_inputs in standard
    deviations (None: not); heavy_tails 'log' or None; impute 'median' or None. distance_scale: targets are distances d,
    and softmax(-d / distance_scale) is learned; missing_distance stands for an empty cell.
    """

    source: Component = Component("embedded")
    root: str | None = None
    batch_size: int = 128
    train_split: str = "train"
    test_split: str = "test"
    longtail: LongTail = LongTail()
    standardise: str = "standard"
    group_columns: str = "auto"
    clip_inputs: float | None = 8.0
    heavy_tails: str | None = None
    impute: str | None = None
    distance_scale: float | None = None
    missing_distance: float = 2400.0


@dataclasses.dataclass(frozen=True)
class Evals:
    """Evaluations run right after initialisation, then each `every` of the run, then at the end (last checkpoint).

    batch_size: images a forward pass. groups: 'inat' (> 100, 20-100, < 20 training images) or 'terciles'. evaluations:
    names in `evals.table`; those that need labels are left out where `labels` is empty.
    patience: stop when the workload's validation metric has not risen for so many evaluations (None: never).
    calibrate: fit a temperature on the validation split (soft labels).
    """

    every: float = 0.1
    batch_size: int = 256
    knn_k: tuple[int, ...] = (10, 20, 100, 200)
    knn_temperature: float = 0.07
    labels: tuple[str, ...] = ("fine",)
    groups: str = "inat"
    evaluations: tuple[str, ...] = ("knn", "prototypes", "rank")
    patience: int | None = None
    calibrate: bool = True


@dataclasses.dataclass(frozen=True)
class System:
    """Where it runs. data, proto: mesh shape (-1: whatever is left). Must not change results.

    cluster: 'auto', 'one', 'flags', 'slurm', 'openmpi', 'jobset' or 'tpu' (docs/scaling.md); coordinator (HOST:PORT),
    processes and process say it explicitly. join_timeout: seconds to wait for all processes; lost_after: seconds of
    silence after which one counts as lost. workers: processes that read training batches (0: threads of this one).
    fsdp: encoder parameters, their EMA and optimiser state split over devices instead of copied to each.
    """

    data: int = -1
    proto: int = 1
    prefetch: int = 2
    compilation_cache: str = "~/.cache/protojax/jax"
    platform: str | None = None
    cluster: str = "auto"
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    join_timeout: float = 300.0
    lost_after: float = 60.0
    workers: int = 0
    fsdp: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """How it runs. Must not change results. checkpoint_every: fraction of the run. on_finding: 'warn' or 'stop'.

    best: the metric whose best state is kept, its path in an evaluation ('knn/fine/20', higher is better); None: what
    the workload says, '': none. What is reported is the last state in any case. mirror: gs://BUCKET/RUN,
    s3://BUCKET/RUN or a folder: checkpoints and all other files of the workdir are copied there, and a newer copy is
    fetched first.
    """

    log_every: int = 10
    checkpoint_every: float = 0.1
    keep: int = 2
    best: str | None = None
    mirror: str | None = None
    steps_per_call: int = 1
    progress: bool = True
    on_finding: str = "warn"
    tensorboard: bool = True
    wandb: bool = False
    report: bool = True
    profile: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = "run"
    arm: str = "decoupled"
    seed: int = 0
    method: Method = Method()
    data: Data = Data()
    evals: Evals = Evals()
    system: System = System()
    run: Run = Run()


# ----------------------------------------------------------------------------------------- for config files
def defaults() -> ml_collections.ConfigDict:
    """Every key with its default, ready to be changed by a config file or the command line."""
    return _to_dict(Config())


def component(name: str, **options: Any) -> ml_collections.ConfigDict:
    """A component for a config file: `c.method.estimator = component('mixture', prototypes=512)`."""
    return ml_collections.ConfigDict({"name": name, **options}, convert_dict=False)


def parse_argument(argument: str, arms: Iterable[str], flags: Iterable[str] = ("smoke",)) -> tuple[str, set[str]]:
    """Read what follows the colon of `--config=FILE:ARGUMENT`.

    `arm=joint,smoke`, `joint`, `smoke` and `` are all understood. Returns (arm, flags given); the first of `arms` is
    the default. Raises ValueError naming the choices, for two arms, and for a name that means an arm and a flag.
    """
    arms, flags = list(arms), list(flags)
    if both := sorted({*arms} & {*flags}):
        raise ValueError(f"{both} are arms and flags of this config file at once; rename one of the two.")
    arm, given = arms[0], set()
    named: list[str] = []
    for part in filter(None, (p.strip() for p in (argument or "").split(","))):
        name = part.removeprefix("arm=")
        if name in arms:
            arm = name
            named.append(name)
        elif part in flags:
            given.add(part)
        else:
            hint = suggest(name, [*arms, *flags])
            raise ValueError(f"unknown arm or flag {part!r} after the config file{hint}. Arms: {arms}; flags: {flags}.")
    if len(named) > 1:
        raise ValueError(f"a run has one arm, but {argument!r} names {named}.")
    return arm, given


# ------------------------------------------------------------------------------------------------- freezing
def freeze(cfg: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """ConfigDict -> validated Config. Raises ValueError or TypeError naming the key, what was expected and given."""
    plain = cfg.to_dict() if isinstance(cfg, ml_collections.ConfigDict) else dict(cfg)
    config = _convert(Config, plain, "config")
    _validate(config)
    return config


def from_plain(kind: type, plain: Mapping[str, Any], path: str) -> Any:
    """A frozen dataclass `kind` from plain values, with the errors of `freeze`; `path` is what messages call it."""
    return _convert_dataclass(kind, plain, path)


def suggest(name: Any, known: Iterable[str]) -> str:
    """' (did you mean ...?)' or ''."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_options(
    what: str, name: str, table: Mapping[str, Callable], options: Mapping[str, Any], given: Iterable[str]
):
    """The function behind a component, after its options were checked against the function's signature.

    `given` are arguments that the caller supplies itself. Raises ValueError for an unknown name or option (with a
    suggestion) or a missing one, TypeError for a value of another type than the default's.
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}{suggest(name, table)}. Known: {sorted(table)}.")
    allowed = {k: p for k, p in options_of(table[name]).items() if k not in set(given)}
    for key, value in options.items():
        if key not in allowed:
            raise ValueError(
                f"{what} {name!r} has no option {key!r}{suggest(key, allowed)}. Options: {sorted(allowed)}."
            )
        if "Schedule" in str(allowed[key].annotation):
            continue  # a number, tuple or mapping: schedules.make_schedule checks it
        default = allowed[key].default
        if default is not inspect.Parameter.empty and default is not None and value is not None:
            _check_like(f"{what} {name!r} option {key!r}", value, default)
    missing = [k for k, p in allowed.items() if p.default is inspect.Parameter.empty and k not in options]
    if missing:
        raise ValueError(f"{what} {name!r} needs {missing}; got options {sorted(options)}.")
    return table[name]


def options_of(function: Callable) -> dict[str, inspect.Parameter]:
    """name -> parameter of what a component's function takes by keyword.

    Looks through `functools.partial` (its keywords become defaults, its positional arguments are gone), through
    classes (their __init__), and, for functions with **options, at the function that they hand these to: an attribute
    `passes_to` names it.
    """
    if isinstance(function, functools.partial):
        inner = options_of(function.func)
        left = dict(list(inner.items())[len(function.args) :])
        kept = {k: p.replace(default=function.keywords.get(k, p.default)) for k, p in left.items()}
        return kept
    target: Any = function.__init__ if inspect.isclass(function) else function
    own = dict(inspect.signature(target).parameters)
    own.pop("self", None)
    variadic = [k for k, p in own.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for k in variadic:
        own.pop(k)
    return {**options_of(function.passes_to), **own} if hasattr(function, "passes_to") else own


def to_plain(config: Config) -> dict[str, Any]:
    """Config -> nested dict of JSON types (what config.json holds and what `freeze` accepts again)."""

    def walk(value: Any) -> Any:
        if isinstance(value, Component):
            return {"name": value.name, **{k: walk(v) for k, v in value.options.items()}}
        if dataclasses.is_dataclass(value):
            return {f.name: walk(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: walk(v) for k, v in value.items()}
        return [walk(v) for v in value] if isinstance(value, tuple | list) else value

    return walk(config)


def _to_dict(value: Any) -> Any:
    """Dataclass -> ConfigDict; None becomes a placeholder so that the command line can set it."""
    out = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item is None and hints[field.name] == Component | None:
            continue  # options of another workload: a key that is not there
        if isinstance(item, Component):
            out[field.name] = component(item.name, **item.options)
        elif dataclasses.is_dataclass(item):
            out[field.name] = _to_dict(item)
        elif isinstance(item, Mapping):
            out[field.name] = ml_collections.ConfigDict({k: component(v.name, **v.options) for k, v in item.items()})
        elif item is None:
            kind = next(t for t in typing.get_args(hints[field.name]) if t is not type(None))
            out[field.name] = config_dict.placeholder(kind)
        else:
            out[field.name] = item
    return out


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if kind is Component:
        return _convert_component(value, path)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, path)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not value:
            raise TypeError(f"{path}: expected a non-empty mapping of components, got {value!r}.")
        return {k: _convert_component({"name": k, **v}, f"{path}.{k}") for k, v in value.items()}
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise TypeError(f"{path}: expected a tuple of {args[0].__name__}, got {value!r}.")
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    return _scalar(kind, value, path)


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, bool):
        raise TypeError(f"{path}: expected int, got bool {value!r}.")
    if not isinstance(value, kind):
        raise TypeError(f"{path}: expected {kind.__name__}, got {type(value).__name__} {value!r}.")
    return value


def _convert_component(value: Any, path: str) -> Component:
    if not isinstance(value, Mapping) or "name" not in value:
        raise TypeError(f"{path}: expected a component {{'name': ..., options}}, got {value!r}.")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "name"}
    return Component(_scalar(str, value["name"], f"{path}.name"), types.MappingProxyType(options))


def _convert_dataclass(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(f"{path}: expected the keys of {kind.__name__}, got {value!r}.")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise ValueError(f"{path}.{key}: no such key{suggest(key, hints)}. Keys of {path}: {sorted(hints)}.")
    return kind(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in value.items()})


def _check_like(what: str, value: Any, default: Any) -> None:
    kind = type(default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ok = number if kind is float else isinstance(value, tuple | list) if kind is tuple else isinstance(value, kind)
    if kind is int and isinstance(value, bool):
        ok = False
    if not ok:
        raise TypeError(
            f"{what}: expected {kind.__name__} (default {default!r}), got {type(value).__name__} {value!r}."
        )


def _validate(c: Config) -> None:
    def require(ok: bool, path: str, expected: str, given: Any) -> None:
        if not ok:
            raise ValueError(f"config.{path}: expected {expected}, got {given!r}.")

    m, d, e, s, r = c.method, c.data, c.evals, c.system, c.run
    if bool(m.epochs) == bool(m.steps):
        raise ValueError(f"config.method: set exactly one of epochs and steps, got {m.epochs!r} and {m.steps!r}.")
    require(0 <= c.seed < 2**32, "seed", "a number from 0, below 2^32", c.seed)
    require((m.epochs or 0) >= 0, "method.epochs", "a positive number", m.epochs)
    require((m.steps or 0) >= 0, "method.steps", "a positive number", m.steps)
    require(m.micro_batches > 0, "method.micro_batches", "a positive number", m.micro_batches)
    require(m.dtype in ("float32", "bfloat16"), "method.dtype", "'float32' or 'bfloat16'", m.dtype)
    require(0 <= m.teacher.start <= m.teacher.end <= 1, "method.teacher", "0 <= start <= end <= 1", m.teacher)
    require(m.teacher.schedule in ("cosine", "constant"), "method.teacher.schedule", "'cosine' or 'constant'",
            m.teacher.schedule)  # fmt: skip
    require(d.batch_size > 0, "data.batch_size", "a positive number", d.batch_size)
    require(d.longtail.factor >= 1, "data.longtail.factor", "a number >= 1 (1: off)", d.longtail.factor)
    require(0 < e.every <= 1, "evals.every", "a fraction of the run in (0, 1]", e.every)
    require(bool(e.knn_k) and min(e.knn_k) > 0, "evals.knn_k", "positive numbers", e.knn_k)
    require(e.knn_temperature > 0, "evals.knn_temperature", "a positive number", e.knn_temperature)
    require(e.batch_size > 0, "evals.batch_size", "a positive number", e.batch_size)
    require(e.patience is None or e.patience > 0, "evals.patience", "a positive number or None", e.patience)
    require(e.groups in ("inat", "terciles"), "evals.groups", "'inat' or 'terciles'", e.groups)
    require(s.data == -1 or s.data > 0, "system.data", "-1 or a positive number", s.data)
    require(s.proto == -1 or s.proto > 0, "system.proto", "-1 or a positive number", s.proto)
    require(s.prefetch >= 0, "system.prefetch", "a number >= 0", s.prefetch)
    require(r.profile >= 0, "run.profile", "a number of steps >= 0 (0: no trace)", r.profile)
    require(s.workers >= 0, "system.workers", "a number >= 0", s.workers)
    require(s.join_timeout > 0 and s.lost_after > 0, "system", "positive join_timeout and lost_after", s)
    require(r.log_every > 0, "run.log_every", "a positive number", r.log_every)
    require(0 < r.checkpoint_every <= 1, "run.checkpoint_every", "a fraction of the run in (0, 1]", r.checkpoint_every)
    require(r.keep > 0, "run.keep", "a positive number", r.keep)
    require(r.steps_per_call > 0, "run.steps_per_call", "a positive number", r.steps_per_call)
    require(r.on_finding in ("warn", "stop"), "run.on_finding", "'warn' or 'stop'", r.on_finding)
