"""Reading a run directory: `metrics.jsonl`, `summary.json`, `config.json`, `report_data.npz`.

A damaged or missing piece is named in `Run.problems` and the rest is used; only a directory that holds nothing of a
run is an error.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("train", "eval", "diagnosis", "event")
# Number of axes of every array that report_data.npz of a run with prototypes may hold.
ARRAY_AXES = {
    "prototypes": 2,
    "usage": 1,
    "similarity": 2,
    "sample_prototypes": 1,
    "sample_images": 5,
    "projection": 2,
    "sample_names": 1,
    "sample_purity": 1,
    "class_counts": 1,
    "class_coverage": 1,
    "class_prototypes": 1,
}
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Run:
    """All that a run directory holds.

    train, evals: records in order of step, the last record of a step where a resumed run wrote it twice. diagnoses,
    events: records in order of the file. summary, config: None where the file is absent or damaged. versions: of the
    packages, by name. arrays: what `report_data.npz` holds. problems: sentences about what could not be read.
    """

    path: Path
    train: tuple[dict[str, Any], ...]
    evals: tuple[dict[str, Any], ...]
    diagnoses: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None
    config: dict[str, Any] | None
    versions: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    problems: tuple[str, ...]


def load_run(run_dir: str | Path) -> Run:
    """Read a run directory.

    Raises:
      ValueError: the directory does not exist, is a file, or holds neither `metrics.jsonl` nor `summary.json`.
    """
    path = Path(run_dir)
    if not path.exists():
        raise ValueError(f"no run directory {path}: it does not exist. Give the --workdir of a training run.")
    if not path.is_dir():
        raise ValueError(f"{path} is a file, expected a run directory. Give the --workdir of a training run.")
    if not (path / "metrics.jsonl").is_file() and not (path / "summary.json").is_file():
        raise ValueError(
            f"{path} is not a run directory: it holds neither metrics.jsonl nor summary.json. "
            "Give the --workdir of a training run that has made at least one log entry."
        )
    problems: list[str] = []
    records = _read_lines(path / "metrics.jsonl", problems)
    summary = _read_object(path / "summary.json", problems)
    config = _read_object(path / "config.json", problems)
    versions = dig(summary, "versions") or dig(config, "versions")
    # config.json holds {"config": ..., "versions": ...}, or the config alone.
    config = config["config"] if config is not None and isinstance(config.get("config"), dict) else config
    return Run(
        path=path,
        train=_by_step(r for r in records if r["kind"] == "train"),
        evals=_by_step(r for r in records if r["kind"] == "eval"),
        diagnoses=tuple(r for r in records if r["kind"] == "diagnosis"),
        events=tuple(r for r in records if r["kind"] == "event"),
        summary=summary,
        config=config,
        versions=versions if isinstance(versions, Mapping) else {},
        arrays=_read_arrays(path / "report_data.npz", problems),
        problems=tuple(problems),
    )


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        problems.append(f"{path.name} is absent: there are no curves.")
        return []
    records, damaged = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            damaged.append(f"{path.name} line {number} is not JSON ({error}): skipped.")
            continue
        if not isinstance(record, dict) or record.get("kind") not in KINDS:
            damaged.append(f"{path.name} line {number} has no kind of {', '.join(KINDS)}: skipped.")
        elif record["kind"] in ("train", "eval") and not isinstance(as_number(record.get("step")), float):
            damaged.append(f"{path.name} line {number} has no step: skipped.")
        else:
            records.append(record)
    problems.extend(damaged[:_SHOWN_PROBLEMS])
    if len(damaged) > _SHOWN_PROBLEMS:
        problems.append(f"{path.name}: {len(damaged) - _SHOWN_PROBLEMS} more damaged lines were skipped.")
    return records


def _by_step(records: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    latest = {record["step"]: record for record in records}
    return tuple(latest[step] for step in sorted(latest))


def _read_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        problems.append(f"{path.name} is absent" + (": the run has not finished." if "summary" in path.name else "."))
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        problems.append(f"{path.name} is damaged ({error}): not used.")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds a {type(value).__name__}, expected an object: not used.")
        return None
    return value


def _read_arrays(path: Path, problems: list[str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        problems.append(f"{path.name} is absent: no similarity matrix, usage histogram or sample images.")
        return {}
    arrays: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in archive.files:
                array = archive[name]
                if name not in ARRAY_AXES:  # of another workload, whose page knows what it is
                    arrays[name] = array
                elif array.ndim != ARRAY_AXES[name] or array.size == 0:
                    expected = ARRAY_AXES[name]
                    problems.append(f"{path.name}: {name} has shape {array.shape}, expected {expected} axes: not used.")
                else:
                    arrays[name] = array
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        problems.append(f"{path.name} is damaged ({error}): what it still gave is used.")
    return _consistent(arrays, path.name, problems)


def _consistent(arrays: dict[str, np.ndarray], name: str, problems: list[str]) -> dict[str, np.ndarray]:
    """Drop arrays whose K or p disagrees with the others', so that no figure pairs the wrong rows."""
    pairs = (
        ("usage", 0, "prototypes", 0),
        ("projection", 0, "usage", 0),
        ("sample_images", 0, "sample_prototypes", 0),
        ("similarity", 0, "similarity", 1),
        ("sample_names", 0, "sample_images", 0),
        ("sample_purity", 0, "sample_images", 0),
        ("class_coverage", 0, "class_counts", 0),
        ("class_prototypes", 0, "class_counts", 0),
    )
    for first, axis, second, other in pairs:
        if first in arrays and second in arrays and arrays[first].shape[axis] != arrays[second].shape[other]:
            shapes = f"{arrays[first].shape} and {arrays[second].shape}"
            problems.append(f"{name}: {first} and {second} do not agree in shape ({shapes}): {first} is not used.")
            del arrays[first]
    return arrays


# ------------------------------------------------------------------------------------------------- access
def as_number(value: Any) -> float | None:
    """A JSON value as a float; None for anything that is not a finite number (booleans are not numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def dig(record: Any, *path: str) -> Any:
    """record[path[0]][path[1]]..., or None where a step of the path is missing."""
    for name in path:
        if not isinstance(record, Mapping) or name not in record:
            return None
        record = record[name]
    return record


def by_epsilon(counts: Any) -> dict[float, float]:
    """{"0.025": 512, ...} with its keys as numbers; entries that are not numbers are left out."""
    result = {}
    for name, value in counts.items() if isinstance(counts, Mapping) else ():
        number = as_number(value)
        if number is None:
            continue
        try:
            result[float(name)] = number
        except ValueError:
            continue
    return result


def series(records: Sequence[Mapping[str, Any]], *path: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [t], values [t]) of one number over records; NaN where the record names it and it is not finite."""
    steps, values = [], []
    for record in records:
        parent = dig(record, *path[:-1])
        if not isinstance(parent, Mapping) or path[-1] not in parent:
            continue
        number = as_number(parent[path[-1]])
        steps.append(float(record["step"]))
        values.append(math.nan if number is None else number)
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def flatten(record: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, names joined by '/'."""
    if not isinstance(record, Mapping):
        return {prefix: record}
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat.update(flatten(value, f"{prefix}/{name}" if prefix else str(name)))
    return flat


def find_key(config: Any, *names: str) -> tuple[str, Any] | None:
    """(dotted path, value) of the shallowest key of a nested config that has one of the names, in order of names."""
    for wanted in names:
        level: list[tuple[str, Any]] = [("", config)]
        while level:
            below: list[tuple[str, Any]] = []
            for prefix, node in level:
                if not isinstance(node, Mapping):
                    continue
                if wanted in node and not isinstance(node[wanted], Mapping):
                    return f"{prefix}{wanted}", node[wanted]
                below.extend((f"{prefix}{name}.", child) for name, child in node.items())
            level = below
    return None


def write_text(path: Path, content: str) -> Path:
    """Write a file whole or not at all; ValueError where its folder cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(content, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}): give a folder that can be written.") from error
    return path
