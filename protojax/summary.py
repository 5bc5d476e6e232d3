"""summary.json: the record of a finished run that scripts rely on (docs/summary.md describes every key)."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import jax

from protojax import __version__
from protojax.config import Config, to_plain

VERSION = 1


def versions() -> dict[str, str]:
    """Versions of what can change a result."""
    packages = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {"protojax": __version__, "python": platform.python_version(), **packages}


def device() -> str:
    """'cpu x 8' or 'NVIDIA H200 x 1': kind and number of the devices."""
    devices = jax.devices()
    return f"{devices[0].device_kind} x {len(devices)}"


def summarise(config: Config, result: Any) -> dict[str, Any]:
    """The record of issue-stable keys: arm, seed, steps, images_per_second, the last evaluation, and its controls.

    controls: `untrained_knn` and `initial_unique` (the same evaluations right after initialisation),
    `random_unique` (a random codebook of equal K and D).
    """
    final, initial = dict(result.final), dict(result.initial)
    prototypes = dict(final.pop("prototypes", {}) or {})
    controls = {
        **(final.pop("controls", {}) or {}),
        "untrained_knn": initial.get("knn"),
        "untrained_groups": initial.get("groups"),
        "initial_effective_rank": initial.get("effective_rank"),
    }
    return {
        "version": VERSION,
        "name": config.name,
        "arm": config.arm,
        "seed": config.seed,
        "steps": result.step,
        "finished": result.finished,
        "images_per_second": result.images_per_second,
        **final,
        "prototypes": prototypes,
        "controls": controls,
        "findings": result.findings,
        "device": device(),
        "versions": versions(),
        "config": to_plain(config),
    }


def lines(summary: Mapping[str, Any]) -> str:
    """A few lines for the terminal at the end of a run."""
    out = [f"{summary['name']}, arm {summary['arm']}, seed {summary['seed']}: {summary['steps']} steps, "
           f"{summary['images_per_second']:.0f} images/s"]  # fmt: skip
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
    for finding in summary["findings"]:
        out.append(f"  [{finding['severity']}] {finding['detector']} (step {finding['step']}): {finding['evidence']}")
    return "\n".join(out)


def dumps_config(config: Config) -> dict[str, Any]:
    """What config.json holds."""
    return {"config": to_plain(config), "versions": versions()}
