"""Curves of a study: a panel a metric, a line a trial (mean over seeds), a band of one standard deviation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PANEL = (4.2, 3.2)  # inches


def draw(titles: Sequence[str], trials: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """An SVG file's text, a panel a title. trials: label -> runs, each title -> [steps, values]; a run without a title
    is left out of its panel. Seeds are averaged at the steps that all of them have."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "protojax", "font.size": 9.0}):
        figure = Figure(figsize=(PANEL[0] * len(titles), PANEL[1]), layout="constrained")
        FigureCanvasSVG(figure)
        for i, title in enumerate(titles, 1):
            axes = figure.add_subplot(1, len(titles), i)
            axes.set_title(title)
            axes.set_xlabel("step")
            for label, runs in trials.items():
                steps, values = _stack([run[title] for run in runs if title in run])
                if steps.size:
                    mean, band = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])
                    (line,) = axes.plot(steps, mean, label=label)
                    axes.fill_between(steps, mean - band, mean + band, color=line.get_color(), alpha=0.2, linewidth=0)
            axes.set_ylim(bottom=0.0)
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()


def _stack(found: Sequence[Sequence[Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps that all have [T], values [seeds,T])."""
    if not found:
        return np.zeros(0), np.zeros((0, 0))
    runs = [dict(zip(steps, values, strict=True)) for steps, values in found]
    common = sorted(set.intersection(*({*run} for run in runs)))
    return np.asarray(common), np.asarray([[run[step] for step in common] for run in runs])
