"""Who gets work, over time and by class: figures of one run."""

from __future__ import annotations

import math

import numpy as np

from protojax.reporting.page import Html, plot
from protojax.reporting.records import Run, as_number, dig
from protojax.reporting.svg import ROLES, SERIES, drawing, legend_above, new_axes, plain_numbers, to_svg

# Bins of K * usage (`evals.audit.usage_histogram`) that are drawn as one: name, upper limits.
BANDS = (
    ("no image", ("0",)),
    ("dead, ≤ 0.1", ("0.03", "0.1")),
    ("≤ 1 (equal share)", ("0.3", "1")),
    ("≤ 10", ("3", "10")),
    ("more", ("30", "100", "inf")),
)
BAND_COLOURS = (ROLES["grid"], SERIES[1], SERIES[4], SERIES[2], SERIES[0])


def usage_over_time(run: Run) -> Html:
    """Prototypes by usage band at every evaluation, stacked to 100%."""
    title = "Usage over time"
    steps, rows = [], []
    for record in run.evals:
        bins = dig(record, "metrics", "prototypes", "usage")
        counts = [sum(as_number(dig(bins, limit)) or 0.0 for limit in limits) for _, limits in BANDS]
        if sum(counts):
            steps.append(float(record["step"]))
            rows.append(counts)
    if len(rows) < 2:
        return plot(title, None, "", "usage was not recorded at two evaluations or more.")
    shares = np.asarray(rows) / np.sum(rows, axis=1, keepdims=True)
    caption = (
        "Share of prototypes by how many images they are nearest to, in multiples of an equal share. A healthy run "
    )
    caption += "moves everything into the upper bands; a few prototypes that take all leave the rest without an image."
    with drawing():
        figure, axes = new_axes()
        names = [name for name, _ in BANDS]
        axes.stackplot(steps, shares.T, labels=names, colors=BAND_COLOURS, linewidth=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        axes.set_ylim(0.0, 1.0)
        axes.set_xlim(steps[0], steps[-1])
        legend_above(figure, axes)
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)


def tail(run: Run) -> Html:
    """Prototypes and coverage of each class against its number of training images."""
    title = "Do rare classes have prototypes?"
    counts, coverage = run.arrays.get("class_counts"), run.arrays.get("class_coverage")
    owned = run.arrays.get("class_prototypes")
    if counts is None or coverage is None or owned is None or not (counts > 0).any():
        return plot(title, None, "", "report_data.npz holds no classes (no labels, or written by an older version).")
    there = counts > 0
    counts, coverage, owned = counts[there], coverage[there], owned[there]
    without = int((owned == 0).sum())
    rare = counts <= np.median(counts)
    caption = f"A dot a class. {without} of {counts.size} classes are the commonest one in no live prototype, "
    caption += f"{int((owned[rare] == 0).sum())} of them in the rarer half. Mean cosine of an image to its nearest "
    caption += f"prototype: {coverage[rare].mean():.3f} in the rarer half"
    caption += f", {coverage[~rare].mean():.3f} in the other." if (~rare).any() else "."
    with drawing():
        figure, axes = new_axes(x_label="training images of the class", y_label="prototypes of the class")
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        spread = 1.0 + 0.04 * (np.arange(counts.size) % 5 - 2)  # classes of equal size would hide one another
        for name, mask, colour, marker in (
            ("has", owned > 0, SERIES[0], "o"),
            ("has none", owned == 0, SERIES[1], "X"),
        ):
            if mask.any():
                axes.scatter(counts[mask] * spread[mask], owned[mask], c=colour, marker=marker, s=28, alpha=0.75,
                             linewidths=0, label=name)  # fmt: skip
        top = float(owned.max())
        axes.set_ylim(-0.06 * max(top, 1.0), 1.1 * max(top, 1.0))
        low, high = float(counts.min()), float(counts.max())
        axes.set_xlim(low / 1.3, high * 1.3)
        if math.log10(high / low) < 1.0:
            axes.set_xscale("linear")
            axes.set_xlim(max(0.0, low - 0.1 * high), 1.1 * high)
        legend_above(figure, axes)
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)
