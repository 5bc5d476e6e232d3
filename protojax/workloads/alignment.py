"""Image-text alignment: two heads over frozen or small towers, contrastive and nested. Names of its parts -> code."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from protojax import objectives as objective_lib
from protojax.api import EstimatorSpec, Probe, PyTree, Recipe, Source, TrainState
from protojax.config import Config, component
from protojax.data import pairs_registry
from protojax.data.pairs import Pairs, pair_records
from protojax.evals import detectors
from protojax.evals.alignment import alignment_evaluation
from protojax.models.perceiver_aligner import make_aligner
from protojax.objectives.image_text import image_text, prefix_dims_of
from protojax.workloads import alignment_parts as parts
from protojax.workloads import base

ALIGNERS = {"aligner": parts.aligner}
OPTIMIZERS = {"adamw": parts.adamw}


# ------------------------------------------------------------------------------------------------- the recipe
def begin(cfg: ml_collections.ConfigDict) -> None:
    """The defaults of this workload."""
    cfg.arm = "perceiver"
    cfg.method.alignment = component("aligner")
    cfg.method.optim = component("adamw")
    cfg.method.backbone = cfg.method.head = cfg.method.estimator = cfg.method.views = component("none")
    cfg.method.objective = ml_collections.ConfigDict({"image_text": {"name": "image_text"}})
    cfg.method.epochs = 16.0
    cfg.data.source = component("synthetic_pairs")
    cfg.data.batch_size = 128
    cfg.evals.labels = ()
    cfg.evals.evaluations = ("alignment",)
    cfg.evals.every = 0.125


def fill(cfg: ml_collections.ConfigDict) -> None:
    """All options of the components at their defaults. The learning rate goes down as the latents get wider."""
    base.fill_parts(cfg.method, {"alignment": ALIGNERS, "optim": OPTIMIZERS})
    name = cfg.data.source.name
    cfg.data.source = base.filled({name: pairs_registry.opener(name)[0]}, cfg.data.source)


def pairs_of(config: Config, split: str) -> Pairs:
    """One split of the configured pairs; the last few are kept, since captions of a large set take long to read."""
    data = config.data
    options = tuple(sorted((k, v) for k, v in data.source.options.items() if v is not None))
    return _opened(data.source.name, split, data.root, options)


@functools.lru_cache(maxsize=4)
def _opened(name: str, split: str, root: str | None, options: tuple[tuple[str, Any], ...]) -> Pairs:
    return pairs_registry.open_pairs(name, split, root=root, **dict(options))


def settings_of(config: Config) -> dict[str, Any]:
    """`config.method.alignment`, complete and checked. Raises ValueError for what no training could mend."""
    if config.method.alignment is None:
        raise ValueError(
            "config.method.alignment is missing: start the configuration from experiment.defaults('alignment')"
        )
    settings = base.part("aligner", config.method.alignment, ALIGNERS)
    settings["prefix_dims"] = prefix_dims_of(settings["width"], settings["prefix_dims"])
    return settings


def build(config: Config) -> Recipe:
    """The recipe of any arm."""
    settings = settings_of(config)
    train, test = pairs_of(config, config.data.train_split), pairs_of(config, config.data.test_split)
    parts.check_batch(train, config.data.batch_size)
    for pairs in (train, test):
        parts.check_text(pairs, settings)
    parts.check_same_tower(train.texts.fingerprint, test.texts.fingerprint, "training and test texts")
    names = pairs_registry.MORE_SPLITS.get(config.data.source.name, ())
    more = {name: pairs_of(config, name) for name in names}
    if train.factors is not None:
        more["bank"] = train
    pool = parts.text_pool(settings)
    found = {"train": parts.training_source(train, settings, config.data.batch_size, config.seed)}
    for name, pairs in {"test": test, **more}.items():
        found[name] = parts.ordered_source(pair_records(pairs, pool, expanded=True), config.evals.batch_size)
    factors = {name: p.factors for name, p in {"test": test, **more}.items() if p.factors is not None}
    return _recipe(config, settings, train, found, factors)


def _recipe(
    config: Config, settings: dict[str, Any], train: Pairs, found: dict[str, Source], factors: Mapping[str, np.ndarray]
) -> Recipe:
    dtype = jnp.dtype(config.method.dtype)
    steps = config.method.steps or max(1, round((config.method.epochs or 0) * found["train"].spec.steps_per_epoch))
    sides = parts.make_sides(train, settings, dtype)
    head = {key: settings[key] for key in parts.HEAD_KEYS}
    encoder = make_aligner(sides.sizes, width=settings["width"], dtype=dtype, **head, **sides.options)
    objective = image_text(
        **{k: settings[k] for k in parts.LOSS_KEYS}, matmul_dtype=dtype if dtype == jnp.bfloat16 else None
    )
    available = base.input_names("student/image", "student/text", estimator=False, teacher=False)
    objective_lib.check_inputs(objective, available)
    transformation, rate = base.part("optimiser", config.method.optim, OPTIMIZERS, total_steps=steps)
    epochs = steps / found["train"].spec.steps_per_epoch
    evaluation = alignment_evaluation(
        widths=settings["prefix_dims"], temperature=settings["temperature"], batch=config.data.batch_size,
        epochs=epochs, steps=steps, splits=tuple(found), factors=factors,
    )  # fmt: skip
    return Recipe(
        sources=found,
        views=sides.train,
        teacher_views=lambda inputs: inputs,
        plain_view=sides.plain,
        encoder=encoder,
        teacher=None,
        estimator=None,
        objective=objective,
        rows=None,
        optimizer=transformation,
        schedules={"learning_rate": rate},
        evaluations=(evaluation,),
        describe=lambda S: {},
        diagnose=detectors.Diagnosis(warmup_steps=round(0.1 * steps)),
        total_steps=steps,
        seed=config.seed,
        keep=("caption_id", "image_id"),
        spec=EstimatorSpec(dim=settings["width"], rows=config.data.batch_size, total_steps=steps),
        clip_norm=config.method.optim.options.get("clip_norm", 1.0),
        subtrees=subtrees,
    )


def subtrees(params: PyTree) -> dict[str, PyTree]:
    """Named parts whose gradient norm is logged: every leaf of the heads (latents, each layer's query, output,
    feed-forward and norms, keys and values, projections, pools, learned temperature), so that one that never gets a
    gradient is named; the parts of both towers."""
    named: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(getattr(k, "key", k)) for k in path]
        inner = [n for n in names if n not in ("encoder", "head", "objective", "image_head")]
        group = "/".join(inner[:2] if inner[0] in ("tower", "text_tower") else inner)
        named.setdefault(group or "head", {})["/".join(names)] = leaf
    return named


# --------------------------------------------------------------------------------------- around the training
def summarise(config: Config, result: Any) -> dict[str, Any]:
    """The last evaluation, and the same right after initialisation under `controls.initial`."""
    return {**result.final, "controls": {"initial": result.initial.get("alignment")}}


def lines(summary: Mapping[str, Any]) -> list[str]:
    """Retrieval beside chance, prefixes, losses."""
    found = summary.get("alignment") or {}
    if not found:
        return []
    widths = sorted(found["r1"], key=int, reverse=True)
    full, chance = widths[0], found["chance"]
    gallery = found["i2t"][full]["gallery"]
    out = [
        f"  R@1 {100 * found['r1'][full]:.1f}% R@10 {100 * found['r10'][full]:.1f}% of {gallery} (chance "
        f"{100 * chance['1']:.2f}%, {100 * chance['10']:.2f}%), mean of both directions"
    ]
    cells = [f"{d}: {100 * found['r1'][d]:.1f}%" for d in widths]
    out.append("  R@1 by prefix width " + ", ".join(cells))
    loss = found["loss"]
    out.append(f"  held-out loss {loss['contrastive_full']:.4f}, chance {loss['chance']:.4f}")
    for key, what in (("zero_shot", "class texts"), ("zero_shot_names", "class names")):
        if key in found:
            zero = found[key]
            out.append(
                f"  zero-shot by {what} {100 * zero['accuracy'][full]:.1f}% of {zero['classes']} classes "
                f"(chance {100 * zero['chance']:.1f}%)"
            )
    if "matching" in found:
        own = found["matching"]
        out.append(
            f"  true or false: {100 * own['accuracy'][full]:.1f}% of {own['pairs']} pairs (majority "
            f"{100 * own['majority']:.1f}%), AUC {own['auc'][full]:.3f} (chance 0.5)"
        )
    if "factors" in found:
        out.append(f"  known factors: R^2 {found['factors']['r2']:.3f} (nothing known: 0)")
    return out


def report_data(config: Config, workdir: Path, probe: Probe) -> Any:
    """Embeddings of the first test pairs, their captions and pictures, and the latents' attention maps."""
    bank = probe.bank("test")
    test = pairs_of(config, config.data.test_split)
    rows = np.arange(min(len(bank.image), 512))
    arrays: dict[str, np.ndarray] = {
        "image_embedding": bank.image[rows], "text_embedding": np.asarray(bank.extra["text"])[rows],
        "caption_id": np.asarray(bank.extra["caption_id"])[rows],
        "captions": np.asarray([test.texts.captions[i] for i in np.asarray(bank.extra["caption_id"])[rows]]),
    }  # fmt: skip
    if "image" in test.shapes:
        arrays["images"] = test.read(np.asarray(bank.extra["image_id"])[rows])[0]["image"]
    if "attention_map" in bank.extra:
        arrays["attention_map"] = np.asarray(bank.extra["attention_map"])[:16]
    path = workdir / "report_data.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def hollow(config: Config, workdir: Path) -> Recipe:
    """The recipe on the run's own description of its data (`alignment.npz`, written before the first step)."""
    from protojax.workloads.alignment_loading import hollow_recipe

    return hollow_recipe(config, workdir)


def loaded(recipe: Recipe, state: TrainState, config: Config, workdir: Path) -> Any:
    """Both towers as functions: `encode(images)`, `encode_text(captions)`."""
    from protojax.workloads.alignment_loading import AlignedEncode

    return AlignedEncode(recipe, state, config, workdir)


def begun(config: Config, recipe: Recipe, workdir: Path) -> None:
    """What the model needs beside its weights, before the first step."""
    from protojax.workloads.alignment_loading import write_shapes

    write_shapes(config, recipe, workdir)


WORKLOAD = base.Workload(
    build=build,
    begin=begin,
    fill=fill,
    summarise=summarise,
    lines=lines,
    report_data=report_data,
    hollow=hollow,
    loaded=loaded,
    begun=begun,
)
