"""Several runs side by side: a text table, and one HTML page with the same table and overlaid plots.

Runs of the same arm that differ in the seed alone are summarised as mean ± standard deviation (sample, n - 1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protojax.reporting.facts import COLLAPSE_EPSILON, HEADLINE_EPSILON, Facts, facts_of, primary_label
from protojax.reporting.page import Html, grid, page, plot, section, table, tag
from protojax.reporting.plots import Curve, axis_from_zero, drawable, level, percent_axis
from protojax.reporting.records import Run, load_run, series, write_text
from protojax.reporting.svg import ROLES, SERIES, STYLES, drawing, legend_above, new_axes, short, to_svg

ABSENT = "–"
LEFT_COLUMNS = 2


@dataclass(frozen=True)
class Column:
    """title; value(facts) -> number or None; scale: what a number is multiplied by before printing; digits."""

    title: str
    value: Callable[[Facts], float | None]
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone; label: the arm, and what else tells it from another group of that arm."""

    label: str
    members: tuple[int, ...]


def _knn(facts: Facts, which: int) -> float | None:
    label = primary_label(facts.knn)
    labels = [label, *(name for name in facts.knn if name != label)]
    return facts.knn.get(labels[which] or "") if which < len(labels) else None


def _tail(facts: Facts) -> float | None:
    return facts.groups.get(primary_label(facts.groups) or "", {}).get("tail")


COLUMNS = (
    Column("k-NN fine %", lambda f: _knn(f, 0), 100.0),
    Column("k-NN coarse %", lambda f: _knn(f, 1), 100.0),
    Column("untrained %", lambda f: f.untrained_knn.get(primary_label(f.knn) or ""), 100.0),
    Column("unique 0.5 start", lambda f: f.initial.unique.get(COLLAPSE_EPSILON), digits=0),
    Column("unique 0.5 end", lambda f: f.final.unique.get(COLLAPSE_EPSILON), digits=0),
    Column("live", lambda f: f.final.live, digits=0),
    Column("live-unique 0.025", lambda f: f.final.live_unique.get(HEADLINE_EPSILON), digits=0),
    Column("perplexity", lambda f: f.final.perplexity, digits=0),
    Column("coverage", lambda f: f.final.coverage, digits=3),
    Column("effective rank", lambda f: f.effective_rank),
    Column("tail %", _tail, 100.0),
    Column("images/s", lambda f: f.images_per_second, digits=0),
)


def compare(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> tuple[str, Path]:
    """Compare runs.

    Args:
      run_dirs: run directories; one given twice counts once.
      out: the HTML file, or a folder for `compare.html`. Default: `compare.html` beside the first run.

    Returns:
      The table as text (one line a run; then mean ± sd over seeds of each arm that has several), and the HTML path.

    Raises:
      ValueError: no directory given, a directory is missing or holds nothing of a run, or `out` cannot be written.
    """
    if isinstance(run_dirs, str | Path):
        run_dirs = [run_dirs]
    unique = list({Path(directory).resolve(): Path(directory) for directory in run_dirs}.values())
    if not unique:
        raise ValueError("compare needs at least one run directory, got none: give the --workdir of each run.")
    runs = [load_run(directory) for directory in unique]
    facts = [facts_of(run) for run in runs]
    groups = group_runs(facts)
    notes = _notes(runs, facts, groups)
    headers, rows, strong = table_rows(facts, groups)
    text = "\n".join([text_table(headers, rows), *notes]) + "\n"
    document = page(
        "Comparison of runs",
        tag("header", Html(f"{tag('h1', 'Comparison of runs')}{tag('p', _subtitle(facts, groups), 'sub')}")),
        section("In short", tag("ul", Html("".join(tag("li", s) for s in _sentences(facts, groups))))),
        section("Numbers", table(headers, rows, strong), *(tag("p", note, "note") for note in notes)),
        _figures(runs, facts, groups),
        section("Runs", tag("ul", Html("".join(tag("li", str(run.path)) for run in runs)))),
    )
    return text, write_text(_target(out, unique[0]), document)


def _target(out: str | Path | None, first: Path) -> Path:
    if out is None:
        return first.resolve().parent / "compare.html"
    path = Path(out)
    return path if path.suffix and not path.is_dir() else path / "compare.html"


# ------------------------------------------------------------------------------------------------ grouping
def group_runs(facts: Sequence[Facts]) -> list[Group]:
    """Runs of equal name, arm, length and number of prototypes, in order of first appearance."""
    members: dict[tuple[str, str, int | None, int | None], list[int]] = {}
    for index, entry in enumerate(facts):
        members.setdefault((entry.arm, entry.name, entry.steps, entry.count), []).append(index)
    keys = list(members)
    groups = []
    for key in keys:
        same_arm = [other for other in keys if other[0] == key[0]]
        differs = [len({other[part] for other in same_arm}) > 1 for part in range(4)]
        extra = [key[1]] if differs[1] else []
        extra += [f"{key[2]} steps"] if differs[2] else []
        extra += [f"K {key[3]}"] if differs[3] else []
        groups.append(Group(f"{key[0]} ({', '.join(extra)})" if extra else key[0], tuple(members[key])))
    return groups


def mean_and_sd(values: Iterable[float | None]) -> tuple[float | None, float | None, int]:
    """(mean, sample standard deviation, n) of the values that are there; no mean of none, no sd of one."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None, 0
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known)


def table_rows(facts: Sequence[Facts], groups: Sequence[Group]) -> tuple[list[str], list[list[str]], list[int]]:
    """(headers, rows, numbers of the summary rows): runs by group, then mean ± sd where a group has several."""
    columns = [c for c in COLUMNS if any(c.value(f) is not None for f in facts)]
    headers = ["arm", "seed", *(c.title for c in columns)]
    rows: list[list[str]] = []
    strong: list[int] = []
    for group in groups:
        for index in sorted(group.members, key=lambda i: (facts[i].seed is None, facts[i].seed or 0, i)):
            entry = facts[index]
            seed = (ABSENT if entry.seed is None else str(entry.seed)) + ("" if entry.finished else "*")
            rows.append([group.label, seed, *(_number(c, c.value(entry)) for c in columns)])
        if len(group.members) > 1:
            strong.append(len(rows))
            cells = [_summary(c, [c.value(facts[i]) for i in group.members]) for c in columns]
            rows.append([group.label, f"n={len(group.members)}", *cells])
    return headers, rows, strong


def _number(column: Column, value: float | None) -> str:
    return ABSENT if value is None else f"{column.scale * value:.{column.digits}f}"


def _summary(column: Column, values: Sequence[float | None]) -> str:
    mean, sd, n = mean_and_sd(values)
    if mean is None:
        return ABSENT
    said = _number(column, mean)
    if sd is not None:
        said = f"{_number(column, mean)}±{_number(column, sd)}"
    return said if n == len(values) else f"{said} (n={n})"


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; headers broken at spaces onto as many lines as they need."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    broken = [header.split(" ") for header in headers]
    widths = [max(width, *map(len, words)) for width, words in zip(widths, broken, strict=True)]
    height = max(map(len, broken))
    stacked = [[""] * (height - len(words)) + words for words in broken]
    head = [list(line) for line in zip(*stacked, strict=True)]
    lines = [*head, ["-" * width for width in widths], *rows]
    return "\n".join(_line(cells, widths) for cells in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if number < LEFT_COLUMNS else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


# ----------------------------------------------------------------------------------------------- sentences
def _subtitle(facts: Sequence[Facts], groups: Sequence[Group]) -> str:
    return f"{len(facts)} run{'s' if len(facts) != 1 else ''}, {len(groups)} arm{'s' if len(groups) != 1 else ''}"


def _notes(runs: Sequence[Run], facts: Sequence[Facts], groups: Sequence[Group]) -> list[str]:
    notes = []
    for run, entry in zip(runs, facts, strict=True):
        if not entry.finished:
            notes.append(f"* {run.path}: not finished; numbers are from {entry.origin}.")
        damaged = [problem for problem in run.problems if "absent" not in problem]
        notes.extend(f"{run.path}: {problem}" for problem in damaged)
    for group in groups:
        seeds = [facts[i].seed for i in group.members]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{group.label}: a seed appears more than once, so the sd is not over independent seeds.")
    if any(f.k is not None and f.k != 20 for f in facts):
        notes.append("k-NN was not evaluated at k = 20 everywhere: the nearest smaller k that was is shown.")
    return notes


def _sentences(facts: Sequence[Facts], groups: Sequence[Group]) -> list[str]:
    sentences = []
    scored = [(g, *mean_and_sd(_knn(facts[i], 0) for i in g.members)) for g in groups]
    ranked = sorted([entry for entry in scored if entry[1] is not None], key=lambda entry: -(entry[1] or 0.0))
    if len(ranked) > 1:
        (best, top, top_sd, top_n), (second, next_, next_sd, next_n) = ranked[:2]
        gap = 100 * ((top or 0.0) - (next_ or 0.0))
        text = f"Highest k-NN: {best.label}, {100 * (top or 0.0):.1f}%, {gap:.1f} points above {second.label}."
        if top_sd is None or next_sd is None:
            text += " With one seed an arm the spread is not known: this difference may be chance."
        else:
            error = 100 * math.sqrt(top_sd**2 / top_n + next_sd**2 / next_n)
            text += f" The standard error of that difference over seeds is {error:.1f} points."
        sentences.append(text)
    for group in groups:
        sentences.append(f"{group.label}: {_prototypes([facts[i] for i in group.members])}")
    return sentences


def _prototypes(facts: Sequence[Facts]) -> str:
    start, _, _ = mean_and_sd(f.initial.unique.get(COLLAPSE_EPSILON) for f in facts)
    end, _, _ = mean_and_sd(f.final.unique.get(COLLAPSE_EPSILON) for f in facts)
    count = facts[0].count
    parts = []
    if start and end is not None:
        change = "fell" if end < 0.9 * start else "rose" if end > 1.1 * start else "held"
        parts.append(f"unique at {COLLAPSE_EPSILON:g} {change}, {start:.0f} to {end:.0f}")
    distinct, _, _ = mean_and_sd(f.final.live_unique.get(HEADLINE_EPSILON) for f in facts)
    live, _, _ = mean_and_sd(f.final.live for f in facts)
    if distinct is not None and count:
        of_live = f" of {live:.0f} live" if live is not None else ""
        parts.append(f"{distinct:.0f}{of_live} are distinct, {100 * distinct / count:.0f}% of {count} (live-unique)")
    return "; ".join(parts) + "." if parts else "no prototype audit."


# ------------------------------------------------------------------------------------------------- figures
def _figures(runs: Sequence[Run], facts: Sequence[Facts], groups: Sequence[Group]) -> Html:
    fine = primary_label({label: None for f in facts for label in f.knn}) or "fine"
    k = str(next((f.k for f in facts if f.k is not None), 20))
    audit = ("metrics", "prototypes")
    untrained, _, _ = mean_and_sd(f.untrained_knn.get(fine) for f in facts)
    drawn = [
        _overlay("k-NN, fine", runs, groups, "evals", ("metrics", "knn", fine, k), share=True, control=untrained),
        _overlay("k-NN, coarse", runs, groups, "evals", ("metrics", "knn", "coarse", k), share=True),
        _overlay("Live-unique, ε = 0.025", runs, groups, "evals", (*audit, "live_unique", "0.025"), facts),
        _overlay("Unique, ε = 0.5", runs, groups, "evals", (*audit, "unique", "0.5"), facts),
        _overlay("Live", runs, groups, "evals", (*audit, "live"), facts),
        _bars(facts, groups),
        _overlay("Effective rank of the features", runs, groups, "evals", ("metrics", "effective_rank")),
        _overlay("Loss", runs, groups, "train", ("metrics", "loss/total"), from_zero=False),
        _overlay("Images per second", runs, groups, "train", ("images_per_second",)),
    ]
    note = "One colour an arm, one line a run. Losses of different objectives cannot be compared."
    return section("Curves", tag("p", note, "note"), grid(*drawn))


def _overlay(
    title: str,
    runs: Sequence[Run],
    groups: Sequence[Group],
    kind: str,
    path: tuple[str, ...],
    counts: Sequence[Facts] | None = None,
    share: bool = False,
    control: float | None = None,
    from_zero: bool = True,
) -> Html:
    """One number of every run over steps. counts given: divided by each run's K and drawn as per cent."""
    curves: list[list[Curve]] = []
    for group in groups:
        raw = []
        for index in group.members:
            steps, values = series(runs[index].evals if kind == "evals" else runs[index].train, *path)
            divisor = (counts[index].count or math.nan) if counts is not None else 1.0
            raw.append((group.label, steps, values / divisor))
        curves.append(drawable(raw))
    if not any(curves):
        return plot(title, None, "", "no run recorded it.")
    with drawing():
        figure, axes = new_axes()
        for number, members in enumerate(curves):
            for order, (label, steps, values) in enumerate(members):
                axes.plot(
                    steps,
                    values,
                    color=SERIES[number % 8],
                    linestyle=STYLES[number % len(STYLES)],
                    linewidth=1.8 if len(members) == 1 else 1.3,
                    marker="o" if steps.size <= 40 else None,
                    markersize=3,
                    label=label if order == 0 else None,
                )
        level(axes, control, "untrained", ROLES["muted"])
        if share or counts is not None:
            percent_axis(axes)
        elif from_zero:
            axis_from_zero(axes)
        legend_above(figure, axes)
        caption = "Share of all prototypes." if counts is not None else ""
        return plot(title, to_svg(figure, title), caption)


def _bars(facts: Sequence[Facts], groups: Sequence[Group]) -> Html:
    title = "Accuracy by group of classes"
    names = list(dict.fromkeys(name for f in facts for name in _groups_of(f)))
    if not names:
        return plot(title, None, "", "no run recorded accuracy by group.")
    width = 0.8 / len(groups)
    with drawing():
        figure, axes = new_axes(x_label="")
        for number, group in enumerate(groups):
            summary = [mean_and_sd(_groups_of(facts[i]).get(name) for i in group.members) for name in names]
            places = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width
            heights = [mean or 0.0 for mean, _, _ in summary]
            axes.bar(places, heights, width * 0.92, color=SERIES[number % 8], label=group.label)
            spread = [(x, h, sd) for x, h, (_, sd, _) in zip(places, heights, summary, strict=True) if sd is not None]
            if spread:
                x, y, sd = np.asarray(spread).T
                axes.errorbar(x, y, yerr=sd, fmt="none", ecolor=ROLES["ink"], elinewidth=1.4)
        axes.set_xticks(np.arange(len(names)), [short(name, 12) for name in names])
        axes.tick_params(axis="x", length=0)
        percent_axis(axes)
        legend_above(figure, axes)
        return plot(title, to_svg(figure, title), "k-NN accuracy; bars over seeds carry ± one standard deviation.")


def _groups_of(facts: Facts) -> Mapping[str, float | None]:
    return facts.groups.get(primary_label(facts.groups) or "", {})
