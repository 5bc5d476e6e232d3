"""The numbers that verdicts, tables and comparisons are made of, each beside its control.

A finished run is taken from `summary.json`; an unfinished one from its last evaluation record, and `Facts.origin`
says so. Controls come from the summary or, where it has none, from the evaluation at step 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from protojax.reporting.records import Run, as_number, by_epsilon, dig, find_key, series

EPSILONS = (0.025, 0.1, 0.25, 0.5)
HEADLINE_EPSILON = 0.025
COLLAPSE_EPSILON = 0.5
NEIGHBOURS = 20
LABELS = ("fine", "coarse")


@dataclass(frozen=True)
class Audit:
    """Prototype audit at one moment. Counts are counts of prototypes; perplexity of the usage shares; coverage: mean
    over features of the largest cosine to a prototype. None or an empty dict where it was not measured."""

    unique: Mapping[float, float]
    live: float | None
    live_unique: Mapping[float, float]
    perplexity: float | None
    coverage: float | None


@dataclass(frozen=True)
class Facts:
    """One run in numbers.

    k: neighbours of the k-NN numbers. knn, untrained_knn: label -> accuracy in [0, 1]. groups, untrained_groups:
    label -> group -> accuracy or None (empty group). count K and dim D of the prototypes. final, initial, random:
    audits of the last codebook, of the one right after initialisation, and of random directions of equal K and D.
    images_per_second: median. origin: where the final numbers are from, as a sentence part. findings: diagnoses.
    """

    name: str
    arm: str
    seed: int | None
    steps: int | None
    finished: bool
    origin: str
    k: int | None
    knn: Mapping[str, float]
    untrained_knn: Mapping[str, float]
    groups: Mapping[str, Mapping[str, float | None]]
    untrained_groups: Mapping[str, Mapping[str, float | None]]
    count: int | None
    dim: int | None
    final: Audit
    initial: Audit
    random: Audit
    effective_rank: float | None
    untrained_rank: float | None
    images_per_second: float | None
    findings: tuple[Mapping[str, Any], ...]


def facts_of(run: Run) -> Facts:
    """Collect the facts of a run; nothing here raises for a missing piece."""
    final, finished, origin, steps = _final_record(run)
    first = run.evals[0].get("metrics") if run.evals and run.evals[0]["step"] == 0 else None
    controls = dig(run.summary, "controls") or dig(final, "controls")
    untrained = dig(controls, "untrained_knn") or dig(first, "knn")
    k = _neighbours(dig(final, "knn"))
    seed = as_number(_identity(run, "seed"))
    listed = dig(run.summary, "findings")
    listed = tuple(x for x in listed if isinstance(x, dict)) if isinstance(listed, list) else ()
    rate = as_number(dig(run.summary, "images_per_second")) if finished else None
    return Facts(
        name=str(_identity(run, "name") or run.path.name),
        arm=str(_identity(run, "arm") or run.path.name),
        seed=None if seed is None else int(seed),
        steps=steps,
        finished=finished,
        origin=origin,
        k=k,
        knn=_knn(dig(final, "knn"), k),
        untrained_knn=_knn(untrained, k),
        groups=_groups(dig(final, "groups")),
        untrained_groups=_groups(dig(controls, "untrained_groups") or dig(first, "groups")),
        count=_count(final, first, "count"),
        dim=_count(final, first, "dim"),
        final=_audit(dig(final, "prototypes")),
        initial=_initial_audit(controls, dig(first, "prototypes")),
        random=_control_audit(controls, "random"),
        effective_rank=as_number(dig(final, "effective_rank")),
        untrained_rank=_first_number(dig(controls, "initial_effective_rank"), dig(first, "effective_rank")),
        images_per_second=_median_rate(run) if rate is None else rate,
        findings=run.diagnoses or listed,
    )


def primary_label(values: Mapping[str, Any]) -> str | None:
    """'fine' where there is one, else 'coarse', else the first label that was evaluated."""
    for label in (*LABELS, *values):
        if label in values:
            return label
    return None


def _final_record(run: Run) -> tuple[Mapping[str, Any], bool, str, int | None]:
    last = run.evals[-1] if run.evals else None
    steps = as_number(dig(run.summary, "steps"))
    if run.summary is not None and (last is None or steps is None or last["step"] <= steps):
        finished = run.summary.get("finished") is not False
        origin = "summary.json" if finished else "summary.json of a run that was stopped"
        return run.summary, finished, origin, None if steps is None else int(steps)
    if last is None:
        reached = int(run.train[-1]["step"]) if run.train else None
        return {}, False, "no evaluation yet", reached
    why = "summary.json is absent" if run.summary is None else f"summary.json stops at step {int(steps or 0)}"
    metrics = last.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    return metrics, False, f"the last evaluation, step {int(last['step'])}, because {why}", int(last["step"])


def _identity(run: Run, field: str) -> Any:
    value = dig(run.summary, field)
    if value is not None:
        return value
    found = find_key(run.config, field)
    return found[1] if found else None


def _neighbours(knn: Any) -> int | None:
    """The k that is reported: 20 where it was evaluated, else the largest below it, else the smallest."""
    if not isinstance(knn, Mapping):
        return None
    found = {int(k) for label in knn.values() if isinstance(label, Mapping) for k in label if str(k).isdigit()}
    if not found:
        return None
    below = [k for k in found if k <= NEIGHBOURS]
    return max(below) if below else min(found)


def _knn(knn: Any, k: int | None) -> dict[str, float]:
    if not isinstance(knn, Mapping) or k is None:
        return {}
    pairs = ((str(label), as_number(dig(values, str(k)))) for label, values in knn.items())
    return {label: value for label, value in pairs if value is not None}


def _groups(groups: Any) -> dict[str, dict[str, float | None]]:
    if not isinstance(groups, Mapping):
        return {}
    return {
        str(label): {str(group): as_number(value) for group, value in values.items()}
        for label, values in groups.items()
        if isinstance(values, Mapping)
    }


def _count(final: Any, first: Any, field: str) -> int | None:
    number = _first_number(dig(final, "prototypes", field), dig(first, "prototypes", field))
    return None if number is None else int(number)


def _audit(prototypes: Any) -> Audit:
    return Audit(
        unique=by_epsilon(dig(prototypes, "unique")),
        live=as_number(dig(prototypes, "live")),
        live_unique=by_epsilon(dig(prototypes, "live_unique")),
        perplexity=as_number(dig(prototypes, "perplexity")),
        coverage=as_number(dig(prototypes, "coverage")),
    )


def _control_audit(controls: Any, prefix: str) -> Audit:
    return Audit(
        unique=by_epsilon(dig(controls, f"{prefix}_unique")),
        live=as_number(dig(controls, f"{prefix}_live")),
        live_unique=by_epsilon(dig(controls, f"{prefix}_live_unique")),
        perplexity=as_number(dig(controls, f"{prefix}_perplexity")),
        coverage=as_number(dig(controls, f"{prefix}_coverage")),
    )


def _initial_audit(controls: Any, first: Any) -> Audit:
    said, seen = _control_audit(controls, "initial"), _audit(first)
    return Audit(
        unique=said.unique or seen.unique,
        live=_first_number(said.live, seen.live),
        live_unique=said.live_unique or seen.live_unique,
        perplexity=_first_number(said.perplexity, seen.perplexity),
        coverage=_first_number(said.coverage, seen.coverage),
    )


def _first_number(*values: Any) -> float | None:
    numbers = (as_number(value) for value in values)
    return next((number for number in numbers if number is not None), None)


def _median_rate(run: Run) -> float | None:
    _, rates = series(run.train, "images_per_second")
    rates = rates[np.isfinite(rates)]
    return float(np.median(rates)) if rates.size else None
