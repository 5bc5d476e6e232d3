"""Runs of `benchmarks.alignment`, their records, and the page that is made of these."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
NOT_RUN = "not run"


class Job(NamedTuple):
    """One training run: config file, arm and flags, overrides; data: a file of --data that it reads ('': the folder
    itself, None: nothing)."""

    config: str
    arm: str
    more: tuple[tuple[str, Any], ...] = ()
    data: str | None = None

    @property
    def name(self) -> str:
        extra = "".join(f"-{k.rsplit('.', 1)[-1]}_{v}" for k, v in self.more)
        return f"{self.config.replace('/', '_')}-{self.arm.replace(',', '-')}{extra}"

    def command(self, seed: int, workdir: Path, folder: str | None) -> list[str]:
        out = [sys.executable, "-m", "protojax", "train", f"--config={self.config}:{self.arm}", f"--workdir={workdir}",
               f"--config.seed={seed}"]  # fmt: skip
        out += [f"--config.{k}={v}" for k, v in self.more]
        return out if self.data is None else [*out, f"--config.data.root={Path(folder or 'DATA') / self.data}"]

    def shown(self, seed: int) -> str:
        """The command as the page says it: without paths of this machine."""
        return " ".join(["protojax", *self.command(seed, Path("runs") / f"{self.name}-{seed}", None)[3:]])


class Bench:
    """Runs jobs, keeps their results, and remembers what was asked."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out, self.runs = options, Path(options.out), Path(options.runs)
        self.records: list[dict[str, Any]] = []

    def run(self, job: Job, seed: int) -> dict[str, Any] | None:
        """Summary and metrics of a finished run, trained now where it was not; None past the time allowed, or without
        the data it needs."""
        if self.options.smoke:
            job = job._replace(arm=f"{job.arm},smoke", more=tuple(m for m in job.more if not m[0].startswith("method")))
        workdir = self.runs / f"{job.name}-{seed}"
        if not (workdir / "summary.json").exists():
            if self.options.only_report or time.time() > self.options.until:
                return None
            if job.data is not None and not self.options.data:
                return None
            began = time.time()
            found = subprocess.run(
                job.command(seed, workdir, self.options.data), cwd=ROOT, capture_output=True, text=True
            )
            if found.returncode:
                print(found.stdout[-2000:], found.stderr[-2000:], file=sys.stderr)
                raise SystemExit(f"{job.shown(seed)} failed")
            if not (workdir / "summary.json").exists():  # SIGTERM saves and leaves with status 0
                raise SystemExit(f"{job.shown(seed)} was stopped before its end; the same command goes on from there")
            print(f"{workdir.name}: {time.time() - began:.0f} s", flush=True)
        summary = json.loads((workdir / "summary.json").read_text())
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return {"summary": summary, "records": lines, "command": job.shown(seed), "workdir": workdir}

    def add(
        self, row: str, seed: int, check: str, target: str, seen: Any, ok: bool | None, command: str,
        chance: float | None = None,
    ) -> None:  # fmt: skip
        record = {"row": row, "seed": seed, "check": check, "target": target, "seen": seen, "ok": ok,
                  "command": command, "chance": chance, "smoke": self.options.smoke}  # fmt: skip
        self.records.append(record)
        print(json.dumps(record), flush=True)

    def missing(self, row: str, seed: int, check: str, target: str, job: Job) -> None:
        self.add(row, seed, check, target, NOT_RUN, None, job.shown(seed))


# ------------------------------------------------------------------------------------------------- of one run
def final(found: Mapping[str, Any]) -> dict[str, Any]:
    return found["summary"]["alignment"]


def at_full(scores: Mapping[str, float]) -> float:
    """The value at the largest width."""
    return float(scores[max(scores, key=int)])


def r1(found: Mapping[str, Any]) -> float:
    return at_full(final(found)["r1"])


def retention(found: Mapping[str, Any], share: int) -> float:
    kept = final(found)["retention"]
    return float(kept.get(str(int(max(kept, key=int)) // share)) or 0.0)


def fired(found: Mapping[str, Any]) -> set[str]:
    return {f["detector"] for f in found["summary"]["findings"] if f["severity"] != "notice"}


def last_epoch(found: Mapping[str, Any]) -> list[dict[str, float]]:
    train = [r for r in found["records"] if r["kind"] == "train"]
    epochs = float(final(found)["epoch"])
    first = train[-1]["step"] * (1 - 1 / max(1.0, epochs))
    return [r["metrics"] for r in train if r["step"] > first] or [train[-1]["metrics"]]


# --------------------------------------------------------------------------------------------------- the page
def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records in the order of the page: a row and seed that was measured now replaces what was known of it; what was
    not run now replaces nothing that was."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for records in (old, new):
        here: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for record in records:
            here.setdefault((record["row"], record["seed"]), []).append(record)
        for key, own in here.items():
            if key not in groups or any(r["seen"] != NOT_RUN for r in own):
                groups[key] = own
    order = lambda key: ("PDAS".index(key[0][0]), int(key[0][1:]), key[1])  # noqa: E731
    return [record for key in sorted(groups, key=order) for record in groups[key]]


def _line(*cells: Any) -> str:
    """One line of a table; a bar inside a cell is no border."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def page(records: Sequence[dict[str, Any]]) -> str:
    lines = ["# Image-text alignment: acceptance table", "",
             "Made by `python -m benchmarks.alignment`; every line names its command.",
             "P1 to P12: acceptance. D: data sets with an encoder of ours. A: what else was compared. S: speed.",
             "`ok` is blank where there is no target, or the run was not made. DATA: the folder of --data.", "",
             *spread(records),
             "| row | seed | check | target | seen | ok | command |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for r in records:
        ok = "" if r["ok"] is None else "yes" if r["ok"] else "**no**"
        cells = (r["row"], r["seed"], r["check"], r["target"], _cell(r["seen"]), ok, f"`{r['command']}`")
        lines.append(_line(*cells))
    return "\n".join(lines) + "\n"


def spread(records: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the figures that have a chance level: mean and range over seeds, chance beside."""
    figures: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in records:
        if r.get("chance") is not None and r["seen"] != NOT_RUN:
            figures.setdefault((r["row"], r["check"]), []).append(r)
    if not figures:
        return []
    lines = ["| row | figure | mean | least to largest | seeds | chance |", "| --- | --- | --- | --- | --- | --- |"]
    for (row, check), own in figures.items():
        seen = [float(r["seen"]) for r in own]
        values = (_cell(float(np.mean(seen))), f"{_cell(min(seen))} to {_cell(max(seen))}", len(seen))
        lines.append(_line(row, check, *values, _cell(own[0]["chance"])))
    return [*lines, ""]


def write(bench: Bench) -> None:
    """The records, merged with those of earlier calls, and the page."""
    path = bench.out / ("alignment_smoke.jsonl" if bench.options.smoke else "alignment.jsonl")
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    records = merged(old, bench.records)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    text = page(records)
    path.with_suffix(".md").write_text(text)
    print(text)


def _cell(seen: Any) -> str:
    if isinstance(seen, float):
        return f"{seen:.4g}"
    return ", ".join(_cell(s) for s in seen) if isinstance(seen, list) else str(seen)
