"""Prototypical self-supervision: joint, partial, decoupled and frozen prototypes. Names of its parts -> code."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections

from protojax import estimators as estimator_lib
from protojax import objectives as objective_lib
from protojax import optim, protocol
from protojax.api import (
    Array,
    Batch,
    Encoder,
    Estimator,
    EstimatorSpec,
    Evaluation,
    Objective,
    Probe,
    PyTree,
    Recipe,
    Source,
    TrainState,
)
from protojax.config import Component, Config, check_options, options_of
from protojax.data import longtail, masking, views
from protojax.evals import detectors, table
from protojax.models.encoder import BACKBONES, make_encoder
from protojax.models.heads import HEADS
from protojax.ops import kernels
from protojax.workloads import base, images
from protojax.workloads.base import GIVEN, part
from protojax.workloads.images import IMAGENET_MEAN, IMAGENET_STD, VIEWS

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    name: getattr(estimator_lib, name)
    for name in (
        *("learned", "capi", "mixture", "balanced", "frozen", "coupled", "queue_sinkhorn", "spherical_kmeans"),
        *("periodic_kmeans", "von_mises_fisher", "variational"),
    )
}
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    name: getattr(objective_lib, name) for name in ("carp", "dino", "ibot", "koleo", "koleo_proto", "swav")
}


# ------------------------------------------------------------------------------------------------- the recipe
def fill(cfg: ml_collections.ConfigDict) -> None:
    """All options of the components at their defaults."""
    tables: dict[str, Mapping[str, Callable]]
    tables = {"backbone": BACKBONES, "head": HEADS, "estimator": ESTIMATORS, "views": VIEWS, "optim": optim.OPTIMIZERS}
    base.fill_parts(cfg.method, tables)
    base.fill_objective(cfg.method, OBJECTIVES)
    images.fill_source(cfg.data)


def build(config: Config) -> Recipe:
    """The recipe of any arm."""
    method = config.method
    found = images.sources(config)
    dtype = jnp.dtype(method.dtype)
    large, small = part("views", method.views, VIEWS)
    steps = base.total_steps(config, found["train"].spec.size)
    hidden = next((c.options for c in method.objective.values() if c.name == "ibot"), None)
    encoder = _encoder(config, dtype, patches=hidden is not None)
    estimator: Estimator = part("estimator", method.estimator, ESTIMATORS)
    if method.logit_center is not None:
        estimator = estimator_lib.with_logit_center(estimator, method.logit_center, features=reading(config))
    terms = {}
    for name, component in method.objective.items():
        known = options_of(OBJECTIVES[component.name]) if component.name in OBJECTIVES else {}
        timed = {"total_steps": steps} if "total_steps" in known else {}
        weight = component.options.get("weight", 1.0)
        terms[name] = (weight, part("objective", component, OBJECTIVES, **timed))
        _check_block(name, component, method.estimator)
    objective: Objective = objective_lib.combine(total_steps=steps, **terms)
    objective_lib.check_inputs(objective, _available(estimator, *(() if hidden is None else ("tokens",))))
    if method.products != "float32":
        estimator, objective = _in_products(estimator, objective, method.products)
    seen = views.make_views(large, small, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=dtype, matmul_dtype=dtype)
    plain = functools.partial(views.plain_view, size=large.size, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=dtype)
    if hidden is not None:
        seen = _with_hidden_patches(seen, config, hidden)
    if _fitted_to_whole_images(config):
        seen = _with_whole_images(seen, plain)
    optimizer, learning_rate, clip_norm = base.optimiser(config, steps)
    return Recipe(
        sources=found,
        views=seen,
        teacher_views=views.teacher_views,
        plain_view=plain,
        encoder=encoder,
        teacher=_teacher(encoder),
        estimator=estimator,
        objective=objective,
        rows=teacher_rows,
        optimizer=optimizer,
        schedules={"learning_rate": learning_rate, "momentum": base.momentum(config, steps)},
        evaluations=_evaluations(config, found),
        describe=estimator_lib.describe,
        diagnose=detectors.Diagnosis(warmup_steps=round(0.1 * steps)),
        total_steps=steps,
        seed=config.seed,
        clip_norm=clip_norm,
    )


def _fitted_to_whole_images(config: Config) -> bool:
    """`method.rows`, checked."""
    rows, name = config.method.rows, config.method.estimator.name
    if rows not in ("views", "plain"):
        raise ValueError(f"config.method.rows: expected 'views' or 'plain', got {rows!r}.")
    if rows == "plain" and name in ("capi", "queue_sinkhorn", "coupled"):
        raise ValueError(
            f"config.method.rows = 'plain': the estimator {name!r} learns from the views that the loss compares, so "
            "its rows must be 'views'."
        )
    return rows == "plain"


def _with_whole_images(made: Callable, plain: Callable) -> Callable:
    """The views with 'plain' [1,B,H,W,3]: each image whole, which the student does not see."""
    return lambda key, batch: {**made(key, batch), "plain": plain(batch)["global"]}


def _teacher(encoder: Encoder) -> Encoder:
    """The encoder as teacher. On views it runs in training mode (batch-norm moments of the batch) but drops no path; on
    whole images, 'plain', as in an evaluation (running moments): where the features lie that a trained model gives."""

    def apply(variables: PyTree, inputs: PyTree, train: bool, key: Any) -> tuple[dict[str, Array], PyTree]:
        seen = {k: v for k, v in inputs.items() if k != "plain"}
        embeddings, stats = encoder.apply(variables, seen, train, None)
        if "plain" in inputs:
            whole, _ = encoder.apply(variables, {"global": inputs["plain"]}, False, None)
            embeddings = {**embeddings, "plain": whole["image"]}
        return embeddings, stats

    return Encoder(encoder.init, apply)


def _in_products(estimator: Estimator, objective: Objective, dtype: str) -> tuple[Estimator, Objective]:
    """Both, with the operands of their products with prototypes in `dtype`."""
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"config.method.products: expected 'float32' or 'bfloat16', got {dtype!r}.")

    def inside(function: Callable | None) -> Any:
        if function is None:
            return None

        def traced(*arguments: Any) -> Any:
            with kernels.products_in(dtype):
                return function(*arguments)

        return traced

    estimator = estimator._replace(**{k: inside(getattr(estimator, k)) for k in ("statistics", "update", "start")})
    return estimator, objective._replace(loss=inside(objective.loss), terms=inside(objective.terms))


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


def _with_hidden_patches(made: Callable, config: Config, options: Mapping[str, Any]) -> Callable:
    """The views with 'masked' [V,B,n]: patches of the global views that the student does not see."""
    known = {k: options.get(k, p.default) for k, p in options_of(OBJECTIVES["ibot"]).items()}
    backbone = config.method.backbone
    size = backbone.options.get("patch_size", options_of(BACKBONES[backbone.name])["patch_size"].default)

    def views_(key: Any, batch: Batch) -> PyTree:
        found = made(key, batch)
        count, images, height, width = found["global"].shape[:4]
        grid = height // size, width // size
        key = jax.random.fold_in(key, zlib.crc32(b"patches"))
        return {
            **found,
            "masked": masking.block_positions(key, count, images, grid, known["ratio"], known["blocks"]),
        }

    return views_


def _available(estimator: Estimator, *embeddings: str) -> list[str]:
    """Names of what the step gives to an objective; embeddings: beside that of the image."""
    spec = EstimatorSpec(dim=8, rows=8, total_steps=1)
    head = jax.eval_shape(lambda: estimator.head(jax.random.key(0), spec))
    sides = [f"{side}/{name}" for side in ("student", "teacher") for name in ("image", *embeddings)]
    return base.input_names(*sides, *(f"head/{name}" for name in head))


def teacher_rows(embeddings: Mapping[str, Array], batch: Batch, head: PyTree = None) -> dict[str, Array]:
    """Teacher embeddings [V,B,D] -> rows [B*V,D], image by image: with B sharded no row moves; of whole images alone
    where there are such. An estimator that shares its prototypes with the optimiser (`coupled`) finds the teacher's
    copy of the offset beside them."""
    image = jnp.swapaxes(embeddings.get("plain", embeddings["image"]), 0, 1)
    count, views_, dim = image.shape
    mask = jnp.broadcast_to(batch["mask"][:, None], (count, views_))
    offset = {k: v for k, v in (head or {}).get("prototypes", {}).items() if k == "offset"}
    return {"features": image.reshape(count * views_, dim), "mask": mask.reshape(count * views_), **offset}


def _encoder(config: Config, dtype: Any, patches: bool = False) -> Encoder:
    backbone, head = config.method.backbone, config.method.head
    check_options("backbone", backbone.name, BACKBONES, backbone.options, GIVEN)
    check_options("head", head.name, HEADS, head.options, GIVEN)
    clean = [{k: v for k, v in part.options.items() if v is not None} for part in (backbone, head)]
    return make_encoder(backbone.name, head.name, backbone_options=clean[0], head_options=clean[1], dtype=dtype,
                        patches=patches)  # fmt: skip


def _evaluations(config: Config, found: Mapping[str, Source]) -> tuple[Evaluation, ...]:
    evals = config.evals
    specs = {k: s.spec for k, s in found.items()}
    rule, counts = cast(longtail.GroupRule, evals.groups), specs["bank"].counts
    groups = {k: longtail.groups(counts[k], rule) for k in evals.labels if k in counts}
    setting = table.Setting(
        specs, evals.labels, groups, evals.knn_k, evals.knn_temperature, config.seed, reading(config)
    )
    return table.make_evaluations({name: {} for name in evals.evaluations}, setting)


# --------------------------------------------------------------------------------------- around the training
def summarise(config: Config, result: Any) -> dict[str, Any]:
    """The last evaluation, and its controls: `untrained_knn` and `initial_unique` (the same evaluations right after
    initialisation), `random_unique` (a random codebook of equal K and D)."""
    final, initial = dict(result.final), dict(result.initial)
    prototypes = dict(final.pop("prototypes", {}) or {})
    controls = {
        **(final.pop("controls", {}) or {}),
        "untrained_knn": initial.get("knn"),
        "untrained_groups": initial.get("groups"),
        "initial_effective_rank": initial.get("effective_rank"),
    }
    return {**final, "prototypes": prototypes, "controls": controls, "protocol": protocol.of_training(config).record()}


def lines(summary: Mapping[str, Any]) -> list[str]:
    """k-NN beside the untrained encoder's, and the audit."""
    out = []
    untrained = summary["controls"].get("untrained_knn") or {}
    for label, values in (summary.get("knn") or {}).items():
        cells = [f"k={k} {100 * v:.1f}% (untrained {100 * untrained.get(label, {}).get(k, float('nan')):.1f}%)"
                 for k, v in values.items() if v is not None]  # fmt: skip
        out.append(f"  k-NN {label}: " + ", ".join(cells))
    p, initial = summary["prototypes"], summary["controls"].get("initial_unique") or {}
    if p:
        count = p["count"]
        out.append(
            f"  prototypes: {p['unique']['0.5']} of {count} unique at 0.5 (at the start {initial.get('0.5')}), "
            f"{p['live']} live, {p['live_unique']['0.025']} live and unique at 0.025, perplexity {p['perplexity']:.0f}"
        )
    return out


def report_data(config: Config, workdir: Path, probe: Probe) -> Any:
    """Prototypes, their similarity and the images nearest to them."""
    from protojax.reporting.data import write_report_data

    return write_report_data(workdir, probe, images.images(config), reading(config))


def hollow(config: Config, workdir: Path) -> Recipe:
    """Shapes of the state depend on the batch and on the views, not on the images that they are cut from."""
    some = Component("synthetic", {"size": 1, "classes": 1, "side": 8})
    data = dataclasses.replace(config.data, source=some, root=None, train_split="train", test_split="test",
                               longtail=type(config.data.longtail)())  # fmt: skip
    return build(dataclasses.replace(config, data=data, evals=dataclasses.replace(config.evals, labels=())))


def loaded(recipe: Recipe, state: TrainState, config: Config, workdir: Path) -> Any:
    """The frozen teacher as a function of images."""
    from protojax.loading import Encode

    return Encode(recipe, state, config)


WORKLOAD = base.Workload(
    build=build,
    begin=lambda cfg: None,
    fill=fill,
    summarise=summarise,
    lines=lines,
    report_data=report_data,
    hollow=hollow,
    loaded=loaded,
)
