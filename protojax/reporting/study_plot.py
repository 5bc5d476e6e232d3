"""Curves of a study: a panel a metric, a line a trial (mean over seeds), a band of one standard deviation."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from protojax.metrics import read_records
from protojax.reporting.records import series

PANEL = (4.2, 3.2)  # inches


def draw(curves: Mapping[str, str], trials: Mapping[str, Sequence[Path]]) -> str:
    """An SVG file's text. curves: title -> path into the evaluation records ('knn/fine/20'); trials: label -> run
    directories, of which those without records are left out. Seeds are averaged at the steps that all of them have."""
    records = {
        label: [[r for r in read_records(d / "metrics.jsonl") if r["kind"] == "eval"] for d in found if _begun(d)]
        for label, found in trials.items()
    }
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "protojax", "font.size": 9.0}):
        figure = Figure(figsize=(PANEL[0] * len(curves), PANEL[1]), layout="constrained")
        FigureCanvasSVG(figure)
        for i, (title, path) in enumerate(curves.items(), 1):
            axes = figure.add_subplot(1, len(curves), i)
            axes.set_title(title)
            axes.set_xlabel("step")
            for label, runs in records.items():
                steps, values = _stack([series(run, "metrics", *path.split("/")) for run in runs])
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


def _begun(directory: Path) -> bool:
    return (directory / "metrics.jsonl").exists()


def _stack(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps that all have [T], values [seeds,T])."""
    found = [pair for pair in found if pair[0].size]
    if not found:
        return np.zeros(0), np.zeros((0, 0))
    common = sorted(set.intersection(*({*steps.tolist()} for steps, _ in found)))
    rows = [[dict(zip(s.tolist(), v.tolist(), strict=True))[step] for step in common] for s, v in found]
    return np.asarray(common), np.asarray(rows)
