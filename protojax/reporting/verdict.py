"""Plain-language answers from the facts of one run: did it learn, did it collapse, which groups suffer, what next.

Thresholds are this page's own reading aid, written into every sentence that uses them; the detectors' findings have
thresholds of their own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protojax import configs_path
from protojax.reporting.facts import COLLAPSE_EPSILON, HEADLINE_EPSILON, Facts, primary_label
from protojax.reporting.records import Run, as_number, find_key, series

LEARNED_RATIO = 1.5  # k-NN against the untrained encoder: at least this is a clear yes
WEAK_RATIO = 1.1
KEPT = 0.9  # unique against its own start; live-unique against live
FELL = 0.5
IN_USE = 0.75  # live-unique as a share of K
GROUP_GAP = 0.9  # worst group below this share of the best: it suffers
RANK_FLOOR = 2.0


@dataclass(frozen=True)
class Answer:
    """question; status: good, warn, bad or unknown; answer in a word or two; sentences with the numbers."""

    question: str
    status: str
    answer: str
    sentences: tuple[str, ...]


def percent(value: float | None, digits: int = 1) -> str:
    return "not measured" if value is None else f"{100 * value:.{digits}f}%"


def whole(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.0f}"


def learned(run: Run, facts: Facts) -> Answer:
    """k-NN of the last checkpoint against the untrained encoder."""
    question = "Did it learn?"
    label = primary_label(facts.knn)
    if label is None:
        return Answer(question, "unknown", "Not known", ("No k-NN evaluation was recorded for this run.",))
    value, before = facts.knn[label], facts.untrained_knn.get(label)
    said = f"k-NN accuracy on the {label} labels (k = {facts.k}) is {percent(value)}."
    if not before:
        why = "The untrained encoder was not measured, so it cannot be said what training added."
        return Answer(question, "unknown", "Not known", (said, why))
    ratio = value / before
    against = f"The same encoder before training has {percent(before)}: {ratio:.2f} times as much now"
    against += f" (from {LEARNED_RATIO} times on, this page says yes; below {WEAK_RATIO}, no)."
    status, answer = ("good", "Yes") if ratio >= LEARNED_RATIO else ("warn", "A little")
    if ratio < WEAK_RATIO:
        status, answer = "bad", "No"
    more = ("It was still rising at the last evaluation: a longer run would show more.",) if rising(run, facts) else ()
    return Answer(question, status, answer, (said, against, *more))


def rising(run: Run, facts: Facts) -> bool:
    """Is the last of at least three k-NN evaluations the best, by 2% or more over the one before?"""
    label = primary_label(facts.knn)
    if label is None:
        return False
    _, values = series(run.evals, "metrics", "knn", label, str(facts.k))
    return bool(values.size >= 3 and values[-1] >= values.max() and values[-1] > 1.02 * values[-2])


def collapsed(facts: Facts) -> Answer:
    """Unique against its own start, and the share of prototypes that are both in use and distinct."""
    question = "Did the prototypes collapse?"
    count = facts.count
    now, start = facts.final.unique.get(COLLAPSE_EPSILON), facts.initial.unique.get(COLLAPSE_EPSILON)
    live, distinct = facts.final.live, facts.final.live_unique.get(HEADLINE_EPSILON)
    if not count or (now is None and live is None):
        return Answer(question, "unknown", "Not known", ("No prototype audit was recorded for this run.",))
    sentences, marks = [], []
    if distinct is not None and live is not None:
        text = f"{whole(distinct)} of {whole(count)} prototypes ({percent(distinct / count)}) are in use and distinct: "
        text += f"live-unique at {HEADLINE_EPSILON:g}, the number to watch. {whole(live)} are in use at all"
        sentences.append(text + (f", {percent(distinct / live, 0)} of those distinct." if live else "."))
        marks.append(_mark(distinct / count, IN_USE, FELL))
        marks.append(_mark(distinct / live if live else 0.0, KEPT, FELL))
    if now is not None and start is not None:
        text = f"Unique at {COLLAPSE_EPSILON:g}: {whole(start)} right after initialisation, {whole(now)} now"
        text += f" ({percent(now / start, 0)} of its start)." if start else "."
        sentences.append(text)
        marks.append(_mark(now / start if start else 1.0, KEPT, FELL))
    sentences.append(_why_unique_is_not_enough(facts))
    if not marks:
        return Answer(question, "unknown", "Not known", tuple(sentences))
    worst = max(marks, key=("good", "warn", "bad").index)
    dead = live is not None and live / count < FELL
    answer = {"good": "No", "warn": "In part", "bad": "Yes"}[worst]
    if dead and (now is None or not start or now / start >= KEPT):
        answer = "Most are dead"
    return Answer(question, worst, answer, tuple(sentences))


def _mark(share: float, good: float, bad: float) -> str:
    return "good" if share >= good else "bad" if share < bad else "warn"


def _why_unique_is_not_enough(facts: Facts) -> str:
    control = facts.random.unique.get(COLLAPSE_EPSILON)
    text = "Uniqueness alone proves nothing: "
    if control is not None and facts.count:
        where = f" in {facts.dim} dimensions" if facts.dim else ""
        text += f"of {whole(facts.count)} random directions{where}, {whole(control)} are unique at "
        text += f"{COLLAPSE_EPSILON:g} without having seen an image, and "
    return text + "a prototype that no image is nearest to keeps its start and counts as unique for ever."


def encoder(facts: Facts) -> Answer:
    """Effective rank of the features, now and before training."""
    question = "Did the encoder collapse?"
    now, before = facts.effective_rank, facts.untrained_rank
    if now is None:
        return Answer(question, "unknown", "Not known", ("The effective rank of the features was not recorded.",))
    text = f"The features spread over {now:.1f} effective dimensions"
    text += "." if before is None else f"; {before:.1f} before training."
    if now < RANK_FLOOR:
        return Answer(question, "bad", "Yes", (text, f"Below {RANK_FLOOR:g} all images look alike to it."))
    if before is not None and now < 0.5 * before:
        return Answer(question, "warn", "It narrowed", (text, "It has lost more than half of its directions."))
    return Answer(question, "good", "No", (text,))


def suffering(facts: Facts) -> Answer:
    """The worst of head, medium and tail, and what training added to each."""
    question = "Which groups suffer?"
    label = primary_label(facts.groups)
    values = {g: v for g, v in facts.groups.get(label or "", {}).items() if g != "balanced"}
    known = {group: value for group, value in values.items() if value is not None}
    if not known:
        return Answer(question, "unknown", "Not known", ("No accuracy by group of classes was recorded.",))
    worst, best = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    listed = ", ".join(f"{group} {percent(value)}" for group, value in known.items())
    sentences = [f"k-NN accuracy on the {label} labels: {listed}."]
    before = facts.untrained_groups.get(label or "", {})
    gains = [f"{g} {100 * (v - b):+.1f}" for g, v in known.items() if (b := before.get(g)) is not None]
    if gains:
        sentences.append(f"Training added, in percentage points: {', '.join(gains)}.")
    empty = [group for group, value in values.items() if value is None]
    if empty:
        sentences.append(f"No class falls into: {', '.join(empty)}.")
    if len(known) < 2:
        return Answer(question, "unknown", "Only one group", tuple(sentences))
    if known[worst] < GROUP_GAP * known[best]:
        return Answer(question, "warn", f"{worst[:1].upper()}{worst[1:]} classes", tuple(sentences))
    sentences.append(f"No group is below {percent(GROUP_GAP, 0)} of the best.")
    return Answer(question, "good", "None clearly", tuple(sentences))


# ----------------------------------------------------------------------------------------------- findings
SEVERITIES = ("error", "warning", "notice")


@dataclass(frozen=True)
class Finding:
    """A detector's message; times and first and last step where it fired more than once."""

    detector: str
    severity: str
    first: int | None
    last: int | None
    times: int
    record: Mapping[str, Any]


def findings(facts: Facts) -> list[Finding]:
    """One entry a detector with its most severe, then latest record; errors first, then by first step."""
    by_detector: dict[str, list[Mapping[str, Any]]] = {}
    for record in facts.findings:
        by_detector.setdefault(str(record.get("detector", "unnamed")), []).append(record)
    merged = []
    for detector, records in by_detector.items():
        chosen = min(reversed(records), key=_severity)
        steps = [int(s) for s in (as_number(r.get("step")) for r in records) if s is not None]
        severity = SEVERITIES[min(_severity(chosen), len(SEVERITIES) - 1)]
        first, last = (min(steps), max(steps)) if steps else (None, None)
        merged.append(Finding(detector, severity, first, last, len(records), chosen))
    return sorted(merged, key=lambda f: (SEVERITIES.index(f.severity), f.first or 0, f.detector))


def _severity(record: Mapping[str, Any]) -> int:
    severity = record.get("severity")
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


# ---------------------------------------------------------------------------------------------- what next
def next_steps(run: Run, facts: Facts) -> list[tuple[str, str | None]]:
    """(advice, command) pairs, most urgent first. Commands name keys that this run's own config holds."""
    steps: list[tuple[str, str | None]] = []
    here = str(run.path)
    if not facts.finished:
        steps.append(("The run has not finished; the same command resumes it.", _train(facts, here)))
    for finding in findings(facts):
        advice = finding.record.get("advice")
        if finding.severity != "notice" and advice:
            steps.append((f"{finding.detector}: {advice}", None))
    kept = collapsed(facts).status
    if facts.arm == "joint" and kept != "good":
        text = "Prototypes that move with the encoder drifted together. Train the decoupled arm and compare."
        name = run.path.name.replace("joint", "decoupled") if "joint" in run.path.name else f"{run.path.name}-decoupled"
        other = str(run.path.with_name(name))
        steps.append((text, f"{_train(facts, other, arm='decoupled')}\n{_compare(here, other)}"))
    elif kept in ("warn", "bad"):
        other = f"{here}-frozen"
        text = "Compare with prototypes that never learn: if frozen random ones do as well, these taught nothing."
        if facts.arm != "frozen":
            steps.append((text, f"{_train(facts, other, arm='frozen')}\n{_compare(here, other)}"))
    longer = _longer(run, facts)
    if longer and facts.finished and (rising(run, facts) or learned(run, facts).status in ("warn", "bad")):
        steps.append(("Train twice as long.", longer))
    seed = find_key(run.config, "seed")
    if seed and facts.seed is not None and facts.finished:
        other = f"{here}-seed{facts.seed + 1}"
        command = f"{_train(facts, other)} \\\n  --config.{seed[0]}={facts.seed + 1}\n{_compare(here, other)}"
        steps.append(("One seed is an anecdote: repeat with another before believing a difference.", command))
    if facts.finished and learned(run, facts).status == "good":
        use = f"import protojax\nencode = protojax.load({here!r})\nfeatures = encode(images)"
        steps.append(("Use the encoder in other Python code.", use))
    return steps


def _longer(run: Run, facts: Facts) -> str | None:
    found = find_key(run.config, "total_steps", "steps", "epochs")
    amount = as_number(found[1]) if found else None
    if found is None or not amount or amount < 0:
        return None
    return f"{_train(facts, f'{run.path}-longer')} \\\n  --config.{found[0]}={_plain(2 * amount)}"


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _train(facts: Facts, workdir: str, arm: str | None = None) -> str:
    try:
        configs_path.find(facts.name)
        name = facts.name
    except FileNotFoundError:
        name = "CONFIG_FILE"
    config = shlex.quote(f"{name}:arm={arm or facts.arm}")
    return f"protojax train \\\n  --config={config} \\\n  --workdir={shlex.quote(workdir)}"


def _compare(*runs: str) -> str:
    return "protojax compare " + " ".join(shlex.quote(run) for run in runs)
