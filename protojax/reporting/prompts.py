"""The page of a mixture of prompts: are all sub-prompts at work, what does each stand for, and is it worth anything."""

from __future__ import annotations

from typing import Any

import numpy as np

from protojax.reporting import sections
from protojax.reporting.facts import facts_of
from protojax.reporting.page import Html, card, grid, section, table
from protojax.reporting.plots import line_plot
from protojax.reporting.prompts_sheets import page_part
from protojax.reporting.records import Run, as_number, dig, series

ABSENT = "–"


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
    top1, zero = _read(final, "accuracy", "top1"), _read(final, "baselines", "zero_shot", "top1")
    linear = _read(final, "baselines", "linear_probe", "top1")
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
    """Three classes: usage, similarity, and the images that each sub-prompt claims."""
    if "sheet_shown" not in run.arrays:
        return section("Classes", Html("<p>Not shown: report_data.npz holds no sheets.</p>"))
    return section("Classes", *page_part(run))


def numbers(final: dict[str, Any]) -> Html:
    """The two kinds of assignment side by side, then accuracy beside the baselines on the same features."""
    names = ("usage_perplexity", "usage_perplexity_hard", "effective", "dead", "max_usage", "conditional_entropy",
             "purity", "purity_chance")  # fmt: skip
    both = table(
        ("assignment", "E-step", "inference"),
        [(n.replace("_", " "), _show(_read(final, "e_step", n)), _show(_read(final, "inference", n))) for n in names],
    )
    geometry = ("cos_mean", "cos_min", "cos_max", "initial_cosine", "centred_duplicates")
    shape = table(
        ("prompts of a class", "value"),
        [*((n.replace("_", " "), _show(_read(final, "geometry", n), 3)) for n in geometry),
         ("separation", _show(_read(final, "separation"), 4))],
    )  # fmt: skip
    return section("Numbers", both, methods(final), shape)


def methods(final: dict[str, Any]) -> Html:
    """Accuracy of the mixture and of every baseline, one a line."""
    baselines = dig(final, "baselines")
    lines = {"mixture": dig(final, "accuracy"), **(baselines if isinstance(baselines, dict) else {})}
    if isinstance(new := dig(final, "validation"), dict):
        lines = {"mixture, validation": new, **lines}
    levels = [n for n in (dig(final, "accuracy", "levels") or {}) if n != "leaf"]
    columns = [("top-1", ("top1",)), ("balanced", ("balanced",)), ("many", ("many",)), ("medium", ("medium",)),
               ("few", ("few",)), *((n, ("levels", n)) for n in levels), ("margin", ("margin",)), ("ECE", ("ece",)),
               ("purity", ("purity",))]  # fmt: skip
    rows = [(name.replace("_", " "), *(_show(as_number(dig(found, *path)), 3) for _, path in columns))
            for name, found in lines.items()]  # fmt: skip
    blocks = [table(("method", *(title for title, _ in columns)), rows)]
    if isinstance(split := dig(final, "base_to_new"), dict):
        blocks.append(table(("base-to-new", "top-1"), [(k.replace("_", " "), _show(v, 3)) for k, v in split.items()]))
    return Html("".join(blocks))
