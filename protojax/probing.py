"""Feature banks: what evaluations look at, computed by the teacher from one centre view an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from protojax.api import Codebook, FeatureBank, Probe, Recipe, Source, TrainState
from protojax.parallel import replicated, to_device, to_host
from protojax.step import Constants, codebooks, given, observer, stream

VIEWED = ("image", "backbone")  # embeddings with an axis of views in front


def make_forward(recipe: Recipe, mesh: jax.sharding.Mesh) -> Any:
    """Jitted (variables, batch, constants=None) -> embeddings of the plain view; image and backbone without V = 1.
    Without constants the recipe's seed is in the program, and the network sees the batch alone."""

    def forward(variables: Any, batch: Any, constants: Constants | None = None) -> dict[str, jax.Array]:
        seeded, batch = (recipe, batch) if constants is None else given(recipe, batch, constants)
        network = recipe.teacher or recipe.encoder
        key = stream(seeded.seed, "evaluation")
        embeddings, _ = network.apply(variables, recipe.plain_view(batch), False, key)
        return {k: (v[0] if k in VIEWED and v.ndim == 3 else v) for k, v in embeddings.items()}

    return jax.jit(forward, out_shardings=replicated(mesh))


def feature_bank(
    forward: Any,
    variables: Any,
    source: Source,
    mesh: jax.sharding.Mesh,
    constants: Any = None,
    keep: tuple[str, ...] = (),
) -> FeatureBank:
    """One pass over a split in its order; padding rows are dropped. Labels are those that the source names; `keep`:
    entries of a batch that go to `extra` beside embeddings."""
    columns: dict[str, list[np.ndarray]] = {}
    labels = list(source.spec.classes)
    for step in range(source.spec.steps_per_epoch):
        loaded = source.batch(step)
        batch = to_device(mesh, loaded)
        embeddings = {f"embedding/{k}": v for k, v in forward(variables, batch, constants).items()}
        kept = [k for k in keep if k in loaded]
        host = to_host({**embeddings, **{k: batch[k] for k in ("mask", "index", *labels, *kept)}})
        mask = np.asarray(host.pop("mask"), bool)
        for name, value in host.items():
            columns.setdefault(name, []).append(np.asarray(value)[mask])
    merged = {k: np.concatenate(v) for k, v in columns.items()}
    embeddings = {k.removeprefix("embedding/"): v for k, v in merged.items() if k.startswith("embedding/")}
    nothing = np.zeros((len(merged["index"]), 0), np.float32)
    backbone, image = embeddings.pop("backbone", nothing), embeddings.pop("image", nothing)
    return FeatureBank(
        backbone=backbone.astype(np.float32),
        image=image.astype(np.float32),
        labels={k: merged[k].astype(np.int64) for k in labels},
        positions=merged["index"].astype(np.int64),
        extra={**embeddings, **{k: merged[k] for k in keep if k in merged}},
    )


def make_probe(
    recipe: Recipe,
    forward: Any,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    initial: Mapping[str, Any],
    constants: Any = None,
) -> Probe:
    """A Probe on the teacher (or, without one, the student) at this state; banks are computed when first asked for,
    once."""
    _, variables, head = observer(recipe, state)
    banks: dict[str, FeatureBank] = {}

    def bank(split: str) -> FeatureBank:
        if split not in recipe.sources or split == "train":
            known = sorted(set(recipe.sources) - {"train"})
            raise ValueError(f"no split {split!r} to evaluate; this recipe has {known}.")
        if split not in banks:
            banks[split] = feature_bank(forward, variables, recipe.sources[split], mesh, constants, recipe.keep)
        return banks[split]

    target, _ = codebooks(recipe, state.estimator, head, head)
    described = {} if recipe.estimator is None else recipe.describe(state.estimator)
    info = {k: np.asarray(v) for k, v in to_host(described).items()}
    codebook = None if target is None else jax.tree.map(np.asarray, to_host(target))
    codebook, info = in_use(codebook, info)
    return Probe(
        step=int(to_host(state.step)),
        bank=bank,
        specs={k: s.spec for k, s in recipe.sources.items()},
        codebook=codebook,
        info=info,
        initial=initial,
        head=lambda: to_host(head),
        encode=lambda batch: to_host(forward(variables, to_device(mesh, batch), constants)),
    )


def in_use(codebook: Codebook | None, info: dict[str, Any]) -> tuple[Codebook | None, dict[str, Any]]:
    """Codebook and description without the prototypes that are switched off, where the estimator can switch ('active'
    bool [K] in `info`, which stays whole): no evaluation, picture or user of a model sees one of them."""
    active = info.get("active")
    if codebook is None or active is None:
        return codebook, info
    kept = {"usage": info["usage"][active]} if "usage" in info else {}
    return Codebook(codebook.prototypes[active], codebook.bias[active]), {**info, **kept}


def run_evaluations(recipe: Recipe, probe: Probe) -> dict[str, Any]:
    """What all evaluations of the recipe say of the probe, in one record: the same in training and afterwards."""
    numbers: dict[str, Any] = {}
    for evaluation in recipe.evaluations:
        numbers |= evaluation.run(probe, stream(recipe.seed, f"evaluation/{evaluation.name}", probe.step))
    return numbers
