"""Feature banks: what evaluations look at, computed by the teacher from one centre view an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from protojax.api import FeatureBank, Probe, Recipe, Source, TrainState
from protojax.parallel import replicated, to_device, to_host
from protojax.step import stream


def make_forward(recipe: Recipe, mesh: jax.sharding.Mesh) -> Any:
    """Jitted (teacher variables, batch) -> embeddings of the plain view (V = 1 taken out)."""

    def forward(variables: Any, batch: Any) -> dict[str, jax.Array]:
        key = stream(recipe.seed, "evaluation")
        embeddings, _ = recipe.teacher.apply(variables, recipe.plain_view(batch), False, key)
        return {k: (v[0] if v.ndim == 3 else v) for k, v in embeddings.items()}

    return jax.jit(forward, out_shardings=replicated(mesh))


def feature_bank(forward: Any, variables: Any, source: Source, mesh: jax.sharding.Mesh) -> FeatureBank:
    """One pass over a split in its order; padding rows are dropped. Labels are those that the source names."""
    columns: dict[str, list[np.ndarray]] = {}
    labels = list(source.spec.classes)
    for step in range(source.spec.steps_per_epoch):
        batch = to_device(mesh, source.batch(step))
        embeddings = {f"embedding/{k}": v for k, v in forward(variables, batch).items()}
        host = to_host({**embeddings, **{k: batch[k] for k in ("mask", "index", *labels)}})
        keep = np.asarray(host.pop("mask"), bool)
        for name, value in host.items():
            columns.setdefault(name, []).append(np.asarray(value)[keep])
    merged = {k: np.concatenate(v) for k, v in columns.items()}
    embeddings = {k.removeprefix("embedding/"): v for k, v in merged.items() if k.startswith("embedding/")}
    backbone, image = embeddings.pop("backbone"), embeddings.pop("image")
    return FeatureBank(
        backbone=backbone.astype(np.float32),
        image=image.astype(np.float32),
        labels={k: merged[k].astype(np.int64) for k in labels},
        positions=merged["index"].astype(np.int64),
        extra=embeddings,
    )


def make_probe(
    recipe: Recipe, forward: Any, state: TrainState, mesh: jax.sharding.Mesh, initial: Mapping[str, Any]
) -> Probe:
    """A Probe on the teacher at this state; banks are computed when first asked for, once."""
    variables = {"params": state.teacher["params"]["encoder"], "stats": state.teacher["stats"]}
    banks: dict[str, FeatureBank] = {}

    def bank(split: str) -> FeatureBank:
        if split not in recipe.sources or split == "train":
            known = sorted(set(recipe.sources) - {"train"})
            raise ValueError(f"no split {split!r} to evaluate; this recipe has {known}.")
        if split not in banks:
            banks[split] = feature_bank(forward, variables, recipe.sources[split], mesh)
        return banks[split]

    target, _ = recipe.estimator.codebooks(state.estimator, state.teacher["params"]["head"]["prototypes"])
    info = {k: np.asarray(v) for k, v in to_host(recipe.describe(state.estimator)).items()}
    return Probe(
        step=int(to_host(state.step)),
        bank=bank,
        specs={k: s.spec for k, s in recipe.sources.items()},
        codebook=jax.tree.map(np.asarray, to_host(target)),
        info=info,
        initial=initial,
    )


def run_evaluations(recipe: Recipe, probe: Probe) -> dict[str, Any]:
    """What all evaluations of the recipe say of the probe, in one record: the same in training and afterwards."""
    numbers: dict[str, Any] = {}
    for evaluation in recipe.evaluations:
        numbers |= evaluation.run(probe, stream(recipe.seed, f"evaluation/{evaluation.name}", probe.step))
    return numbers
