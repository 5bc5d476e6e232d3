"""summary.json: the record of a finished run that scripts rely on (docs/summary.md describes every key)."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import jax

from protojax import __version__, experiment
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
    """The record of issue-stable keys: what every run has, and the workload's own part of the last evaluation."""
    return {
        "version": VERSION,
        "workload": config.method.workload,
        "name": config.name,
        "arm": config.arm,
        "seed": config.seed,
        "steps": result.step,
        "finished": result.finished,
        "images_per_second": result.images_per_second,
        **experiment.workload(config.method.workload).summarise(config, result),
        "best": result.best,
        "findings": result.findings,
        "device": device(),
        "versions": versions(),
        "config": to_plain(config),
    }


def lines(summary: Mapping[str, Any]) -> str:
    """A few lines for the terminal at the end of a run."""
    out = [f"{summary['name']}, arm {summary['arm']}, seed {summary['seed']}: {summary['steps']} steps, "
           f"{summary['images_per_second']:.0f} {unit(summary['workload'])}/s"]  # fmt: skip
    out += experiment.workload(summary["workload"]).lines(summary)
    for finding in summary["findings"]:
        out.append(f"  [{finding['severity']}] {finding['detector']} (step {finding['step']}): {finding['evidence']}")
    return "\n".join(out)


def unit(workload: str) -> str:
    """What a batch is made of, in a word."""
    return "images" if workload == "prototypes" else "examples"


def dumps_config(config: Config) -> dict[str, Any]:
    """What config.json holds."""
    return {"config": to_plain(config), "versions": versions()}
