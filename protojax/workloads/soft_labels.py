"""Classifiers of label distributions: names of their parts -> code, and what surrounds a run (docs/soft_labels.md)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from protojax import objectives as objective_lib
from protojax import optim
from protojax.api import Batch, Encoder, Objective, Probe, PyTree, Recipe, Source, Stopping
from protojax.config import Component, Config, check_options, component, options_of
from protojax.data import soft_labels as data_lib
from protojax.data import tables, views
from protojax.data.tables import Preparation, Table
from protojax.evals import detectors
from protojax.evals import soft_labels as evals_lib
from protojax.models.encoder import BACKBONES
from protojax.models.mlp import MLP, StarGraph, soft_label_encoder
from protojax.objectives.soft_label import sample_weights, soft_label
from protojax.ops import simplex
from protojax.predicting import Predict
from protojax.schedules import check_choice
from protojax.workloads import base, table_description
from protojax.workloads.images import IMAGENET_MEAN, IMAGENET_STD
from protojax.workloads.soft_label_views import VIEWS

logger = logging.getLogger(__name__)
TRUNKS: dict[str, Callable[..., Any]] = {"mlp": MLP, "star_graph": StarGraph, **BACKBONES}
GROUP_COLUMNS = ("auto", "keep")
WIDE = 100.0  # ratio of the widest raw column to the median one from which raw inputs are warned of


@dataclasses.dataclass(frozen=True)
class Options:
    """`config.method.soft_label`: every knob of network and loss but the optimiser's. See docs/soft_labels.md.

    min_entropy None: the 5th percentile of the training targets' entropies. init_bias: 'zero', or 'log_mean_target':
    the first prediction is the best constant.
    """

    width: int = 128
    depth: int = 2
    dropout: float = 0.2
    heads: int = 4
    temperature: float = 1.0
    logit_norm: float | None = None
    final_norm: bool = False
    init_bias: str = "zero"
    label_smoothing: float = 0.0
    entropy_weight: float = 0.0
    entropy_penalty: str = "quadratic"
    min_entropy: float | None = None
    maxsup_weight: float = 0.0
    maxsup_threshold: float | None = None
    focal_gamma: float = 0.0
    class_weighting: str = "none"
    entropy_matched_weight: float = 0.0
    spread_weight: float = 0.0
    allow_dead_terms: bool = False


OPTIONS: dict[str, Callable[..., Options]] = {"soft_label": Options}
OPEN: dict[str, Callable[..., dict[str, Table]]] = data_lib.SOURCES
_FROM_DATA = ("root", "distance_scale", "missing_distance")  # options of readers that stand in config.data


# --------------------------------------------------------------------------------------------------- the config
def begin(cfg: ml_collections.ConfigDict) -> None:
    """Defaults of the spec: width 128, AdamW 3e-3, 100 epochs, batches of 64, standardised inputs."""
    cfg.name = "soft_labels"
    cfg.arm = "default"
    m = cfg.method
    m.epochs = 100.0
    m.backbone, m.head, m.estimator = component("mlp"), component("none"), component("none")
    m.views = component("identity")
    m.objective = ml_collections.ConfigDict({"soft_label": {"weight": 1.0}})
    m.soft_label = component("soft_label")
    m.optim = component("adamw", peak_lr=3e-3, weight_decay=0.05, clip_norm=1.0)
    cfg.data.source = component("synthetic_city")
    cfg.data.batch_size = 64
    cfg.evals.every = 0.05
    cfg.evals.batch_size = 512
    cfg.evals.labels = ()
    cfg.run.log_every = 100
    cfg.run.steps_per_call = 16


def fill(cfg: ml_collections.ConfigDict) -> None:
    """All options of the components at their defaults."""
    parts: dict[str, Mapping[str, Callable]]
    parts = {"optim": optim.OPTIMIZERS, "soft_label": OPTIONS, "views": VIEWS}
    if cfg.method.backbone.name in BACKBONES:
        parts["backbone"] = BACKBONES
    base.fill_parts(cfg.method, parts)
    cfg.data.source = base.filled(OPEN, cfg.data.source)
    for key in _FROM_DATA:
        if key in cfg.data.source:
            del cfg.data.source[key]


def open_splits(config: Config) -> dict[str, Table]:
    """'train', 'val', 'test' of the configured set. Raises ValueError for an unknown name, option or a missing root."""
    source, data = config.data.source, config.data
    known = options_of(OPEN[source.name]) if source.name in OPEN else {}
    own = {"root": data.root, "distance_scale": data.distance_scale, "missing_distance": data.missing_distance}
    given = {k: v for k, v in own.items() if k in known}
    if data.root is None and "root" in known and known["root"].default is known["root"].empty:
        raise ValueError(f"data set {source.name!r} needs data.root, the path of your file.")
    options = {k: v for k, v in source.options.items() if v is not None}
    return base.part("data set", Component(source.name, options), OPEN, **given)


def options(config: Config) -> Options:
    """The checked options of `config.method.soft_label`."""
    return base.part("method.soft_label", config.method.soft_label or Component("soft_label"), OPTIONS)


# --------------------------------------------------------------------------------------------------- the recipe
def build(config: Config) -> Recipe:
    """The recipe of any arm, from data."""
    splits = open_splits(config)
    return assemble(config, splits, prepare(config, splits))


def prepare(config: Config, splits: Mapping[str, Table]) -> Preparation | None:
    """Statistics of the training columns (None: there are none, only images). What is only known a group is judged by
    `data.group_columns` where the test groups are new ones."""
    train, data = splits["train"], config.data
    check_choice("data.group_columns", data.group_columns, GROUP_COLUMNS)
    if not train.columns:
        return None
    new = not np.intersect1d(train.group, splits["test"].group).size
    judged = data.group_columns == "auto" and data.standardise != "none" and new
    preparation = tables.fit_preparation(
        train.columns, standardise=data.standardise, clip=data.clip_inputs, heavy_tails=data.heavy_tails,
        impute=data.impute, groups=train.group if judged else None,
    )  # fmt: skip
    stds = np.asarray(list(preparation.std.values()) or [1.0])
    ratio = float(np.max(stds)) / max(float(np.median(stds)), 1e-12)
    if data.standardise == "none" and ratio > WIDE and config.arm == "default":
        widest = max(preparation.std, key=lambda name: preparation.std[name])
        logger.warning("data.standardise='none' with a column (%s) %.3g times as wide as the median one: this is the "
                       "one-hot failure.", widest, ratio)  # fmt: skip
    return preparation


def assemble(config: Config, splits: Mapping[str, Table], preparation: Preparation | None) -> Recipe:
    """The recipe for given splits and statistics."""
    chosen, method = options(config), config.method
    train = splits["train"]
    found = data_lib.sources(splits, preparation, batch_size=config.data.batch_size,
                             eval_batch_size=config.evals.batch_size, seed=config.seed)  # fmt: skip
    steps = base.total_steps(config, train.size)
    objective, facts = _objective(chosen, train)
    objective_lib.check_inputs(objective, base.input_names("student/logits", estimator=False, teacher=False))
    optimizer, learning_rate, clip_norm = base.optimiser(config, steps)
    facts["epoch_steps"] = max(1, round(train.size / config.data.batch_size))
    image = None if train.images is None else train.images.shape[1]
    look = base.part("views", method.views, VIEWS)
    patience = config.evals.patience
    return Recipe(
        sources=found,
        views=lambda key, batch: look(key, inputs_of(batch, image)),
        teacher_views=lambda inputs: inputs,
        plain_view=lambda batch: inputs_of(batch, image),
        encoder=_encoder(config, chosen, train, preparation),
        teacher=None,
        estimator=None,
        objective=objective_lib.combine(total_steps=steps, soft_label=(1.0, objective)),
        rows=None,
        optimizer=optimizer,
        schedules={"learning_rate": learning_rate},
        evaluations=(evals_lib.soft_label_evaluation(
            splits, facts=facts, input_std=_fed_std(found["bank"], preparation), calibrate=config.evals.calibrate),),
        describe=lambda S: {},
        diagnose=detectors.Diagnosis(warmup_steps=round(0.1 * steps)),
        total_steps=steps,
        seed=config.seed,
        clip_norm=clip_norm,
        stopping=None if patience is None else Stopping("soft_labels/val/skill", patience),
        subtrees=_subtrees,
    )  # fmt: skip


def inputs_of(batch: Batch, image: int | None = None) -> dict[str, Any]:
    """What the network is given of a batch; an image [B,h,w,3] resized to `image` pixels and normalised."""
    names = ("features", "neighbours", "edges", "neighbour_mask", "mask")
    out = {k: batch[k] for k in names if k in batch}
    if image is not None:
        view = views.plain_view({"image": batch["image"]}, image, IMAGENET_MEAN, IMAGENET_STD, dtype=jnp.float32)
        out["image"] = view["global"][0]
    return out


def _subtrees(params: PyTree) -> dict[str, PyTree]:
    encoder = params["encoder"]
    return {"encoder/trunk": encoder["trunk"], "encoder/classifier": encoder["out"]}


def _fed_std(source: Source, preparation: Preparation | None) -> dict[str, float]:
    """Standard deviation over the training split of every input column as the network sees it."""
    if preparation is None:
        return {}
    batches = (source.batch(i) for i in range(source.spec.steps_per_epoch))
    rows = np.concatenate([batch["features"][batch["mask"]] for batch in batches]).astype(np.float64)
    return dict(zip(preparation.names, rows.std(axis=0).tolist(), strict=True))


def _objective(chosen: Options, train: Table) -> tuple[Objective, dict[str, Any]]:
    """(objective, what is known before training). Refuses a penalty that can never fire unless allow_dead_terms."""
    categories = train.targets.shape[1]
    h = evals_lib.entropy(train.targets)
    threshold = float(np.quantile(h, 0.05)) if chosen.min_entropy is None else chosen.min_entropy
    ratio = None if chosen.logit_norm is None else chosen.logit_norm / chosen.temperature
    penalised = chosen.entropy_weight > 0
    if penalised and ratio is not None and ratio > 0 and not chosen.allow_dead_terms:
        least = simplex.least_entropy(categories, ratio)
        if least >= threshold:
            raise ValueError(
                f"method.soft_label.min_entropy = {threshold:.3f} can never fire: with logit_norm / temperature = "
                f"{ratio:.3g} entropies lie in [{least:.3f}, {np.log(categories):.3f}]. Choose a threshold in "
                f"that range, "
                "or set allow_dead_terms=True to see a dead penalty."
            )
    names = {f.name for f in dataclasses.fields(Options)} & set(options_of(soft_label))
    counts = np.bincount(train.targets.argmax(axis=1), minlength=categories)
    weights = sample_weights(tuple(int(n) for n in counts)) if chosen.class_weighting != "none" else ()
    if chosen.class_weighting == "category":
        logger.warning(
            "class_weighting='category' multiplies terms of the sum: the loss is no divergence and may be < 0."
        )
    settings = {**{n: getattr(chosen, n) for n in names}, "min_entropy": threshold, "class_weights": weights}
    facts = evals_lib.build_facts(train.targets, ratio, threshold if penalised else None)
    return soft_label(categories=categories, **settings), facts


def _encoder(config: Config, chosen: Options, train: Table, preparation: Preparation | None) -> Encoder:
    trunk = config.method.backbone
    extra = {k: v for k, v in trunk.options.items() if v is not None}
    if trunk.name in BACKBONES:
        check_options("backbone", trunk.name, BACKBONES, extra, base.GIVEN)
        if train.images is None:
            raise ValueError(f"backbone {trunk.name!r} reads images, but {train.name} has none; use 'mlp'.")
    else:
        check_options("backbone", trunk.name, TRUNKS, extra, (*base.GIVEN, "edges"))
        if preparation is None:
            raise ValueError(
                f"backbone {trunk.name!r} reads columns, but {train.name} has images only; use 'resnet_micro'."
            )
    if trunk.name == "star_graph" and not train.graph:
        raise ValueError(
            f"backbone 'star_graph' needs neighbours, but {train.name} has none; set data.source.neighbours."
        )
    if chosen.init_bias not in ("zero", "log_mean_target"):
        raise ValueError(
            f"method.soft_label.init_bias: expected 'zero' or 'log_mean_target', got {chosen.init_bias!r}."
        )
    mean = np.log(np.maximum(train.targets.mean(axis=0), 1e-6))
    return soft_label_encoder(
        trunk.name,
        train.targets.shape[1],
        features=0 if preparation is None else len(preparation.names),
        edges=train.graph["edges"].shape[-1] if train.graph else 0,
        sizes={k: getattr(chosen, k) for k in ("width", "depth", "dropout", "heads")},
        backbone_options=extra,
        logit_norm=chosen.logit_norm,
        temperature=chosen.temperature,
        final_norm=chosen.final_norm,
        bias=tuple(mean.tolist()) if chosen.init_bias == "log_mean_target" else None,
        dtype=jnp.dtype(config.method.dtype),
    )


# --------------------------------------------------------------------------------------- around the training
def begun(config: Config, recipe: Recipe, workdir: Path) -> None:
    """Write what a prediction needs beside the parameters, and print the baselines."""
    splits = open_splits(config)
    table_description.write(workdir, splits["train"], prepare(config, splits))
    constant = splits["train"].targets.mean(axis=0)
    for name in ("val", "test"):
        known = evals_lib.baselines(splits[name].targets, constant, splits[name].bayes)
        cells = [
            f"{k.replace('_', ' ')} {known[k]:.4f}"
            for k in ("uniform", "constant", "oracle_constant", "bayes")
            if k in known
        ]
        print(f"{name}, {splits[name].size} samples, KL of " + ", ".join(cells))


def hollow(config: Config, workdir: Path) -> Recipe:
    """The recipe over two samples that hold nothing: shapes come from `table.json`."""
    known = table_description.read(workdir)
    count, mean = 2, np.asarray(known["mean_target"], np.float64)
    graph = {k: np.zeros((count, *shape), np.float64) for k, shape in known["graph"].items()}
    image = None if known["image"] is None else np.zeros((count, *known["image"]), np.uint8)
    empty = Table(
        "nothing",
        {k: np.full(count, v) for k, v in known["columns"].items()},
        np.tile(mean / mean.sum(), (count, 1)),
        tuple(known["categories"]),
        np.zeros(count, np.int64),
        ("all",),
        None,
        graph,
        image,
    )
    return assemble(config, {name: empty for name in data_lib.SPLIT_NAMES}, known["preparation"])


def summarise(config: Config, result: Any) -> dict[str, Any]:
    """The last evaluation, and the same right after initialisation as control."""
    first = result.initial.get("soft_labels", {})
    untrained = {split: {k: first.get(split, {}).get(k) for k in ("kl", "skill", "top1")} for split in ("val", "test")}
    return {**result.final, "controls": {"untrained": untrained}}


def lines(summary: Mapping[str, Any]) -> list[str]:
    """KL beside the baselines, and whether predictions vary."""
    out = []
    for split in ("val", "test"):
        s = summary.get("soft_labels", {}).get(split)
        if s:
            b = s["baselines"]
            bayes = f", Bayes {b['bayes']:.4f}" if "bayes" in b else ""
            out.append(f"  {split}: KL {s['kl']:.4f} (constant {b['constant']:.4f}, uniform "
                       f"{b['uniform']:.4f}{bayes}), "
                       f"skill {s['skill']:.3f}, ECE {s['ece']:.4f}, entropy {s['entropy']['prediction']['mean']:.3f} "
                       f"(targets {s['entropy']['target']['mean']:.3f}), {s['distinct']['argmax']} "
                       f"argmaxes")  # fmt: skip
    calibrated = summary.get("soft_labels", {}).get("calibrated")
    if calibrated:
        out.append(f"  calibration temperature {calibrated['temperature']:.3f}: test KL {calibrated['kl']:.4f}, "
                   f"ECE {calibrated['ece']:.4f}")  # fmt: skip
    return out


def report_data(config: Config, workdir: Path, probe: Probe) -> Any:
    """Logits, targets and groups of the test split."""
    bank = probe.bank("test")
    splits = open_splits(config)
    test = splits["test"]
    path = workdir / "report_data.npz"
    np.savez_compressed(
        path,
        logits=np.asarray(bank.extra["logits"], np.float32),
        targets=test.targets.astype(np.float32),
        group=test.group,
        groups=np.asarray(test.groups),
        categories=np.asarray(test.categories),
        mean_target=splits["train"].targets.mean(axis=0),
    )
    return path


WORKLOAD = base.Workload(build=build, begin=begin, fill=fill, summarise=summarise, lines=lines, report_data=report_data,
                         hollow=hollow, loaded=Predict, begun=begun)  # fmt: skip
