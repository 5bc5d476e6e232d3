"""The page of a mixture of prompts: are all sub-prompts at work, what does each stand for, and is it worth anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protojax.api import Probe
from protojax.reporting import sections
from protojax.reporting.facts import facts_of
from protojax.reporting.page import Html, card, grid, section, table
from protojax.reporting.plots import line_plot, similarity_plot, usage_plot
from protojax.reporting.records import Run, as_number, dig, series

ABSENT = "–"
CLASSES, COLUMNS = 16, 8


# --------------------------------------------------------------------------------------------------- the data
class Sheet(dict[str, np.ndarray]):
    """Arrays of `prompt_sheet` by name."""


def prompt_sheet(r: np.ndarray, labels: np.ndarray, c: int, columns: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """For class c: rows [K,columns] of `r` that each sub-prompt claims, by falling responsibility, and these
    responsibilities. A row is claimed by its argmax alone; -1 and 0 where fewer are claimed (a grey tile)."""
    members = np.flatnonzero(labels == c)
    count = r.shape[1]
    rows, shares = np.full((count, columns), -1, np.int64), np.zeros((count, columns), np.float32)
    best = r[members].argmax(axis=1)
    for k in range(count):
        own = members[best == k]
        own = own[np.argsort(-r[own, k], kind="stable")][:columns]
        rows[k, : len(own)], shares[k, : len(own)] = own, r[own, k]
    return rows, shares


def write_prompts_data(workdir: Path, probe: Probe, r: np.ndarray, labels: np.ndarray, made: np.ndarray) -> Path:
    """report_data.npz: of the first 16 classes the sheets (sheet_rows, sheet_shares [c,K,8]), usage (class_usage
    [c,K]) and cosines among sub-prompts (class_similarity [c,K,K]); all class names. r [N,K]: responsibilities of the
    training images at the temperature of training; made [C,K,D]: unit prompts."""
    classes = range(min(CLASSES, made.shape[0]))
    sheets = [prompt_sheet(r, labels, c) for c in classes]
    names = probe.specs["bank"].classes["label"]
    path = workdir / "report_data.npz"
    np.savez(
        path,
        sheet_rows=np.stack([s[0] for s in sheets]),
        sheet_shares=np.stack([s[1] for s in sheets]),
        class_usage=np.stack([r[labels == c].mean(axis=0) for c in classes]),
        class_similarity=np.stack([made[c] @ made[c].T for c in classes]),
        prompt_class_names=np.asarray(names),
    )
    return path


# --------------------------------------------------------------------------------------------------- the page
def parts(run: Run) -> tuple[str, tuple[Html, ...]]:
    """(title, sections in reading order)."""
    facts = facts_of(run)
    final = last(run)
    return f"{facts.name}: {facts.arm}", (
        sections.heading(run, facts),
        verdict(final),
        sections.found(facts),
        sections.reading_problems(run),
        figures(run),
        sheets(run),
        numbers(final),
        sections.configuration(run),
    )


def last(run: Run) -> dict[str, Any]:
    """The prompts' part of the last evaluation; {} where there is none."""
    found = dig(run.summary, "prompts") or (dig(run.evals[-1], "metrics", "prompts") if run.evals else None)
    return found if isinstance(found, dict) else {}


def _read(final: dict[str, Any], *path: str) -> float | None:
    return as_number(dig(final, *path))


def _show(value: float | None, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    return ABSENT if value is None else f"{scale * value:.{digits}f}{unit}"


def verdict(final: dict[str, Any]) -> Html:
    """Three questions, each answered against its degenerate value or its control."""
    count, used = _read(final, "count"), _read(final, "e_step", "usage_perplexity")
    effective, needed = _read(final, "e_step", "effective"), _read(final, "effective_needed")
    status, answer = "unknown", "Not known"
    if count is not None and used is not None:
        status = "good" if used >= 0.9 * count else "warn" if used > max(1.5, 0.35 * count) else "bad"
        answer = f"{used:.1f} of {count:.0f}"
    usage = card("Are all sub-prompts at work?", status, answer, [
        f"1 is winner-takes-all. Effective prompts: {_show(effective)} (identical prompts are used evenly, but amount "
        "to 1).",
        f"By nearest sub-prompt, without prices: {_show(_read(final, 'inference', 'usage_perplexity_hard'))}.",
    ])  # fmt: skip
    purity, chance = _read(final, "e_step", "purity"), _read(final, "random_purity")
    status = "unknown" if purity is None else "good" if purity >= 0.95 else "warn" if purity > (chance or 0) else "bad"
    modes = card("Do they stand for modes?", status, _show(purity), [
        f"Mode purity on test images; untrained random offsets give {_show(chance)}."
        + ("" if needed is None else f" Effective prompts needed: {needed:.1f}."),
    ])  # fmt: skip
    top1, zero = _read(final, "accuracy", "top1"), _read(final, "baselines", "zero_shot")
    linear = _read(final, "baselines", "linear_probe")
    status = "unknown" if top1 is None or zero is None else "good" if top1 >= max(zero, linear or 0) else "warn"
    accuracy = card("Does it classify?", status, _show(top1, 1, 100, " %"), [
        f"Zero shot {_show(zero, 1, 100, ' %')}, linear probe {_show(linear, 1, 100, ' %')} on the same features.",
    ])  # fmt: skip
    return section("Verdict", Html('<div class="cards">' + usage + modes + accuracy + "</div>"))


def figures(run: Run) -> Html:
    """Usage and accuracy over the run."""

    def curve(label: str, *path: str) -> tuple[str, np.ndarray, np.ndarray]:
        return label, *series(run.evals, "metrics", "prompts", *path)

    usage = line_plot(
        "Sub-prompts used a class",
        [curve("E-step", "e_step", "usage_perplexity"), curve("effective", "e_step", "effective"),
         curve("inference", "inference", "usage_perplexity_hard")],
        "Perplexity of usage within a class, mean over classes.", "no evaluation", from_zero=True,
    )  # fmt: skip
    accuracy = line_plot(
        "Accuracy", [curve("top-1", "accuracy", "top1"), curve("balanced", "accuracy", "balanced")],
        "On test images.", "no evaluation", share=True,
    )  # fmt: skip
    return section("Over the run", grid(usage, accuracy))


def sheets(run: Run) -> Html:
    """For the first classes: usage, similarity, and the images that each sub-prompt claims."""
    names, usage = run.arrays.get("prompt_class_names"), run.arrays.get("class_usage")
    similarity = run.arrays.get("class_similarity")
    if names is None or usage is None or similarity is None:
        return section("Classes", Html("<p>Not shown: report_data.npz holds no sheets.</p>"))
    shown = [class_sheet(run, c) for c in range(min(4, len(usage)))]
    return section("Classes", *shown)


def class_sheet(run: Run, c: int) -> Html:
    """One class: K rows of claimed images (their row numbers and responsibilities)."""
    name = str(run.arrays["prompt_class_names"][c])
    rows, shares = run.arrays["sheet_rows"][c], run.arrays["sheet_shares"][c]
    cells: list[Sequence[object]] = [
        (f"sub-prompt {k}", f"{100 * run.arrays['class_usage'][c][k]:.0f} %",
         *(f"{row} ({share:.2f})" if row >= 0 else "empty" for row, share in zip(r, s, strict=True)))
        for k, (r, s) in enumerate(zip(rows, shares, strict=True))
    ]  # fmt: skip
    heads = ("class " + name, "usage", *(f"#{i + 1}" for i in range(rows.shape[1])))
    return Html(
        table(heads, cells)
        + grid(usage_plot(run.arrays["class_usage"][c], ""), similarity_plot(run.arrays["class_similarity"][c]))
    )


def numbers(final: dict[str, Any]) -> Html:
    """The two kinds of assignment side by side, and the accuracy table."""
    names = ("usage_perplexity", "usage_perplexity_hard", "effective", "dead", "max_usage", "conditional_entropy",
             "purity", "purity_chance")  # fmt: skip
    both = table(
        ("assignment", "E-step", "inference"),
        [(n.replace("_", " "), _show(_read(final, "e_step", n)), _show(_read(final, "inference", n))) for n in names],
    )
    accuracy = dig(final, "accuracy")
    rows = [(k, _show(v, 3)) for k, v in (accuracy if isinstance(accuracy, dict) else {}).items() if as_number(v)
            is not None]  # fmt: skip
    return section("Numbers", both, table(("accuracy", "value"), rows))
