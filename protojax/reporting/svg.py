"""Matplotlib figures as inline SVG whose colours are CSS variables.

A figure is drawn in placeholder colours (`ROLES`), and each placeholder becomes `var(--role)` in the SVG text. The page
defines the variables once for light and once for dark, so one drawing serves both, in print size on a phone and on a
desk. Text stays text: it takes the page's font, can be searched, and is escaped by matplotlib's SVG writer.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# Placeholders that no colour map produces together with a role's meaning: near-black, one value apart.
ROLES = {"ink": "#010203", "muted": "#010204", "grid": "#010205", "surface": "#010206"}
SERIES = tuple(f"#0103{i:02x}" for i in range(1, 9))
_VARIABLES = {**{colour: role for role, colour in ROLES.items()}, **{c: f"s{i}" for i, c in enumerate(SERIES, 1)}}
STYLES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))

# 5 inches are 360 units of the viewBox: about one CSS pixel a unit on a phone, 1.4 in a two-column page.
WIDTH, HEIGHT = 5.0, 3.1
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "protojax",
    "text.parse_math": False,
    "font.size": 11.0,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": ROLES["muted"],
    "axes.edgecolor": ROLES["muted"],
    "axes.linewidth": 0.8,
    "axes.xmargin": 0.02,
    "axes.ymargin": 0.08,
    "axes.formatter.limits": (-4, 5),
    "grid.color": ROLES["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": ROLES["muted"],
    "ytick.color": ROLES["muted"],
    "text.color": ROLES["ink"],
    "lines.linewidth": 1.8,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.0,
}


@contextmanager
def drawing() -> Iterator[None]:
    """The drawing style of every figure. Names in a user's script may lie outside the bundled font: the browser draws
    them from its own, so matplotlib's warning about missing glyphs is of no use here."""
    with mpl.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_axes(height: float = HEIGHT, x_label: str = "step", y_label: str = "") -> tuple[Figure, Axes]:
    """A figure of one axes in the page's size; call inside `drawing()`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=False, axis="x")
    return figure, axes


def legend_above(figure: Figure, axes: Axes) -> None:
    """Legend over the plot, outside its axes, so that it never hides a curve."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        # As many columns as fit the width at about 6 units a letter.
        labels = [short(label, 40) for label in labels]
        columns = int(72 * WIDTH / (6 * max(map(len, labels)) + 44))
        columns = 2 if len(labels) == 4 and columns == 3 else min(max(columns, 1), len(labels))
        extra_rows = -(-len(labels) // columns) - 3
        if extra_rows > 0:
            figure.set_figheight(figure.get_figheight() + 0.23 * extra_rows)
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def short(name: str, letters: int) -> str:
    """A name of any length in a figure's space."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def plain_numbers(axis: Axis) -> None:
    """Tick labels of a logarithmic axis as plain text: the page draws no formulas."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def to_svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element for an HTML page: no prologue, no metadata, no URL, ids unique to it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return _inline(text, description)


def _inline(text: str, description: str) -> str:
    prefix = "f" + hashlib.sha256((description + text).encode()).hexdigest()[:8]
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=")
    box = re.search(r'viewBox="([^"]*)"', text)
    if box is None:
        raise ValueError('matplotlib wrote an SVG without a viewBox: expected viewBox="x y width height"')
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    text = re.sub(r"<svg[^>]*>", lambda _: f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">', text, count=1)
    text = re.sub(r'(?<=\sid=")([^"]+)', rf"{prefix}\1", text)
    text = re.sub(r'(?<=href="#)([^"]+)', rf"{prefix}\1", text)
    text = re.sub(r"(?<=url\(#)([^)]+)", rf"{prefix}\1", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"#0[0-9a-f]{5}", lambda m: f"var(--{_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], text)
    # Bitmaps inside (colour maps) come with line breaks that nothing needs.
    text = re.sub(r"(data:image/png;base64,)([^\"]*)", lambda m: m[1] + re.sub(r"\s", "", m[2]), text)
    return re.sub(r"\n\s*", "\n", text).strip()
