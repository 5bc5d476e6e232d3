"""Config -> Recipe: the only file that maps names to code.

`build(config)` checks every name, option and shape that can be checked before anything is compiled. `fill(cfg)` puts
the defaults of every component into a ConfigDict, so that the command line can change any of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_dict

from protojax import estimators as estimator_lib
from protojax import objectives as objective_lib
from protojax import optim
from protojax.api import Array, Batch, Encoder, Estimator, EstimatorSpec, Evaluation, Objective, Recipe, Source
from protojax.config import Component, Config, check_options, options_of
from protojax.data import longtail, registry, sampler, views
from protojax.data.records import Records, class_counts, subset
from protojax.evals import detectors, evaluations
from protojax.models.encoder import BACKBONES, make_encoder
from protojax.models.heads import HEADS
from protojax.schedules import make_schedule

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ----------------------------------------------------------------------------------------------------- views
def multicrop(
    global_size: int = 224,
    global_scale: tuple[float, ...] = (0.2, 1.0),
    local_size: int = 96,
    local_scale: tuple[float, ...] = (0.05, 0.2),
    local_count: int = 6,
    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1),
    jitter_probability: float = 0.8,
    grey_probability: float = 0.2,
    blur_probability: tuple[float, ...] = (1.0, 0.1),
    local_blur_probability: float = 0.5,
    blur_sigma: tuple[float, ...] = (0.1, 2.0),
    solarise_probability: tuple[float, ...] = (0.0, 0.2),
    flip: float = 0.5,
) -> tuple[views.ViewSpec, views.ViewSpec | None]:
    """Two global and `local_count` local views with every knob free; the defaults are CARP's."""
    shared: dict[str, Any] = {
        "jitter": tuple(jitter), "jitter_probability": jitter_probability, "grey_probability": grey_probability,
        "flip": flip, "blur_sigma": _pair(blur_sigma),
    }  # fmt: skip
    large = views.ViewSpec(
        global_size, 2, _pair(global_scale), blur_probability=tuple(blur_probability),
        solarise_probability=tuple(solarise_probability), **shared,
    )  # fmt: skip
    if local_count == 0:
        return large, None
    small = views.ViewSpec(
        local_size, local_count, _pair(local_scale), blur_probability=local_blur_probability, **shared
    )
    return large, small


def _pair(values: tuple[float, ...]) -> tuple[float, float]:
    """(low, high) of a config's tuple; ViewSpec checks the order. Raises ValueError for another length."""
    if len(values) != 2:
        raise ValueError(f"views: expected a range (low, high), got {values!r}.")
    return values[0], values[1]


VIEWS: dict[str, Callable[..., tuple[views.ViewSpec, views.ViewSpec | None]]] = {
    "carp": views.CARP_VIEWS,
    "dino": views.DINO_VIEWS,
    "multicrop": multicrop,
}


ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    name: getattr(estimator_lib, name) for name in ("learned", "capi", "mixture", "balanced", "frozen")
}
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    name: getattr(objective_lib, name) for name in ("carp", "dino", "koleo_proto")
}


# ------------------------------------------------------------------------------------------- filling configs
def fill(cfg: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The ConfigDict with all options of its components at their defaults, locked against new keys."""
    method, data = cfg.method, cfg.data
    for name, table in (
        ("backbone", BACKBONES), ("head", HEADS), ("estimator", ESTIMATORS), ("views", VIEWS),
        ("optim", optim.OPTIMIZERS),
    ):  # fmt: skip
        method[name] = _filled(table, method[name])
    method.objective = ml_collections.ConfigDict(
        {
            k: {"weight": 1.0, **_filled(OBJECTIVES, {**v, "name": v.get("name", k)})}
            for k, v in method.objective.items()
        }
    )
    data.source = _filled({data.source.name: registry._opener(data.source.name)[0]}, data.source)
    if data.source.name in registry._NEEDS_ROOT:  # a user's files may come in one piece: docs/data.md
        data.source = ml_collections.ConfigDict({"holdout_fraction": 0.0, "holdout_seed": 0, **data.source})
    cfg.lock()
    return cfg


_GIVEN = ("inputs", "dtype", "rngs", "engine", "total_steps", "root", "self", "depths")


def _filled(table: Mapping[str, Callable], part: Any) -> ml_collections.ConfigDict:
    part = dict(part)
    out = ml_collections.ConfigDict(part, convert_dict=False)
    if part["name"] not in table:
        return out  # `build` says what is wrong with it
    function = table[part["name"]]
    for name, parameter in options_of(function).items():
        if name in _GIVEN or name in part:
            continue
        if parameter.default is None:
            out[name] = config_dict.placeholder(_optional_type(parameter))
        elif parameter.default is not inspect.Parameter.empty and isinstance(
            parameter.default, bool | int | float | str | tuple
        ):
            out[name] = parameter.default
    return out


def _optional_type(parameter: inspect.Parameter) -> Any:
    """The type of an option that is None by default, from its annotation ('float | None')."""
    names = {"int": int, "float": float, "str": str, "bool": bool}
    words = str(parameter.annotation).replace("|", " ").split()
    return next((names[w] for w in words if w in names), object)


# -------------------------------------------------------------------------------------------------- building
def build(config: Config) -> Recipe:
    """The recipe of a configuration. Raises ValueError or TypeError with what was expected, given, and what to do."""
    if config.method.workload not in WORKLOADS:
        check_options("workload", config.method.workload, WORKLOADS, {}, ())
    return WORKLOADS[config.method.workload](config)


def _part(what: str, part: Component, table: Mapping[str, Callable], **given: Any) -> Any:
    """Call the function behind a component with its options and with what the experiment supplies."""
    options = {k: v for k, v in part.options.items() if k != "weight"}
    function = check_options(what, part.name, table, options, [*given, *_GIVEN])
    return function(**options, **given)


def records(config: Config, split: str) -> Records:
    """One split of the configured data set; the training split resampled where config.data.longtail says so."""
    data = config.data
    options = {k: v for k, v in data.source.options.items() if v is not None}
    found = registry.open_records(data.source.name, split, root=data.root, **options)
    tail = data.longtail
    if split == data.train_split and tail.factor > 1:
        label = config.evals.labels[0] if config.evals.labels else "fine"
        if label not in found.labels:
            raise ValueError(f"config.data.longtail needs labels {label!r}; {found.name} has {sorted(found.labels)}.")
        keep = longtail.exponential_longtail(found.labels[label], tail.factor, tail.seed, tail.max_per_class)
        found = subset(found, keep)
    return found


def sources(config: Config) -> dict[str, Source]:
    """'train': endless, shuffled each epoch; 'bank' and 'test': one ordered pass, padded and masked."""
    train, test = records(config, config.data.train_split), records(config, config.data.test_split)
    counts = class_counts(train)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    size = config.evals.batch_size

    def ordered(split: Records) -> Source:
        return sampler.make_source(split, batch_size=size, shuffle=False, remainder="pad", counts=counts, **process)

    return {
        "train": sampler.make_source(
            train, batch_size=config.data.batch_size, seed=config.seed, shuffle=True, remainder="wrap", **process
        ),
        "bank": ordered(train),
        "test": ordered(test),
    }


def images(config: Config) -> Callable[[Any], Any]:
    """indices -> uint8 images of the training split, for the report's pictures."""
    found = records(config, config.data.train_split)
    return lambda indices: found.take(indices)["image"]


def build_prototypes(config: Config) -> Recipe:
    """Prototypical self-supervision: joint, partial and decoupled arms."""
    method = config.method
    found = sources(config)
    dtype = jnp.dtype(method.dtype)
    large, small = _part("views", method.views, VIEWS)
    steps = method.steps or max(1, round((method.epochs or 0) * found["train"].spec.size / config.data.batch_size))
    encoder = _encoder(config, dtype)
    estimator: Estimator = _part("estimator", method.estimator, ESTIMATORS)
    if method.logit_center is not None:
        estimator = estimator_lib.with_logit_center(estimator, method.logit_center, features=reading(config))
    terms = {}
    for name, part in method.objective.items():
        timed = {"total_steps": steps} if "total_steps" in options_of(OBJECTIVES.get(part.name, _evaluations)) else {}
        terms[name] = (part.options.get("weight", 1.0), _part("objective", part, OBJECTIVES, **timed))
        _check_block(name, part, method.estimator)
    objective: Objective = objective_lib.combine(total_steps=steps, **terms)
    objective_lib.check_inputs(objective, _available(estimator))
    optimizer, learning_rate = _part("optimiser", method.optim, optim.OPTIMIZERS, total_steps=steps)
    teacher = method.teacher
    momentum = make_schedule((teacher.schedule, teacher.start, teacher.end) if teacher.schedule == "cosine"
                             else teacher.start, steps, "momentum")  # fmt: skip
    return Recipe(
        sources=found,
        views=views.make_views(large, small, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=dtype, matmul_dtype=dtype),
        teacher_views=views.teacher_views,
        plain_view=lambda batch: views.plain_view(batch, large.size, IMAGENET_MEAN, IMAGENET_STD, dtype=dtype),
        encoder=encoder,
        # key=None: the teacher runs in training mode (its own batch-norm moments) but drops no path.
        teacher=Encoder(encoder.init, lambda v, inputs, train, key: encoder.apply(v, inputs, train, None)),
        estimator=estimator,
        objective=objective,
        rows=teacher_rows,
        optimizer=optimizer,
        schedules={"learning_rate": learning_rate, "momentum": momentum},
        evaluations=_evaluations(config, found),
        describe=estimator_lib.describe,
        diagnose=detectors.Diagnosis(warmup_steps=round(0.1 * steps)),
        total_steps=steps,
        seed=config.seed,
    )


def _check_block(name: str, part: Component, estimator: Component) -> None:
    """The step would say so too, but only after minutes of compiling what comes before it."""
    count, block = estimator.options.get("components"), part.options.get("block")
    if isinstance(count, int) and isinstance(block, int) and (block < 1 or count % block):
        raise ValueError(
            f"config.method.estimator.components must be a multiple of config.method.objective.{name}.block, got K = "
            f"{count} and block = {block}; choose a block that divides {count}."
        )


def reading(config: Config) -> str:
    """How the estimator reads features: 'raw' or 'unit'. Estimators without the option read unit features."""
    part = config.method.estimator
    option = options_of(ESTIMATORS[part.name]).get("features")
    return "unit" if option is None else part.options.get("features", option.default)


def _available(estimator: Estimator) -> list[str]:
    """Names of what the step gives to an objective."""
    spec = EstimatorSpec(dim=8, rows=8, total_steps=1)
    head = jax.eval_shape(lambda: estimator.head(jax.random.key(0), spec))
    names = ["student", "student/image", "teacher", "teacher/image", "target", "prediction", "mask", "batch", "head"]
    return [*names, "step", "key", *(f"head/{name}" for name in head)]


def teacher_rows(embeddings: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
    """Teacher embeddings [V,B,D] -> rows [B*V,D], image by image: with B sharded no row moves."""
    image = jnp.swapaxes(embeddings["image"], 0, 1)
    count, views_, dim = image.shape
    mask = jnp.broadcast_to(batch["mask"][:, None], (count, views_))
    return {"features": image.reshape(count * views_, dim), "mask": mask.reshape(count * views_)}


def _encoder(config: Config, dtype: Any) -> Encoder:
    backbone, head = config.method.backbone, config.method.head
    check_options("backbone", backbone.name, BACKBONES, backbone.options, _GIVEN)
    check_options("head", head.name, HEADS, head.options, _GIVEN)
    clean = [{k: v for k, v in part.options.items() if v is not None} for part in (backbone, head)]
    return make_encoder(backbone.name, head.name, backbone_options=clean[0], head_options=clean[1], dtype=dtype)


def _evaluations(config: Config, found: Mapping[str, Source]) -> tuple[Evaluation, ...]:
    evals = config.evals
    specs = {k: s.spec for k, s in found.items()}
    out = []
    if evals.labels:
        rule = cast(longtail.GroupRule, evals.groups)
        groups = {k: longtail.groups(specs["bank"].counts[k], rule) for k in evals.labels if k in specs["bank"].counts}
        out.append(
            evaluations.knn_evaluation(
                specs, label_keys=evals.labels, ks=evals.knn_k, temperature=evals.knn_temperature, groups=groups
            )
        )
    out.append(evaluations.audit_evaluation(seed=config.seed, reading=reading(config)))
    out.append(evaluations.rank_evaluation())
    return tuple(out)


WORKLOADS: dict[str, Callable[[Config], Recipe]] = {"prototypes": build_prototypes}
