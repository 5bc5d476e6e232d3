"""What the detectors said in the default runs at full length, counted from the records of docs/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Records, whether one is a run of the default, and the page that shows it.
Choice = Callable[[dict[str, Any]], bool]
DEFAULTS: dict[str, tuple[str, Choice]] = {
    "prototypes": ("quickstart", lambda r: r["trial"] == "decoupled"),
    "soft_labels": ("soft_labels", lambda r: r["argument"].split(",")[0] == "default"),
    "prompts": ("prompts", lambda r: r["arm"] == "default"),
    "alignment": ("alignment", lambda r: r["row"] == "P3" and r["check"].startswith("default") and r["ok"] is not None),
}


def fired(record: dict[str, Any]) -> list[str]:
    """Detectors of a record, notices left out: alignment's table holds their names (`seen`), the others `findings`, a
    list or detector -> finding."""
    if "seen" in record:
        return record["seen"]
    found = record["findings"]
    if isinstance(found, dict):
        return [name for name, finding in found.items() if finding["severity"] != "notice"]
    return [finding["detector"] for finding in found if finding["severity"] != "notice"]


def runs(folder: Path) -> Iterator[tuple[str, str, list[list[str]]]]:
    """(workload, page, what fired in each of its default runs)."""
    for workload, (name, choose) in DEFAULTS.items():
        path = folder / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        yield workload, name, [fired(r) for r in map(json.loads, lines) if choose(r)]
