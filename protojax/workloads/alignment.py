"""Image-text alignment: two heads over frozen or small towers, contrastive and nested: what surrounds a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from protojax.api import Probe
from protojax.config import Config, component
from protojax.data import pairs_registry
from protojax.workloads import base
from protojax.workloads.alignment_loading import AlignedEncode, hollow_recipe, write_shapes
from protojax.workloads.alignment_recipe import ALIGNERS, OPTIMIZERS, build, pairs_of


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


WORKLOAD = base.Workload(
    build=build,
    begin=begin,
    fill=fill,
    summarise=summarise,
    lines=lines,
    report_data=report_data,
    hollow=hollow_recipe,
    loaded=AlignedEncode,
    begun=write_shapes,
)
