"""The recipe of image-text alignment: names of its parts -> code."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from protojax import objectives as objective_lib
from protojax.api import EstimatorSpec, PyTree, Recipe, Source
from protojax.config import Config
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
    return make_recipe(config, settings, train, found, factors)


def make_recipe(
    config: Config, settings: dict[str, Any], train: Pairs, found: dict[str, Source], factors: Mapping[str, np.ndarray]
) -> Recipe:
    """The recipe on these training pairs and sources; `factors`: known content of the splits that have it."""
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
