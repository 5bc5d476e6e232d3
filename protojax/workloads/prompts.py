"""Mixture of prompts over frozen features: offsets of K sub-prompts a class. Names of its parts -> code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from protojax import optim
from protojax.api import Array, Batch, Encoder, Estimator, EstimatorSpec, Key, Probe, PyTree, Recipe, Source, TrainState
from protojax.config import Component, Config, component
from protojax.data import prompts_cache, sampler
from protojax.data.prompts_records import feature_records, feature_table
from protojax.data.prompts_sources import SOURCES as CACHES
from protojax.data.records import Records
from protojax.estimators.prompt_offsets import learned_offsets, online_em
from protojax.evals import detectors
from protojax.objectives.prompts import PromptData, PromptOptions, check_count, e_step, prompts
from protojax.ops import prompts as prompt_ops
from protojax.schedules import check_choice
from protojax.workloads import base
from protojax.workloads.prompts_evaluation import e_step_of, prompts_evaluation, prompts_made, similarity_of, tested
from protojax.workloads.prompts_protocol import Opened, with_protocol
from protojax.workloads.prompts_towers import open_towers

SINKHORN_ROUNDS = 10
MOVERS = ("optimiser", "online_em")
SOURCES: dict[str, Callable[..., prompts_cache.FeatureCache]] = {**CACHES, "towers": open_towers}


# ------------------------------------------------------------------------------------------------ components
class Mixture(NamedTuple):
    """What `config.method.prompts` says: shape, beginning and mover of the offsets, and the options of the loss."""

    num_prompts: int
    offset_init: str
    offset_std: float
    offsets: str
    strength: float
    eta: float
    usage_half_life: float
    usage_prior: tuple[float, ...]
    loss: PromptOptions


def mixture(
    *,
    num_prompts: int = 8,
    offset_init: str = "plus_plus",
    offset_std: float = 0.01,
    offsets: str = "optimiser",
    strength: float = 1.0,
    eta: float = 0.1,
    usage_half_life: float = 2.0,
    usage_prior: tuple[float, ...] = (),
    **options: Any,
) -> Mixture:
    """K = num_prompts sub-prompts a class; the other options are those of `objectives.prompts.PromptOptions`.

    offset_init: 'plus_plus', 'normal', 'orthogonal' or 'zero', of standard deviation (or norm / sqrt(D)) offset_std.
    offsets: moved by the 'optimiser', or by 'online_em' without gradient (strength, eta). usage_half_life: in epochs of
    a class. usage_prior: shares of the K sub-prompts of every class at which the price is 0 (): 1/K each. Raises
    ValueError for anything out of range.
    """
    check_choice("prompts, offset_init", offset_init, prompt_ops.OFFSET_INITS)
    check_choice("prompts, offsets", offsets, MOVERS)
    if offset_std < 0:
        raise ValueError(f"prompts, offset_std: expected a number >= 0, got {offset_std}.")
    loss = PromptOptions(**options)
    check_count(loss, num_prompts)
    shares = np.asarray(usage_prior, np.float64)
    if len(shares) and (len(shares) != num_prompts or (shares <= 0).any() or abs(shares.sum() - 1.0) > 1e-3):
        raise ValueError(
            f"prompts, usage_prior: expected K = {num_prompts} positive shares that add up to 1, got {usage_prior}."
        )
    return Mixture(num_prompts, offset_init, offset_std, offsets, strength, eta, usage_half_life, usage_prior, loss)


mixture.passes_to = PromptOptions  # type: ignore[attr-defined]
MIXTURES = {"mixture": mixture}


def begin(cfg: ml_collections.ConfigDict) -> None:
    """The defaults of this workload: the cured recipe on the synthetic features."""
    method = cfg.method
    method.epochs = 30.0
    method.prompts = component("mixture")
    for unused in ("backbone", "head", "views", "estimator"):
        method[unused] = component("none")
    method.objective = ml_collections.ConfigDict({"prompts": component("prompts")})
    method.optim = component("adamw", peak_lr=5e-4, warmup_fraction=0.1, weight_decay=0.0)
    cfg.data.source = component("synthetic_modes")
    cfg.data.batch_size = 32
    cfg.evals.labels = ("label",)
    cfg.run.steps_per_call = 32


def fill(cfg: ml_collections.ConfigDict) -> None:
    """All options of the components at their defaults."""
    base.fill_parts(cfg.method, {"prompts": MIXTURES, "optim": optim.OPTIMIZERS})
    cfg.data.source = base.filled({name: with_protocol(f) for name, f in SOURCES.items()}, cfg.data.source)


# ------------------------------------------------------------------------------------------------ the recipe
def open_protocol(config: Config) -> Opened:
    """The feature cache of a configuration, checked, with what its few-shot protocol takes away."""
    source, data = config.data.source, config.data
    given = {"root": data.root, "seed": config.seed}
    table = {
        name: partial(with_protocol(f, data.train_split, data.test_split), **_accepted(f, given))
        for name, f in SOURCES.items()
    }
    return base.part("feature source", Component(source.name, _set(source.options)), table)


def _accepted(function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {k: v for k, v in given.items() if k in names}


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None and k not in ("root", "seed")}


def read_mixture(config: Config) -> Mixture:
    """The options of `config.method.prompts`. Raises ValueError for an unknown one and for values out of range."""
    if config.method.prompts is None:
        raise ValueError("config.method.prompts is not set: begin a config file with experiment.defaults('prompts').")
    return base.part("mixture of prompts", config.method.prompts, MIXTURES)


def constants_of(cache: prompts_cache.FeatureCache, table: np.ndarray, options: PromptOptions, train: str) -> dict[
    str, np.ndarray]:  # fmt: skip
    """Frozen arrays of the step: all features, base and class means, what the E-step subtracts, class sizes."""
    rows = cache.split(train)
    classes = len(cache.class_names)
    means = prompts_cache.class_means(rows, classes)
    centre = {
        "class": lambda: means,
        "global": lambda: np.broadcast_to(rows.image.mean(axis=0), means.shape).astype(np.float32),
        "none": lambda: np.zeros_like(means),
    }[options.e_step_centre]()
    assert cache.base is not None
    return {
        "features": table, "base": cache.base, "class_mean": means, "centre": centre,
        "train_label": rows.label.astype(np.int32),
        "class_counts": np.bincount(rows.label, minlength=classes).astype(np.int32),
    }  # fmt: skip


def prior_of(mix: Mixture, classes: int) -> np.ndarray | None:
    """usage_prior of every class [C,K], or None for 1/K."""
    return np.tile(np.asarray(mix.usage_prior, np.float32), (classes, 1)) if mix.usage_prior else None


def build(config: Config) -> Recipe:
    """The recipe of any arm."""
    data, mix = config.data, read_mixture(config)
    options = mix.loss
    opened = open_protocol(config)
    cache = opened.cache
    prompts_cache.warn_small_classes(cache, mix.num_prompts, data.train_split)
    table = feature_table(cache, (data.train_split, data.test_split))
    constants = constants_of(cache, table.features, options, data.train_split)
    prior = prior_of(mix, len(cache.class_names))
    if prior is not None:
        constants["prior"] = prior
    if cache.tower is not None:
        constants["tower"] = cache.tower.variables
    found = _sources(config, opened, table.first)
    steps = base.total_steps(config, found["train"].spec.size)
    optimizer, learning_rate, clip_norm = base.optimiser(config, steps)
    objective = prompts(options=options, total_steps=steps)
    if mix.offsets == "online_em":
        objective = objective._replace(terms=None)  # no parameter: gradients that are 0 say nothing about the terms
    parts = tested(cache, constants, options, data, mix.offset_std, opened.unseen)
    return Recipe(
        sources=found,
        views=partial(_views, cache.tower),
        teacher_views=lambda inputs: inputs,
        plain_view=lambda batch: batch,
        encoder=Encoder(lambda key, inputs: {"params": {}, "stats": {}}, _frozen),
        teacher=None,
        estimator=_estimator(mix, found["train"].spec.steps_per_epoch),
        objective=objective,
        rows=partial(_rows, options, steps),
        optimizer=optimizer,
        schedules={
            "learning_rate": learning_rate,
            "tau": lambda step: options.tau(step / steps),
            "sharpness": lambda step: options.scale / options.tau(step / steps),
        },
        evaluations=(prompts_evaluation(parts, steps),),
        describe=lambda S: {k: S["shared"][k] for k in ("usage", "potential") if k in S["shared"]},
        diagnose=detectors.Diagnosis(warmup_steps=round(0.1 * steps)),
        total_steps=steps,
        seed=config.seed,
        constants=constants,
        spec=EstimatorSpec(dim=table.features.shape[1], rows=data.batch_size, total_steps=steps),
        clip_norm=clip_norm,
        best="" if parts.held is None else "prompts/validation/top1",
    )


def _estimator(mix: Mixture, steps_per_epoch: int) -> Estimator:
    given: dict[str, Any] = {
        "assign": partial(_assign, mix.loss), "initial": partial(_initial, mix), "num_prompts": mix.num_prompts,
        "half_life": mix.usage_half_life,
    }  # fmt: skip
    if mix.offsets == "online_em":
        return online_em(**given, strength=mix.strength, eta=mix.eta)
    rebalance = partial(_rebalance, mix.loss) if mix.loss.balance == "sinkhorn" else None
    return learned_offsets(**given, rebalance=rebalance, rebalance_steps=steps_per_epoch)


def _sources(config: Config, opened: Opened, first: Mapping[str, int]) -> dict[str, Any]:
    data, cache = config.data, opened.cache
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    train, test = (feature_records(cache, s, first[s]) for s in (data.train_split, data.test_split))
    counts = {"label": np.bincount(train.labels["label"], minlength=len(cache.class_names))}

    def ordered(split: Records) -> Source:
        size = config.evals.batch_size
        return sampler.make_source(split, batch_size=size, shuffle=False, remainder="pad", counts=counts, **process)

    seen = feature_records(cache, data.train_split, first[data.train_split], opened.train_rows)
    shuffled = sampler.make_source(
        seen, batch_size=data.batch_size, seed=config.seed, shuffle=True, remainder="wrap", **process
    )
    return {"train": shuffled, "bank": ordered(train), "test": ordered(test)}


def _views(tower: prompts_cache.Tower | None, key: Key, batch: Batch) -> Batch:
    """The batch; with a tower in the step also 'feature' [B,D], what it says of the batch's pictures (or crops)."""
    if tower is None:
        return batch
    found = tower.features(batch["constants"]["tower"], key, batch["image"])
    return {**batch, "feature": jax.lax.stop_gradient(found)}


def _frozen(variables: PyTree, batch: Batch, train: bool, key: Key | None) -> tuple[dict[str, Array], PyTree]:
    """The 'network': the features that a tower made in this step, else a look-up in the table."""
    found = batch["feature"] if "feature" in batch else batch["constants"]["features"][batch["row"]]
    image = found.astype(jnp.result_type(float))
    return {"image": image[None], "backbone": image[None]}, {}


def _rows(options: PromptOptions, steps: int, inputs: Batch, batch: Batch, head: PyTree) -> dict[
    str, Array]:  # fmt: skip
    """Rows for the estimator: features, labels, and the offsets of each image's class where they are parameters."""
    constants, labels = batch["constants"], batch["label"]
    rows = {"features": _frozen({}, inputs, False, None)[0]["image"][0], "labels": labels,
            "mask": batch["mask"].astype(bool), "base": constants["base"], "centre": constants["centre"]}  # fmt: skip
    if "prior" in constants:
        rows["prior"] = constants["prior"]
    learned = head.get("prototypes", {}).get("offsets")
    if learned is not None:
        rows["offsets"] = learned[labels]
        if options.balance == "sinkhorn":
            rows |= {"all_offsets": learned, "constants": constants}
    return rows


def _assign(options: PromptOptions, own: Array, usage: Array, potential: Any, rows: Mapping[str, Array]) -> Array:
    """The E-step of `objectives.prompts` on the rows of the estimator, at the fraction of the run that S counts."""
    data = PromptData(rows["features"], rows["labels"], rows["mask"], rows["base"], rows["centre"], usage, potential,
                      rows.get("prior"))  # fmt: skip
    prompts_y = prompt_ops.prompts_of(rows["base"][rows["labels"]], own)
    return e_step(prompts_y, data, options, options.tau(rows["fraction"]), rows["fraction"]).assignment


def _initial(mix: Mixture, key: Key, constants: Mapping[str, Array]) -> Array:
    """Offsets [C,K,D] at step 0."""
    shape = (constants["base"].shape[0], mix.num_prompts, constants["base"].shape[1])
    if mix.offset_init == "zero":
        return jnp.zeros(shape, jnp.result_type(float))
    if mix.offset_init == "plus_plus":
        images = constants["features"][: constants["train_label"].shape[0]]
        return prompt_ops.plus_plus_offsets(key, images, constants["train_label"], constants["class_mean"], shape[1],
                                            mix.offset_std)  # fmt: skip
    make = prompt_ops.normal_offsets if mix.offset_init == "normal" else prompt_ops.orthogonal_offsets
    return make(key, shape, mix.offset_std)


def _rebalance(options: PromptOptions, potential: Array, learned: Array, fraction: Array, constants: PyTree) -> Array:
    """10 rounds of f_ck += tau (ln mean_b r_bk + ln K) over the training images: exact balance within each class."""
    labels = constants["train_label"]
    images = constants["features"][: labels.shape[0]]
    own = prompt_ops.prompts_of(constants["base"], learned)[labels]
    tau = options.tau(fraction)
    count = learned.shape[1]
    logits = options.scale * jnp.einsum("nd,nkd->nk", images - constants["centre"][labels], own)
    sizes = jnp.maximum(constants["class_counts"].astype(logits.dtype), 1.0)[:, None]

    def once(_: Array, f: Array) -> Array:
        r = jax.nn.softmax((logits - f[labels]) / tau, axis=1)
        mean = jnp.zeros_like(f).at[labels].add(r) / sizes
        return f + tau * (jnp.log(jnp.maximum(mean, 1e-30)) + float(np.log(count)))

    return jax.lax.fori_loop(0, SINKHORN_ROUNDS, once, potential)


# --------------------------------------------------------------------------------------- around the training
def summarise(config: Config, result: Any) -> dict[str, Any]:
    """The last evaluation, and the same numbers right after initialisation: training must beat them."""
    return {"prompts": result.final.get("prompts"), "controls": {"initial": result.initial.get("prompts")}}


def lines(summary: Mapping[str, Any]) -> list[str]:
    """Accuracy and usage in two lines."""
    found = summary.get("prompts") or {}
    if not found:
        return []
    step, count = found["e_step"], found["count"]
    accuracy = found["accuracy"]
    baselines = found.get("baselines", {}).items()
    controls = ", ".join(f"{k.replace('_', ' ')} {100 * v['top1']:.1f}%" for k, v in baselines)
    return [
        f"  top-1 {100 * accuracy['top1']:.1f}%, balanced {100 * accuracy['balanced']:.1f}% ({controls})",
        f"  of {count} sub-prompts a class {step['usage_perplexity']:.1f} are used, {step['effective']:.1f} are "
        f"effective; dead {100 * step['dead']:.0f}%"
        + (f"; mode purity {step['purity']:.2f}" if step.get("purity") is not None else ""),
    ]


def report_data(config: Config, workdir: Path, probe: Probe) -> Any:
    """Usage, similarities, and what each sub-prompt claims."""
    from protojax.reporting.prompts_sheets import write_prompts_data

    options, opened = read_mixture(config).loss, open_protocol(config)
    cache, rows = opened.cache, opened.cache.split(config.data.train_split)
    constants = constants_of(cache, rows.image, options, config.data.train_split)
    assert probe.codebook is not None
    made = prompts_made(constants["base"], np.asarray(probe.codebook.prototypes))
    r = e_step_of(rows, made, np.asarray(probe.codebook.bias), constants["centre"], options,
                  probe.info.get("potential"), prior_of(read_mixture(config), len(cache.class_names)))  # fmt: skip
    return write_prompts_data(
        workdir, r, similarity_of(rows, made), rows.label, made, cache.class_names,
        rows=opened.train_rows, pictures=pictures_of(config, cache),
        modes=rows.mode, mode_names=cache.mode_names, descriptions=cache.descriptions,
    )  # fmt: skip


def pictures_of(config: Config, cache: prompts_cache.FeatureCache) -> Callable[[np.ndarray], np.ndarray] | None:
    """rows of the training split -> pictures uint8 [n,h,w,3]; None where the source has none."""
    return None if cache.pictures is None else partial(cache.pictures, config.data.train_split)


def hollow(config: Config, workdir: Path) -> Recipe:
    """The recipe itself: the features are frozen arrays that the classifier needs anyway."""
    return build(config)


class PromptClassifier:
    """A trained mixture: unit features [N,D] -> cosines [N,C] with the nearest sub-prompt of each class."""

    def __init__(self, prompts_: np.ndarray, class_names: tuple[str, ...]):
        self.prompts = prompts_
        self.class_names = class_names

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return np.stack([(features @ p.T).max(axis=1) for p in self.prompts], axis=1)

    def assign(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Nearest sub-prompt [N] of each image's class."""
        return np.einsum("nd,nkd->nk", features, self.prompts[labels]).argmax(axis=1)


def loaded(recipe: Recipe, state: TrainState, config: Config, workdir: Path) -> PromptClassifier:
    """The classifier of a run."""
    assert recipe.estimator is not None
    book, _ = recipe.estimator.codebooks(state.estimator, state.params["head"]["prototypes"])
    made = prompts_made(recipe.constants["base"], np.asarray(book.prototypes))
    return PromptClassifier(made, recipe.sources["test"].spec.classes["label"])


WORKLOAD = base.Workload(
    build=build,
    begin=begin,
    fill=fill,
    summarise=summarise,
    lines=lines,
    report_data=report_data,
    hollow=hollow,
    loaded=loaded,
)
