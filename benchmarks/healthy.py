"""Do detectors fire where they must, and stay silent where all is well? docs/results/doctor.md.

    python -m benchmarks.healthy                            # 20 seeds a workload, and every failure config; resumes
    python -m benchmarks.healthy --only alignment --seeds 3
    python -m benchmarks.healthy --only failures            # every file of configs/failures/, seed 0
    python -m benchmarks.healthy --table                    # write the page from what is there

The healthy run of a workload is the one that its failure configs start from (`protojax.failures`). The trainer trains
them all; seeds of one configuration find its compiled programs in the cache. Each run leaves one line in
docs/results/doctor.jsonl: what fired in training (`diagnosis` records) and what the doctor says afterwards.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_collections

from benchmarks import full_length
from protojax import configs_path, experiment, failures, running, summary
from protojax.config import freeze
from protojax.reporting.doctor import examine

OUT = Path("docs/results/doctor.jsonl")
SEEDS = 20
HEALTHY: dict[str, Callable[[], ml_collections.ConfigDict]] = {
    "prototypes": lambda: experiment.fill(failures.healthy("healthy")),
    "soft_labels": lambda: failures.soft_labels("healthy", "default"),
    "prompts": lambda: failures.prompts("healthy", "default"),
    "alignment": lambda: failures.alignment("healthy", "perceiver"),
}


def quiet(cfg: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Without what only a person looks at."""
    cfg.run.report = cfg.run.progress = cfg.run.tensorboard = False
    return cfg


# ------------------------------------------------------------------------------------------------------- records
def fired(workdir: Path) -> dict[str, Any]:
    """{'training': {detector: first step} of the errors and warnings that the run wrote as it went, 'doctor':
    {detector: step} of those that the doctor finds in the folder, 'notices': {detector: step} of its notices (not
    those of findings that have gone again), 'steps'}."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    said: dict[str, int] = {}
    for record in lines:
        if record["kind"] == "diagnosis" and record["severity"] != "notice":
            said.setdefault(record["detector"], record["step"])
    findings = examine(workdir).findings
    found = {f["detector"]: f["step"] for f in findings if f["severity"] != "notice"}
    notices = {f["detector"]: f["step"] for f in findings
               if f["severity"] == "notice" and not f["evidence"].startswith("Gone")}  # fmt: skip
    return {"training": said, "doctor": found, "notices": notices, "steps": max(r["step"] for r in lines)}


def silent(record: dict[str, Any]) -> list[str]:
    """Detectors that a failure config must fire and that said nothing, in training or afterwards."""
    heard = [{**record[who], **record["notices"]} for who in ("training", "doctor")]
    return [name for name in expected(record["config"]) if any(name not in found for found in heard)]


def learned(workload: str, workdir: Path) -> dict[str, float]:
    """{'before', 'after'}: one number that training should have raised, at step 0 and at the end."""
    path = {
        "prototypes": ("knn", "fine", "5"),
        "soft_labels": ("soft_labels", "val", "skill"),
        "prompts": ("prompts", "e_step", "purity"),
        "alignment": ("alignment", "i2t"),
    }[workload]
    values = []
    for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "eval":
            at: Any = record["metrics"]
            for name in path:
                at = at[name]
            if workload == "alignment":
                at = at[max(at, key=int)]["recall"]["1"]
            values.append(float(at))
    return {"before": values[0], "after": values[-1]}


def train(cfg: ml_collections.ConfigDict, workdir: Path, cache: str) -> None:
    """As `protojax train` does, silent. cache: folder of compiled programs."""
    cfg = quiet(cfg)
    cfg.system.compilation_cache = cache
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        running.train_config(freeze(cfg), workdir, say=lambda text: None)


def clocks() -> tuple[float, float]:
    """(seconds, processor seconds) that are given to `outcome`."""
    return time.perf_counter(), time.process_time()


def outcome(workdir: Path, began: tuple[float, float]) -> dict[str, Any]:
    """What a run of either kind leaves on record: what fired, and how long it took since `began`."""
    seconds, processor = (round(now - then, 1) for now, then in zip(clocks(), began, strict=True))
    return {**fired(workdir), "seconds": seconds, "cpu_seconds": processor, "versions": summary.versions()}


def healthy_runs(workload: str, seeds: Iterable[int], cache: str = "") -> Iterator[dict[str, Any]]:
    """Yield a record a seed of the healthy run of a workload. cache: as of `train`."""
    cfg = HEALTHY[workload]()
    for seed in seeds:
        cfg.seed = seed
        with tempfile.TemporaryDirectory(prefix="protojax-healthy-") as folder:
            began = clocks()
            train(cfg, Path(folder), cache)
            yield {
                "kind": "healthy", "workload": workload, "seed": seed, **learned(workload, Path(folder)),
                **outcome(Path(folder), began),
            }  # fmt: skip


def failure_names() -> list[str]:
    """Every file of configs/failures/, without its ending."""
    return sorted(path.stem for path in configs_path.find("failures/prototypes_joint").parent.glob("*_*.py"))


def expected(name: str) -> list[str]:
    """Detector ids that the header of a failure config says must fire."""
    text = ast.get_docstring(ast.parse(configs_path.find(f"failures/{name}").read_text(encoding="utf-8"))) or ""
    found = re.search(r"^Fires: ([a-z_, ]+)$", text, re.M)
    if not found:
        raise ValueError(f"configs/failures/{name}.py: expected a line 'Fires: ID, ID' in its docstring, found none.")
    return found[1].split(", ")


def failure_run(name: str, workdir: Path, cache: str = "") -> dict[str, Any]:
    """Train one failure config and say what fired. cache: as of `train`."""
    began = clocks()
    with contextlib.suppress(FloatingPointError):  # not_finite stops the run
        train(configs_path.load(f"failures/{name}"), workdir, cache)
    return {"kind": "failure", "config": name, **outcome(workdir, began)}


# ---------------------------------------------------------------------------------------------------------- page
def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records so far, but for those of failure configs that are no more; the last one of a run counts."""
    if not path.is_file():
        return []
    known = {None, *failure_names()}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("config") not in known:
            continue
        found[record["kind"], record.get("workload"), record.get("seed"), record.get("config")] = record
    return list(found.values())


def page(records: list[dict[str, Any]], folder: Path) -> str:
    """docs/results/doctor.md; `folder`: where the other benchmarks keep their records."""
    out = [
        "# Detectors: where they fire and where they are silent",
        "",
        "Written by `python -m benchmarks.healthy`; every run is a line of [doctor.jsonl](doctor.jsonl). Errors and "
        "warnings are counted, notices are not. What each detector means: [troubleshooting.md]"
        "(../troubleshooting.md#detectors).",
        "",
        "## Healthy runs",
        "",
        "The small run that the failure configs of a workload start from (prototypes: `failures.healthy`, with "
        "whitened features), one row a workload: how many seeds, how many of them had any finding, in training "
        "or by the doctor afterwards, and one number before and after training.",
        "",
        "| workload | seeds | steps | processor s a run, median | in training | by the doctor | learned (mean) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for workload in HEALTHY:
        rows = [r for r in records if r["kind"] == "healthy" and r["workload"] == workload]
        if rows:
            seconds = sorted(r["cpu_seconds"] for r in rows)[len(rows) // 2]
            before, after = (sum(r[k] for r in rows) / len(rows) for k in ("before", "after"))
            seen = (_counts(r["training"] for r in rows), _counts(r["doctor"] for r in rows))
            learnt = f"{MEASURE[workload]}: {before:.3f} to {after:.3f}"
            cells = (workload, len(rows), rows[0]["steps"], f"{seconds:.1f}", *seen, learnt)
            out.append(f"| {' | '.join(map(str, cells))} |")
    out += [
        "",
        "## Failures",
        "",
        "Every file of `configs/failures/`, seed 0, trained as `protojax train --config=failures/NAME` does. Step: the "
        "first at which training said so. Processor seconds include compilation, as far as it was not in the cache.",
        "",
        "| config | must fire | first step | heard, in training and by the doctor | also fired | processor s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for record in sorted((r for r in records if r["kind"] == "failure"), key=lambda r: r["config"]):
        wanted, training, missed = expected(record["config"]), record["training"], silent(record)
        first = {**record["notices"], **training}
        steps = ", ".join(str(first.get(d, "**silent**")) for d in wanted)
        more = sorted({*training, *record["doctor"]} - set(wanted))
        cells = (record["config"], _ids(wanted), steps, f"**without {_ids(missed)}**" if missed else "yes",
                 _ids(more) or "-", f"{record['cpu_seconds']:.0f}")  # fmt: skip
        out.append(f"| {' | '.join(cells)} |")
    out += [
        "",
        "## Defaults at full length",
        "",
        "The runs of the default in the other pages of this folder, all seeds and data sets: how many had a finding.",
        "",
        "| workload | page | runs | fired |",
        "| --- | --- | --- | --- |",
    ]
    for workload, name, seen in full_length.runs(folder):
        out.append(
            f"| {workload} | [{name}]({name}.md) | {len(seen) or 'none yet'} | {_counts(seen) if seen else ''} |"
        )
    latest = max(records, key=lambda r: r.get("versions", {}).get("protojax", ""), default={})
    versions = ", ".join(f"{k} {v}" for k, v in latest.get("versions", {}).items())
    return "\n".join([*out, "", f"One CPU device. {versions}.", ""])


def _ids(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _counts(found: Iterable[Iterable[str]]) -> str:
    """'none', or how many runs had which finding."""
    counts: dict[str, int] = {}
    for names in found:
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"`{name}` {count}" for name, count in sorted(counts.items())) or "none"


MEASURE = {
    "prototypes": "k-NN, k = 5",
    "soft_labels": "skill",
    "prompts": "mode purity",
    "alignment": "R@1",
}


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the page. Exit status 1 where a failure was silent or a healthy run was not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join((*HEALTHY, "failures")), help="workloads, 'failures', or its files")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="0, 1, ..., SEEDS - 1 of every workload")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cache", default=os.path.expanduser("~/.cache/protojax/jax"), help="of compiled programs")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    done = read_lines(options.out)
    names = [] if options.table else options.only.split(",")
    with options.out.open("a", encoding="utf-8") as file:

        def keep(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            shown = {k: v for k, v in record.items() if k not in ("versions", "notices", "kind")}
            print(json.dumps(shown), flush=True)

        for workload in (name for name in names if name in HEALTHY):
            had = {r["seed"] for r in done if r["kind"] == "healthy" and r["workload"] == workload}
            for record in healthy_runs(workload, [s for s in range(options.seeds) if s not in had], options.cache):
                keep(record)
        had = {r["config"] for r in done if r["kind"] == "failure"}
        for name in failure_names():
            if name in names or ("failures" in names and name not in had):
                with tempfile.TemporaryDirectory(prefix="protojax-failure-") as folder:
                    keep(failure_run(name, Path(folder), options.cache))
    records = read_lines(options.out)
    options.out.with_suffix(".md").write_text(page(records, options.out.parent), encoding="utf-8")
    missed = any(r["kind"] == "failure" and silent(r) for r in records)
    loud = any(r["kind"] == "healthy" and (r["training"] or r["doctor"]) for r in records)
    return int(missed or loud)


if __name__ == "__main__":
    sys.exit(main())
