"""A checkpoint, data and a protocol -> numbers (`protojax eval`) or features (`protojax embed`).

Neither the training data nor the devices of the run are needed. Whatever the evaluations look at is a feature bank, so
that a number is a function of (checkpoint, data, protocol) alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from protojax import loading, metrics, parallel, probing
from protojax import step as step_lib
from protojax.api import FeatureBank, Probe, Recipe, Source, SourceSpec, TrainState
from protojax.config import Config, Data
from protojax.data import longtail, sampler, views
from protojax.data.records import Records, class_counts, subset
from protojax.evals import table, transfer
from protojax.evals.evaluations import parse_views
from protojax.protocol import TRAINING, Protocol
from protojax.workloads import images as image_lib
from protojax.workloads import prototypes as prototypes_lib

VIEW_BATCH = 64  # images a draw of random views: fixed, because views are drawn a batch


class Opened(NamedTuple):
    """A checkpoint, ready to look at images in the way of a protocol."""

    config: Config
    recipe: Recipe
    state: TrainState
    mesh: jax.sharding.Mesh
    workdir: Path


def open_run(workdir: Path | str, protocol: Protocol) -> Opened:
    """The checkpoint that the protocol names, on all devices. Raises what `loading.load` raises, and ValueError for a
    run whose workload has no features of images."""
    config, recipe, state = loading.bare(workdir, protocol.step)
    example = recipe.sources["train"].batch(0)
    if "image" not in example or config.method.workload != "prototypes":
        raise ValueError(
            f"{workdir} is a run of workload {config.method.workload!r}, whose features are not of images alone; "
            "protocols measure 'prototypes' runs. `protojax eval WORKDIR` runs its own evaluations."
        )
    if protocol.resize is not None or protocol.crop != 1.0:
        seen = jax.eval_shape(recipe.plain_view, example)["global"]
        size, dtype = protocol.resize or seen.shape[-2], jnp.dtype(config.method.dtype)
        recipe = recipe._replace(
            plain_view=lambda batch: views.plain_view(
                batch, size, image_lib.IMAGENET_MEAN, image_lib.IMAGENET_STD, crop_fraction=protocol.crop, dtype=dtype
            )
        )
    mesh = parallel.make_mesh(-1, 1)
    return Opened(config, recipe, jax.device_put(state, parallel.replicated(mesh)), mesh, Path(workdir))


# --------------------------------------------------------------------------------------------------- features
def _records(opened: Opened, data: Data | None, split: str | None, role: str) -> Records:
    """A split of the named data, or of the run's own (with its long tail, as it was trained on)."""
    source = opened.config.data if data is None else data
    given = {"bank": source.train_split, "test": source.test_split}[role]
    return image_lib.records(dataclasses.replace(opened.config, data=source), split or given)


def open_splits(
    workdir: Path | str, protocol: Protocol, data: Data | None = None, bank_data: Data | None = None
) -> tuple[Opened, Records, Records]:
    """(checkpoint, split to learn from, split to score on) of `data` (None: the run's own); errors as `open_run`."""
    opened = open_run(workdir, protocol)
    bank = _records(opened, bank_data or data, protocol.bank_split, "bank")
    return opened, bank, _records(opened, data, protocol.test_split, "test")


def _source(opened: Opened, records: Records, counts: Mapping[str, np.ndarray]) -> Source:
    """One ordered pass; the batch is rounded up to the devices, which changes no feature."""
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    devices = opened.mesh.size
    size = -(-opened.config.evals.batch_size // devices) * devices
    return sampler.make_source(records, batch_size=size, shuffle=False, remainder="pad", counts=counts, **process)


def make_probe(opened: Opened, bank: Records, test: Records | None, initial: Mapping[str, Any]) -> Probe:
    """A probe on the splits 'bank' and 'test' that also gives random views of the bank (`evaluations.views_split`)."""
    counts = class_counts(bank)
    sources = {"bank": _source(opened, bank, counts)}
    if test is not None:
        fitting = {k: v for k, v in counts.items() if k in test.classes and len(v) == len(test.classes[k])}
        sources["test"] = _source(opened, test, fitting)
    recipe = opened.recipe._replace(sources=sources)
    forward = probing.make_forward(recipe, opened.mesh)
    probe = probing.make_probe(recipe, forward, opened.state, opened.mesh, initial, step_lib.constants_of(recipe))
    return probe._replace(bank=_with_views(opened, bank, probe.bank))


def _with_views(opened: Opened, bank: Records, ask: Callable[[str], FeatureBank]) -> Callable[[str], FeatureBank]:
    remembered: dict[str, FeatureBank] = {}

    def answer(name: str) -> FeatureBank:
        asked = parse_views(name)
        if asked is None:
            return ask(name)
        if name not in remembered:
            split, images, count, seed = asked
            if split != "bank":
                raise ValueError(f"no features {name!r}: random views are taken of the split 'bank' alone.")
            remembered[name] = view_bank(opened, bank, count, images, seed)
        return remembered[name]

    return answer


def view_bank(opened: Opened, records: Records, count: int, images: int, seed: int) -> FeatureBank:
    """`count` random views of `images` images (all when there are fewer), drawn by `seed`, by the training views.

    extra: 'views/image' [M,V,D], 'views/backbone' [M,V,F]. One device; what is drawn depends on no batch size.
    """
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(records.size, min(images, records.size), replace=False))
    mesh = parallel.make_mesh(1, 1, devices=jax.devices()[:1])
    source = sampler.make_source(subset(records, rows), batch_size=VIEW_BATCH, shuffle=False, remainder="pad")
    network, variables, _ = step_lib.observer(opened.recipe, opened.state)
    variables = jax.device_put(variables, parallel.replicated(mesh))

    @jax.jit
    def look(weights: Any, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        inputs = {"global": opened.recipe.views(key, batch)["global"]}
        embeddings, _ = network.apply(weights, inputs, False, None)
        return {k: jnp.swapaxes(embeddings[k], 0, 1) for k in ("image", "backbone")}

    columns: dict[str, list[np.ndarray]] = {"image": [], "backbone": []}
    for step in range(source.spec.steps_per_epoch):
        batch = source.batch(step)
        mask = batch["mask"]
        seen: dict[str, list[np.ndarray]] = {"image": [], "backbone": []}
        drawn = 0
        while sum(v.shape[1] for v in seen["image"]) < count:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), drawn)
            for name, value in look(variables, {"image": jnp.asarray(batch["image"])}, key).items():
                seen[name].append(np.asarray(value, np.float32)[mask])
            drawn += 1
        for name, parts in seen.items():
            columns[name].append(np.concatenate(parts, axis=1)[:, :count])
    extra = {f"views/{k}": np.concatenate(v) for k, v in columns.items()}
    none = np.zeros((len(extra["views/image"]), 0), np.float32)
    return FeatureBank(none, none, {}, rows[: len(none)], extra)


# ------------------------------------------------------------------------------------------------- evaluating
def evaluate(
    workdir: Path | str, protocol: Protocol, data: Data | None = None, bank_data: Data | None = None
) -> dict[str, Any]:
    """Every evaluation of the protocol on a checkpoint. docs/evaluation.md describes the record.

    data: None for the run's own. bank_data: learn from this source and score on `data` (transfer), on the classes that
    both name. Raises ValueError or TypeError for what can be known to be wrong before a feature is computed.
    """
    opened, bank, test = open_splits(workdir, protocol, data, bank_data)
    initial: Mapping[str, Any] = {}
    if data is None and bank_data is None:
        initial = metrics.evaluated(metrics.read_records(opened.workdir / "metrics.jsonl"), 0) or {}
    probe = make_probe(opened, bank, test, initial)
    common = [k for k in bank.labels if k in test.labels]
    labels = tuple(common if protocol.labels is None else protocol.labels)
    if bank_data is not None:
        probe, labels = _transferred(probe, labels)
    setting = table.Setting(
        specs=probe.specs,
        labels=labels,
        groups=_groups(opened, probe.specs["bank"], labels, protocol.groups),
        ks=protocol.k,
        temperature=protocol.temperature,
        seed=protocol.seed,
        reading=prototypes_lib.reading(opened.config),
    )
    chosen, skipped = protocol.chosen, {}
    for name in list(chosen):
        if not labels and name in table.NEEDS_LABELS:
            skipped[name] = "needs labels, which the data have not"
        elif probe.codebook is None and name in table.NEEDS_CODEBOOK:
            skipped[name] = "needs prototypes, which the checkpoint has not"
        else:
            continue
        chosen.pop(name)
    results = {}
    for evaluation in table.make_evaluations(chosen, setting):
        begin = time.perf_counter()
        numbers = evaluation.run(probe, jax.random.key(protocol.seed))
        if "controls" in numbers and not initial:  # of another source there is no evaluation at step 0
            numbers["controls"] = {k: v for k, v in numbers["controls"].items() if not k.startswith("initial_")}
        seconds = round(time.perf_counter() - begin, 3)
        results[evaluation.name] = {"protocol": protocol.hash, "seconds": seconds, "numbers": numbers}
    config = opened.config
    return {
        "protocol": protocol.record(),
        "run": {
            "workdir": str(workdir),
            "name": config.name,
            "arm": config.arm,
            "seed": config.seed,
            "step": probe.step,
        },
        "data": {name: _described(spec) for name, spec in probe.specs.items()},
        "results": results,
        "skipped": skipped,
    }


def _groups(opened: Opened, bank: SourceSpec, labels: Sequence[str], asked: str) -> dict[str, dict[str, np.ndarray]]:
    """label -> head, medium and tail by the images of the bank, or ('training:RULE') by those of the run's own training
    split, of a class that it has not: none. Raises ValueError for a label that the training split has not."""
    rule, counts = cast(longtail.GroupRule, asked.removeprefix(TRAINING)), dict(bank.counts)
    if asked.startswith(TRAINING):
        own = _records(opened, None, None, "bank")
        trained = class_counts(own)
        for label in labels:
            if label not in own.labels:
                raise ValueError(
                    f"protocol.groups {asked!r}: {own.name}, which the run was trained on, has no labels {label!r}, "
                    f"only {[*own.labels]}; name one of these as the protocol's label, or leave out 'training:'."
                )
            by_name = dict(zip(own.classes[label], trained[label], strict=True))
            counts[label] = np.array([by_name.get(name, 0) for name in bank.classes[label]], np.int64)
    return {k: longtail.groups(counts[k], rule) for k in labels if k in counts}


def _described(spec: SourceSpec) -> dict[str, Any]:
    return {"name": spec.name, "size": spec.size, "classes": {k: len(v) for k, v in spec.classes.items()}}


def _transferred(probe: Probe, labels: tuple[str, ...]) -> tuple[Probe, tuple[str, ...]]:
    """A probe on the classes that both sources name, by the one label that is evaluated."""
    if len(labels) != 1:
        raise ValueError(
            f"transfer needs one label key that both sources have, but there are {list(labels) or 'none'}; name it in "
            'the protocol: "labels": ["fine"].'
        )
    label = labels[0]
    bank, test = probe.specs["bank"], probe.specs["test"]
    for spec in (bank, test):
        if label not in spec.classes:
            raise ValueError(f"transfer: {spec.name} has no labels {label!r}; it has {sorted(spec.classes)}.")
    shared = transfer.shared_classes(test.classes[label], bank.classes[label])
    ids = {"bank": shared.second, "test": shared.first}
    kept: dict[str, FeatureBank] = {}

    def restricted(name: str) -> FeatureBank:
        if name not in ids:
            return probe.bank(name)
        if name not in kept:
            kept[name] = transfer.restrict(probe.bank(name), label, ids[name])
        return kept[name]

    counts = {label: bank.counts[label][shared.second]}
    specs = {
        name: spec._replace(classes={label: shared.names}, counts=counts)
        for name, spec in (("bank", bank), ("test", test))
    }
    return probe._replace(bank=restricted, specs=specs), (label,)


# -------------------------------------------------------------------------------------------------- embedding
def features(
    workdir: Path | str, protocol: Protocol, data: Data | None = None, split: str | None = None
) -> tuple[FeatureBank, SourceSpec, int]:
    """(feature bank, what the split holds, step of the checkpoint) of one split (None: that of the bank)."""
    opened = open_run(workdir, protocol)
    records = _records(opened, data, split or protocol.bank_split, "bank")
    probe = make_probe(opened, records, None, {})
    return probe.bank("bank"), probe.specs["bank"], probe.step
