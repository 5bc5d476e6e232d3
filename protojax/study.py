"""Studies: arms x seeds over configs, resumable.

A study is a Python file with `get_study(smoke=False) -> Study`, or `get_study(smoke=False, argument='...')` for a study
over several data sets, asked for as NAME:ARGUMENT (see configs/studies/). `run` trains and measures what is missing,
each run in a process of its own; `study_page.write` turns the summaries into Markdown, a JSON line a run and plots.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_collections

from protojax import configs_path, measuring, overrides
from protojax import jobs as jobs_lib
from protojax.config import Config, freeze, suggest
from protojax.measuring import Measure


@dataclass(frozen=True)
class Trial:
    """One column: `config` (FILE[:ARGUMENT]) with `changes` ({'method.steps': 100}) over all seeds of the study."""

    label: str
    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table: `path` into summary.json ('knn/fine/20'), or a function of it; printed times `scale`."""

    title: str
    value: str | Callable[[Mapping[str, Any]], float | None]
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True)
class Study:
    """name; question: what it asks, a sentence or two; trials x seeds; rows of the table; reference: label of the trial
    that the others are compared with in `compared` rows (titles); curves: title -> path into the evaluation records,
    drawn over steps.

    measures: taken on every finished run (`measuring`), rows find them below 'measured/'. runs: the folder of the runs,
    which studies that train the same trials share (None: the study's name). tall: a trial a line, for many trials."""

    name: str
    question: str
    trials: tuple[Trial, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str | None = None
    compared: tuple[str, ...] = ()
    curves: Mapping[str, str] = field(default_factory=dict)
    measures: tuple[Measure, ...] = ()
    runs: str | None = None
    tall: bool = False


def load(name: str, smoke: bool = False) -> Study:
    """The study of a file, or of an installed name ('quickstart' means configs/studies/quickstart.py), with what stands
    behind a colon as its argument.

    Raises FileNotFoundError with the nearest name, ValueError for a file without get_study, an argument that the study
    does not take, and for a study in which two trials share a label or the reference is none of them.
    """
    name, _, argument = name.partition(":")
    path = Path(name) if Path(name).is_file() else configs_path.find(f"studies/{name}")
    get_study = configs_path.function_of(path, "get_study", "smoke=False", "study")
    if argument and "argument" not in inspect.signature(get_study).parameters:
        raise ValueError(f"{path}: this study takes no argument, got {argument!r}.")
    study = get_study(smoke, argument) if argument else get_study(smoke)
    labels, titles = [t.label for t in study.trials], [r.title for r in study.rows]
    if len({*labels}) < len(labels) or not labels or not study.seeds:
        raise ValueError(
            f"{path}: a study needs at least one trial and one seed, and labels that differ; got {labels}."
        )
    if study.reference is not None and study.reference not in labels:
        raise ValueError(f"{path}: reference {study.reference!r} is none of the trials {labels}.")
    if unknown := sorted({*study.compared} - {*titles}):
        raise ValueError(f"{path}: compared rows {unknown} are not among the rows {titles}.")
    return study


def config_of(trial: Trial, seed: int) -> Config:
    """The trial's configuration with its changes and the seed. Raises ValueError for a key that does not exist."""
    cfg = configs_path.load(trial.config)
    for key, value in {**trial.changes, "seed": seed}.items():
        at, last = overrides.find(cfg, key)
        if not overrides.holds(at, last):
            known = [*at] if isinstance(at, ml_collections.ConfigDict) else []
            raise ValueError(f"trial {trial.label!r}: the configuration has no key {key!r}{suggest(last, known)}.")
        overrides.put(at, last, value)
    return freeze(cfg)


def workdir(root: Path, trial: Trial, seed: int) -> Path:
    """Where a run of the study is."""
    return root / f"{trial.label.replace(' ', '_').replace('/', '_')}-{seed}"


def identity(trial: Trial, seed: int) -> str:
    """A name for what the run is: a hash of all that can change its results (`running.fingerprint`)."""
    from protojax import running

    told = json.dumps(running.fingerprint(config_of(trial, seed)), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def recorded(study: Study, records: Path | None) -> dict[str, dict[int, dict[str, Any]]]:
    """label -> seed -> record, from the records that `study_page.write` left (the runs may be gone). Left out are
    those of another configuration than the trial's, and those that lack a measure of the study."""
    lines = [] if records is None or not records.exists() else records.read_text().splitlines()
    trials = {trial.label: trial for trial in study.trials}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in map(json.loads, lines):
        trial, seed = trials.get(record["trial"]), record["seed"]
        measured = {m.name for m in study.measures} <= {*record.get("measured", {})}
        if trial and measured and seed in study.seeds and record.get("configuration") == identity(trial, seed):
            found.setdefault(trial.label, {})[seed] = record
    return found


def run(
    study: Study,
    root: Path,
    *,
    only: Sequence[str] = (),
    jobs: int = 1,
    data: Path | None = None,
    records: Path | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Train and measure what is missing of the trials (`only` these labels), `jobs` processes at a time; 0: here.

    A finished run stays as it is, one that was stopped is resumed, a failed one is named at the end and does not stop
    the others. SIGTERM and Ctrl-C let what trains save its state, and nothing more is begun (`jobs.each`). data: the
    folder that a relative `data.root` is in. records: what stands there (`recorded`) is not trained again.

    Returns whether all are there: False after a signal. Raises ValueError for an unknown label, data that are not there
    and a finished run of another configuration, RuntimeError when runs failed.
    """
    labels = [t.label for t in study.trials]
    for label in only:
        if label not in labels:
            raise ValueError(f"no trial {label!r}{suggest(label, labels)}; this study has {labels}.")
    wanted = [(t, s) for s in study.seeds for t in study.trials if not only or t.label in only]
    for trial, seed in wanted:  # what is wrong is found before hours of training
        _check(trial, measuring.placed(config_of(trial, seed), data), workdir(root, trial, seed))
    missing = [(t, s) for t, s in wanted if not _finished(study, workdir(root, t, s))]
    kept = recorded(study, records)
    todo = [(t, s) for t, s in missing if s not in kept.get(t.label, {})]
    done, known = len(wanted) - len(todo), len(missing) - len(todo)
    say(f"{study.name}: {len(wanted)} runs, {done} finished ({known} on record), {len(todo)} to go")
    failed, left = [], len(todo)
    tasks = [(t, s, workdir(root, t, s), study.measures, data) for t, s in todo]
    for number, error in jobs_lib.each(_train, tasks, jobs):
        trial, seed = todo[number]
        stopped = isinstance(error, jobs_lib.Stopped)
        left -= not stopped
        if error is not None and not stopped:
            failed.append(f"{trial.label}, seed {seed}: {type(error).__name__}: {error}")
        how = "stopped" if stopped else "failed" if error else "done"
        say(f"[{len(todo) - left}/{len(todo)}] {trial.label}, seed {seed}: {how}")
    if left:
        say(f"{study.name}: stopped with {left} of {len(todo)} runs to go; the same command goes on")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(todo)} runs failed; the same command runs them again:\n" + "\n".join(failed)
        )
    return left == 0


def _finished(study: Study, where: Path) -> bool:
    return (where / "summary.json").exists() and not measuring.missing(where, study.measures)


def _check(trial: Trial, config: Config, where: Path) -> None:
    """Data are there, and a run that is finished is one of this configuration (studies share folders of runs)."""
    from protojax import loading, running

    root = config.data.root
    if root is not None and not Path(root).expanduser().exists():
        raise ValueError(f"trial {trial.label!r}: no such file: {root}; name the folder of the archives with --data.")
    if not (where / "summary.json").exists():
        return
    here, there = running.fingerprint(config), running.fingerprint(loading.read_config(where))
    changed = sorted(k for k in {*here} & {*there} if here[k] != there[k])  # an option that is new has its default
    if changed:
        lines = "; ".join(f"{k}: there {there[k]!r}, now {here[k]!r}" for k in changed[:4])
        raise ValueError(f"{where} is a run of another configuration ({lines}); give another --workdir, or delete it.")


def _train(trial: Trial, seed: int, where: Path, measures: tuple[Measure, ...], data: Path | None) -> None:
    from protojax import running

    where.mkdir(parents=True, exist_ok=True)
    if not (where / "summary.json").exists():
        config = measuring.placed(config_of(trial, seed), data)
        with (where / "log.txt").open("a") as log:
            running.train_config(config, where, say=lambda text: print(text, file=log, flush=True))
    if not (where / "summary.json").exists():
        raise jobs_lib.Stopped("a signal stopped the run")  # its measures would be those of half a run
    measuring.take(where, measures, data)
