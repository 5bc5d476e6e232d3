"""What is wrong with a run, from what it wrote: the detectors on its whole history, in order of consequence, and the
newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protojax.evals import detectors
from protojax.evals.history import History
from protojax.reporting.records import Run, as_number, load_run

FIELDS = ("detector", "severity", "step", "evidence", "cause", "advice")
LARGEST_CHECKPOINT = 2**30  # bytes on disk: reading more takes longer than a person waits for a diagnosis
WARMUP = 0.1  # share of a run before which a loss at chance is only a notice, as in training


@dataclass(frozen=True)
class Examination:
    """findings: dicts of `FIELDS`, errors first, then by consequence. asked: how many detectors had numbers to look at;
    silent: those of every workload that had none. records, step: how much was read. notes: what could not be read, and
    whether the run is finished."""

    findings: tuple[dict[str, Any], ...]
    asked: int
    silent: tuple[str, ...]
    records: int
    step: int
    notes: tuple[str, ...]

    @property
    def wrong(self) -> bool:
        """Is there an error or a warning? Notices alone are none."""
        return any(finding["severity"] != "notice" for finding in self.findings)


def examine(workdir: str | Path) -> Examination:
    """Run every detector over the history of a run again, and look for NaN in its newest checkpoint. Needs no data.

    Findings that only training itself could see (a gradient that was not finite) are taken from the record. Raises
    ValueError for a folder that holds no run, or one without any training or evaluation record.
    """
    run = load_run(workdir)
    records = sorted([*run.train, *run.evals], key=lambda r: (r["step"], r["kind"] == "eval"))
    if not records and not run.diagnoses:
        raise ValueError(f"{run.path} has no record of a step or an evaluation yet: there is nothing to examine.")
    found = {f["detector"]: f for f in detectors.diagnose(records, warmup_steps=_warmup_steps(records))}
    for record in run.diagnoses:  # the step that became NaN left no numbers behind
        name = str(record.get("detector"))
        if name not in found and (name == "not_finite" or name not in detectors.IDS):
            found[name] = {field: record.get(field, "") for field in FIELDS}
    saved, said = _checkpoint(run.path)
    if saved is not None:
        found.setdefault("not_finite", saved)
    history = History()
    names = {name for record in records for name in history.append(record)}
    asked = {d.id for d in detectors.TABLE if any(name.startswith(d.reads) for name in names)}
    silent = [d.id for d in detectors.GENERAL if d.id not in asked]
    ranked = sorted(found.values(), key=_rank)
    return Examination(tuple(ranked), len(asked), tuple(silent), len(records), history.step, (*_notes(run), *said))


def _checkpoint(workdir: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """(finding, notes) about the newest checkpoint: every array of it must be finite. Its prototypes are not audited
    again: the evaluation of the same step did that."""
    from protojax.checkpoint import NEWEST, steps_below

    folder = workdir / NEWEST
    steps = steps_below(folder)
    damaged = sorted(p.name for p in workdir.glob("damaged-*"))
    notes = [f"damaged checkpoints were set aside: {', '.join(damaged)}."] if damaged else []
    if not steps:
        return None, notes
    newest = folder / str(steps[-1])
    size = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
    if size > LARGEST_CHECKPOINT:
        return None, [*notes, f"checkpoint {steps[-1]} was not read: it has {size / 2**30:.1f} GiB."]
    from protojax.audit import directories
    from protojax.audit.tensors import FileError

    try:
        bad = directories.not_finite(newest)
    except FileError as error:
        return None, [*notes, f"checkpoint {steps[-1]} cannot be read, and an older one will be resumed from: {error}"]
    if not bad:
        return None, notes
    (row,) = (d for d in detectors.GENERAL if d.id == "not_finite")
    more = f" and {len(bad) - 1} more arrays" if len(bad) > 1 else ""
    seen = f"{bad[0]}{more} of checkpoint {steps[-1]} hold NaN or infinity."
    finding = (row.id, row.severity, steps[-1], seen, row.cause, row.advice)
    return dict(zip(FIELDS, finding, strict=True)), notes


def _rank(finding: Mapping[str, Any]) -> tuple[int, int]:
    severity, name = finding["severity"], finding["detector"]
    order = (detectors.SEVERITIES, severity), (detectors.IDS, name)
    first, second = (known.index(value) if value in known else len(known) for known, value in order)
    return first, second


def _warmup_steps(records: Sequence[Mapping[str, Any]]) -> int:
    """A tenth of the run's planned length, which every record tells by its `fraction`."""
    for record in reversed(records):
        fraction = as_number(record.get("fraction"))
        if fraction:
            return round(WARMUP * float(record["step"]) / fraction)
    return 0


def _notes(run: Run) -> list[str]:
    return [problem for problem in run.problems if "report_data" not in problem]


def lines(workdir: str | Path, seen: Examination) -> list[str]:
    """The examination as plain sentences."""
    real = [f for f in seen.findings if f["severity"] != "notice"]
    what = f"{seen.records} records up to step {seen.step:,}"
    if real:
        said = [f"{len(real)} thing{'s are' if len(real) > 1 else ' is'} wrong with {workdir} ({what}):"]
    else:
        said = [f"Nothing is wrong with {workdir}: none of {seen.asked} detectors fired on {what}."]
    for number, finding in enumerate(seen.findings, start=1):
        said += ["", f"{number}. [{finding['severity']}] {finding['detector']}, step {finding['step']}"]
        said += [f"   Seen: {finding['evidence']}"]
        said += [f"   {name}: {finding[field]}" for name, field in (("Usual cause", "cause"), ("Try", "advice"))]
    if seen.silent:
        said += ["", f"Without a number to look at: {', '.join(seen.silent)}."]
    return said + [f"Note: {note}" for note in seen.notes]
