"""The audit as one self-contained page, in the look of a run's report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protojax.audit.measure import Arrays, sentences
from protojax.reporting import plots
from protojax.reporting.data import projection, similarity
from protojax.reporting.page import Html, card, code, details, grid, page, plot, section, table, tag
from protojax.reporting.records import write_text
from protojax.reporting.svg import ROLES, SERIES, drawing, legend_above, new_axes, to_svg

ANSWERS = {"good": "Yes", "warn": "In part", "bad": "No", "unknown": "Not known"}
LISTED_GROUPS, LISTED_ROWS = 20, 12


def write_page(path: str | Path, result: Mapping[str, Any], arrays: Arrays) -> Path:
    """Write the page of an audit (`measure.audit_file`). Raises ValueError where the file cannot be written."""
    title = f"Audit of {Path(result['file']).name}"
    about = f"{result['prototypes']:,} prototypes in {result['dim']} dimensions · {result['format']} · {result['key']}"
    cards = "\n".join(card(q, status, ANSWERS[status], said) for q, status, said in sentences(result))
    unit = arrays.prototypes / np.linalg.norm(arrays.prototypes, axis=1, keepdims=True)
    figures = [
        _unique(result),
        _nearest(arrays.nearest),
        plots.usage_plot(arrays.shares, "no features were given (--features=FILE)."),
        _spectrum(result["spectrum"]),
        plots.similarity_plot(similarity(unit)),
        plots.projection_plot(projection(unit), arrays.shares),
    ]
    short = {k: v for k, v in result.items() if k not in ("duplicates", "spectrum")}
    document = page(
        title,
        tag("header", Html(f"{tag('h1', title)}{tag('p', about, 'sub')}")),
        section("In short", Html(f'<div class="cards">{cards}</div>')),
        section("Plots", grid(*figures)),
        section("Which repeat one another", *_groups(result["duplicates"])),
        section("All numbers", details("As JSON", code(json.dumps(short, indent=2), "listing"))),
    )
    return write_text(Path(path), document)


def _unique(result: Mapping[str, Any]) -> Html:
    title = "Unique prototypes"
    count = result["prototypes"]
    series: list[tuple[str, Mapping[str, int]]] = [
        ("these", result["unique"]),
        ("random directions", result["control"]),
    ]
    if result["live_unique"] is not None:
        series.insert(1, ("live and unique", result["live_unique"]))
    caption = "Share of all prototypes. Random directions are an untrained codebook of equal number and width."
    with drawing():
        figure, axes = new_axes(x_label="epsilon (cosine distance)")
        width = 0.8 / len(series)
        for number, (name, counts) in enumerate(series):
            places = np.arange(len(counts)) + (number - (len(series) - 1) / 2) * width
            colour = ROLES["muted"] if name == "random directions" else SERIES[number]
            axes.bar(places, [n / count for n in counts.values()], width * 0.92, color=colour, label=name)
        axes.set_xticks(np.arange(len(result["unique"])), list(result["unique"]))
        plots.percent_axis(axes)
        legend_above(figure, axes)
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)


def _nearest(nearest: np.ndarray) -> Html:
    title = "Cosine to the nearest other prototype"
    values = nearest[np.isfinite(nearest)]
    if not values.size:
        return plot(title, None, "", "there is but one prototype.")
    caption = "A heap at the right end are near copies. The dotted line is epsilon 0.025."
    with drawing():
        figure, axes = new_axes(x_label="cosine", y_label="prototypes")
        axes.hist(values, bins=60, range=(min(float(values.min()), 0.0), 1.0), color=SERIES[0])
        axes.axvline(0.975, color=ROLES["ink"], linestyle=(0, (1.2, 2.2)), linewidth=1.6)
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)


def _spectrum(spectrum: Mapping[str, Any]) -> Html:
    title = "Spectrum"
    shares = spectrum["singular_value_shares"]
    caption = "Largest singular values of the unit prototypes as shares of their sum; together they span "
    caption += f"{spectrum['effective_rank']:.1f} effective directions of {spectrum['attainable']}. Dotted: all equal."
    with drawing():
        figure, axes = new_axes(x_label="singular value", y_label="share")
        axes.bar(np.arange(1, len(shares) + 1), shares, color=SERIES[0])
        plots.level(axes, 1.0 / spectrum["attainable"], "all equal", ROLES["muted"])
        plots.percent_axis(axes)
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)


def _groups(groups: Sequence[Sequence[int]]) -> list[Html]:
    if not groups:
        return [tag("p", "No two prototypes are within cosine distance 0.025 of a common one.")]
    rows = [
        (f"{len(g):,}", ", ".join(map(str, g[:LISTED_ROWS])) + (", ..." if len(g) > LISTED_ROWS else ""))
        for g in groups[:LISTED_GROUPS]
    ]
    note = "Rows within cosine distance 0.025 of the first of their group."
    if len(groups) > LISTED_GROUPS:
        note += f" The {LISTED_GROUPS} largest of {len(groups):,}; --json prints all."
    return [tag("p", note, "note"), Html(f'<div class="plain">{table(("members", "rows"), rows)}</div>')]
