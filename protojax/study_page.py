"""What a study found: a record a run, and from the records a page with tables and plots.

Records (OUT.jsonl) outlive the folders of the runs: a study that is made in several sittings, or on several machines,
goes on from them. The page (OUT.md) keeps what people wrote: only what stands between the two markers is replaced.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from protojax import measuring
from protojax.metrics import read_records
from protojax.reporting.records import as_number, dig, series
from protojax.study import Row, Study, identity, recorded, workdir

BEGIN, END = "<!-- study: begin (written by `protojax study`) -->", "<!-- study: end -->"


def results(study: Study, root: Path, records: Path | None = None) -> dict[str, dict[int, dict[str, Any]]]:
    """label -> seed -> summary with what was measured ('measured'), its curves ('curves': title -> [steps, values])
    and 'configuration': of the runs below `root` that are finished, else of the record of a run."""
    kept = recorded(study, records)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for trial in study.trials:
        for seed in study.seeds:
            where = workdir(root, trial, seed)
            if (where / "summary.json").exists():
                run = json.loads((where / "summary.json").read_text())
                run |= {"configuration": identity(trial, seed), "curves": _curves(study, where)}
                taken = measuring.found(where, study.measures)
                found.setdefault(trial.label, {})[seed] = {**run, **({"measured": taken} if taken else {})}
            elif seed in kept.get(trial.label, {}):
                found.setdefault(trial.label, {})[seed] = kept[trial.label][seed]
    return found


def _curves(study: Study, where: Path) -> dict[str, list[list[float]]]:
    """title -> [steps, values] of the run's evaluations."""
    path = where / "metrics.jsonl"
    evaluations = [r for r in read_records(path) if r["kind"] == "eval"] if path.exists() else []
    drawn = {title: series(evaluations, "metrics", *at.split("/")) for title, at in study.curves.items()}
    return {title: [steps.tolist(), seen.tolist()] for title, (steps, seen) in drawn.items() if steps.size}


def values(row: Row, runs: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """The row's numbers, a seed each, scaled; seeds without one are left out."""
    summaries = [summary for _, summary in sorted(runs.items())]
    if isinstance(row.value, str):
        path = row.value.split("/")
        raw = [as_number(dig(summary, *path)) for summary in summaries]
    else:
        raw = [row.value(summary) for summary in summaries]
    return [row.scale * v for v in raw if v is not None]


def spread(numbers: Sequence[float], digits: int) -> str:
    """'mean ± sample standard deviation', the number alone for one seed, a dash for none."""
    if not numbers:
        return "–"
    mean = f"{statistics.fmean(numbers):.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{digits}f}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """(difference of means, its standard error sqrt(s1^2 / n1 + s2^2 / n2)); None below two numbers a side."""
    if len(ours) < 2 or len(theirs) < 2:
        return None
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    return statistics.fmean(ours) - statistics.fmean(theirs), error


def markdown(study: Study, found: Mapping[str, Mapping[int, Mapping[str, Any]]], command: str) -> str:
    """The generated part of a results page: command, machine, table of means and spreads, comparison. found: the
    `results`. Raises ValueError when there are none."""
    if not found:
        raise ValueError(f"no run of study {study.name!r} is finished or on record: run it without --tables first.")
    made = {
        f"{run['device']}. {', '.join(f'{k} {v}' for k, v in run['versions'].items())}"
        for runs in found.values()
        for run in runs.values()
    }
    labels = [t.label for t in study.trials if t.label in found]
    out = [study.question, "", f"Command: `{command}`. Device: {'; or '.join(sorted(made))}.", ""]
    cells = [[spread(values(row, found[n]), row.digits) for n in labels] for row in study.rows]
    counted = [f"{n} ({len(found[n])})" for n in labels]
    out += _table("mean ± standard deviation over seeds", [r.title for r in study.rows], counted, cells, study.tall)
    compared = [row for row in study.rows if row.title in study.compared]
    if study.reference is not None and study.reference in found and compared:
        out += ["", f"Difference of {study.reference} to each (its standard error):", ""]
        others = [n for n in labels if n != study.reference]
        ours = found[study.reference]
        cells = [[_gap(row, ours, found[n]) for n in others] for row in compared]
        out += _table("", [r.title for r in compared], others, cells, study.tall)
    missing = {t.label: [s for s in study.seeds if s not in found.get(t.label, {})] for t in study.trials}
    if any(missing.values()):
        out += ["", f"Not run: {_missing(missing, len(study.seeds))}."]
    return "\n".join(out)


def _missing(missing: Mapping[str, Sequence[int]], seeds: int) -> str:
    """'joint seed 2; no seed of paper, frozen' for {'joint': [2], 'paper': [0, 1, 2], 'frozen': [0, 1, 2]}."""
    parts = [
        f"{label} seed{'s' * (len(left) > 1)} {', '.join(map(str, left))}"
        for label, left in missing.items()
        if 0 < len(left) < seeds
    ]
    whole = [label for label, left in missing.items() if len(left) == seeds]
    return "; ".join(parts + [f"no seed of {', '.join(whole)}"] * bool(whole))


def _gap(row: Row, ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> str:
    pair = difference(values(row, ours), values(row, theirs))
    return "–" if pair is None else f"{pair[0]:+.{row.digits}f} ({pair[1]:.{row.digits + 1}f})"


def _table(corner: str, rows: list[str], columns: list[str], cells: list[list[str]], turned: bool) -> list[str]:
    """Lines of a Markdown table, cells[row][column]; `turned`: columns go down."""
    if turned:
        rows, columns, cells = columns, rows, [list(column) for column in zip(*cells, strict=True)]
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    lines += [[title, *line] for title, line in zip(rows, cells, strict=True)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def insert(page: str, generated: str) -> str:
    """The page with the generated part between the markers (appended where there are none yet)."""
    part = f"{BEGIN}\n\n{generated}\n\n{END}"
    if BEGIN in page and END in page:
        head, _, rest = page.partition(BEGIN)
        return head + part + rest.partition(END)[2]
    return (page.rstrip() + "\n\n" if page.strip() else "") + part + "\n"


def write(study: Study, root: Path, out: Path, command: str) -> list[Path]:
    """Write OUT.md (its generated part), OUT.jsonl (a record a run) and OUT.svg (curves). Returns the paths."""
    records = out.with_suffix(".jsonl")
    found = results(study, root, records)
    generated = markdown(study, found, command)
    written = [out, records]
    out.parent.mkdir(parents=True, exist_ok=True)
    if study.curves:
        from protojax.reporting.study_plot import draw

        picture = out.with_suffix(".svg")
        picture.write_text(
            draw([*study.curves], {n: [r["curves"] for r in runs.values()] for n, runs in found.items()})
        )
        generated += f"\n\n![{', '.join(study.curves)} over training]({picture.name})"
        written.append(picture)
    page = out.read_text() if out.exists() else f"# {study.name}\n"
    out.write_text(insert(page, generated))
    lines = [
        {"study": study.name, "trial": label, "command": command, **{k: v for k, v in run.items() if k != "config"}}
        for label, runs in found.items()
        for _, run in sorted(runs.items())
    ]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return written
