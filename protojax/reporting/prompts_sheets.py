"""What each sub-prompt of a class stands for: the images that it claims, its share of the class, its likeness to the
others. Data (report_data.npz), the part of a page, and a picture for `protojax prompts show`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from protojax.config import suggest
from protojax.reporting.page import Html, grid, image, plot, table, tag, text
from protojax.reporting.records import Run
from protojax.reporting.sections import jpeg
from protojax.reporting.svg import ROLES, SERIES, drawing, new_axes, short, to_svg

COLUMNS = 8
SHOWN = 3
SIDE = 48  # of a tile on the page
GREY = 0.8


class Sheet(NamedTuple):
    """One class. rows int [K,8] of the training split (-1: empty), shares [K,8] responsibilities, usage [K],
    similarity [K,K], modes [K]: what most claimed images are ('' where modes are unknown), images uint8 [K,8,h,w,3] or
    None, description."""

    name: str
    rows: np.ndarray
    shares: np.ndarray
    usage: np.ndarray
    similarity: np.ndarray
    modes: tuple[str, ...]
    images: np.ndarray | None = None
    description: str = ""


# --------------------------------------------------------------------------------------------------- the data
def claimed(r: np.ndarray, similarity: np.ndarray, members: np.ndarray, columns: int = COLUMNS) -> tuple[
    np.ndarray, np.ndarray]:  # fmt: skip
    """Of one class: rows [K,columns] of `r` [N,K] that each sub-prompt claims, by falling responsibility (to the two
    digits that are printed, then by similarity [N,K]), and these responsibilities. members: rows of the class. A row is
    claimed by its argmax alone; -1 and 0 where fewer are."""
    count = r.shape[1]
    rows, shares = np.full((count, columns), -1, np.int64), np.zeros((count, columns), np.float32)
    best = r[members].argmax(axis=1)
    for k in range(count):
        own = members[best == k]
        own = own[np.lexsort((-similarity[own, k], -r[own, k].round(2)))][:columns]
        rows[k, : len(own)], shares[k, : len(own)] = own, r[own, k]
    return rows, shares


def mode_labels(r: np.ndarray, members: np.ndarray, modes: np.ndarray | None, names: Sequence[str]) -> list[str]:
    """For each sub-prompt of one class 'name 83%': the commonest mode of the images that it claims; '' without any."""
    if modes is None:
        return [""] * r.shape[1]
    best, out = r[members].argmax(axis=1), []
    for k in range(r.shape[1]):
        own = modes[members[best == k]]
        if not len(own):
            out.append("")
            continue
        counts = np.bincount(own)
        most = int(np.argmax(counts))
        name = names[most] if most < len(names) else f"mode {most}"
        out.append(f"{name} {100 * counts[most] / len(own):.0f}%")
    return out


def write_prompts_data(workdir: Path, r: np.ndarray, similarity: np.ndarray, labels: np.ndarray, made: np.ndarray,
                       class_names: Sequence[str], *, rows: np.ndarray,
                       pictures: Callable[[np.ndarray], np.ndarray] | None = None,
                       modes: np.ndarray | None = None, mode_names: Sequence[Sequence[str]] = (),
                       descriptions: Sequence[str] = ()) -> Path:  # fmt: skip
    """report_data.npz: the sheets of all classes (sheet_rows, sheet_shares [C,K,8], class_usage [C,K], class_similarity
    [C,K,K] float16, sheet_modes [C,K]), and pictures of three (sheet_shown [3], sheet_images [3,K,8,48,48,3]): the
    classes of lowest, median and highest usage perplexity.

    r, similarity [N,K]: responsibilities of the training images at the temperature of training, and cosines; made
    [C,K,D]: unit prompts; rows [N]: where each image stands in the split, which is what pictures(rows) takes.
    """
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], np.arange(len(class_names) + 1))
    members = [order[a:b] for a, b in itertools.pairwise(edges)]
    sheets = [claimed(r, similarity, own) for own in members]
    usage = np.stack([r[own].mean(axis=0) for own in members])
    perplexity = np.exp(-np.sum(usage * np.log(np.maximum(usage, 1e-12)), axis=1))
    ranked = np.argsort(perplexity, kind="stable")
    shown = list(dict.fromkeys(int(ranked[i]) for i in (0, len(ranked) // 2, -1)))
    found: dict[str, Any] = {
        "sheet_rows": np.stack([np.where(s[0] >= 0, rows[s[0]], -1) for s in sheets]),
        "sheet_shares": np.stack([s[1] for s in sheets]),
        "class_usage": usage.astype(np.float32),
        "class_similarity": np.einsum("ckd,cld->ckl", made, made).astype(np.float16),
        "prompt_class_names": np.asarray(class_names),
        "sheet_shown": np.asarray(shown),
    }
    if modes is not None:
        found["sheet_modes"] = np.asarray(
            [mode_labels(r, own, modes, mode_names[c] if c < len(mode_names) else ()) for c, own in enumerate(members)]
        )
    if descriptions:
        found["class_descriptions"] = np.asarray(descriptions)
    if pictures is not None:
        found["sheet_images"] = np.stack([tiles(found["sheet_rows"][c], pictures, SIDE) for c in shown])
    path = workdir / "report_data.npz"
    np.savez_compressed(path, **found)
    return path


def tiles(rows: np.ndarray, pictures: Callable[[np.ndarray], np.ndarray], side: int) -> np.ndarray:
    """Pictures uint8 [K,8,side,side,3] of rows [K,8]; grey where a row is -1."""
    out = np.full((*rows.shape, side, side, 3), round(255 * GREY), np.uint8)
    there = rows >= 0
    if there.any():
        found = pictures(rows[there])
        out[there] = np.stack([np.asarray(Image.fromarray(p).resize((side, side))) for p in found])
    return out


def sheet_of(arrays: Mapping[str, np.ndarray], name: str) -> Sheet:
    """The sheet of a class from report_data.npz. Raises ValueError, with the nearest name, for a class it lacks."""
    names = [str(n) for n in arrays["prompt_class_names"]]
    if name not in names:
        known = names if len(names) <= 20 else [*names[:20], "..."]
        raise ValueError(f"no class {name!r}{suggest(name, names)}; there are {known}.")
    c = names.index(name)
    count = arrays["class_usage"].shape[1]
    shown = [int(i) for i in arrays["sheet_shown"]]
    images = arrays["sheet_images"][shown.index(c)] if "sheet_images" in arrays and c in shown else None
    modes = tuple(str(m) for m in arrays["sheet_modes"][c]) if "sheet_modes" in arrays else ("",) * count
    text_of = str(arrays["class_descriptions"][c]) if "class_descriptions" in arrays else ""
    return Sheet(name, arrays["sheet_rows"][c], arrays["sheet_shares"][c], arrays["class_usage"][c],
                 arrays["class_similarity"][c].astype(np.float32), modes, images, text_of)  # fmt: skip


# --------------------------------------------------------------------------------------------------- the page
def class_block(sheet: Sheet) -> Html:
    """One class: K rows of claimed images with their responsibilities, usage bars and the similarity matrix."""
    heads = ("sub-prompt", "usage", *(["mostly"] if any(sheet.modes) else []), *[""] * sheet.rows.shape[1])
    cells: list[Sequence[object]] = []
    for k in range(len(sheet.usage)):
        mode = [short(sheet.modes[k], 28) or "nothing"] if any(sheet.modes) else []
        cells.append((f"{k}", f"{100 * sheet.usage[k]:.0f} %", *mode,
                      *(_cell(sheet, k, i) for i in range(sheet.rows.shape[1]))))  # fmt: skip
    about = tag("p", sheet.description, "note") if sheet.description else Html("")
    return Html(
        tag("h3", f"Class {sheet.name}") + about + table(heads, cells)
        + grid(usage_figure(sheet), similarity_figure(sheet))
    )  # fmt: skip


def _cell(sheet: Sheet, k: int, i: int) -> Html:
    row, share = int(sheet.rows[k, i]), float(sheet.shares[k, i])
    if row < 0:
        style = f"width:{SIDE}px;height:{SIDE}px;background:var(--grid);border-radius:3px"
        return Html(f'<div style="{style}" title="no further image"></div>&nbsp;')
    if sheet.images is None:
        return Html(f"{row}<br>{share:.2f}")
    return Html(image(jpeg(sheet.images[k, i]), "image/jpeg", f"training image {row}") + f"<br>{share:.2f}")


def usage_figure(sheet: Sheet) -> Html:
    title, count = "Usage", len(sheet.usage)
    caption = f"Share of the class's training images of each sub-prompt. Dotted: an equal share, 1/{count}."
    with drawing():
        figure, axes = new_axes(x_label="sub-prompt", y_label="share of the class")
        _bars(axes, sheet.usage, SERIES[0], ROLES["muted"])
        return plot(title, to_svg(figure, f"{title} of {sheet.name}. {caption}"), caption)


def _bars(axes: Axes, usage: np.ndarray, colour: str, line: str) -> None:
    axes.bar(np.arange(len(usage)), usage, color=colour)
    axes.axhline(1 / len(usage), color=line, linestyle=(0, (1.2, 2.2)), linewidth=1.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_xticks(np.arange(len(usage)) if len(usage) <= 16 else np.arange(0, len(usage), 4))


def similarity_figure(sheet: Sheet) -> Html:
    title = "Sub-prompt against sub-prompt"
    caption = "Cosine between prompts. Right after normal initialisation all are alike at 0.95 (D = 512)."
    with drawing():
        figure, axes = new_axes(4.0, "", "")
        picture = _matrix(axes, sheet.similarity)
        bar = figure.colorbar(picture, ax=axes, shrink=0.85, label="cosine")
        bar.outline.set_visible(False)  # type: ignore[operator]
        return plot(title, to_svg(figure, f"{title} of {sheet.name}. {caption}"), caption)


def _matrix(axes: Axes, cosines: np.ndarray) -> Any:
    axes.grid(visible=False)
    low = float(cosines.min()) if cosines.min() < 1.0 - 1e-3 else 0.0
    picture = axes.imshow(cosines, cmap="viridis", vmin=low, vmax=1.0, interpolation="none")
    ticks = np.arange(len(cosines)) if len(cosines) <= 16 else np.arange(0, len(cosines), 4)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.spines[:].set_visible(False)
    return picture


def page_part(run: Run) -> list[Html]:
    """The three classes with pictures, lowest usage first."""
    names = [str(run.arrays["prompt_class_names"][int(c)]) for c in run.arrays["sheet_shown"]]
    note = (
        f"Of {len(run.arrays['prompt_class_names'])} classes those of lowest, median and highest usage: the training "
        "images that each sub-prompt claims, by falling responsibility at the temperature of training (number below). "
        "Any other class: "
    )
    command = Html(f"<code>{text(f'protojax prompts show {run.path} --class=NAME --out=sheet.png')}</code>")
    return [tag("p", Html(text(note) + command), "note"), *(class_block(sheet_of(run.arrays, n)) for n in names)]


# ------------------------------------------------------------------------------------------------ a picture file
def draw(sheet: Sheet, path: Path) -> None:
    """The sheet as a picture (PNG, SVG or PDF by its suffix): rows of images, usage bars, similarity matrix."""
    count, columns = sheet.rows.shape
    height = max(3.6, 0.85 * count + 1.2)
    figure = Figure(figsize=(14.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    halves = figure.add_gridspec(1, 2, width_ratios=(9, 5))
    left, right = figure.add_subfigure(halves[0, 0]), figure.add_subfigure(halves[0, 1])
    axes = left.subplots(count, columns, squeeze=False)
    for k in range(count):
        for i in range(columns):
            _tile(axes[k, i], sheet, k, i)
        mode = f"\n{short(sheet.modes[k], 22)}" if sheet.modes[k] else ""
        axes[k, 0].set_ylabel(
            f"{k}: {100 * sheet.usage[k]:.0f}%{mode}", rotation=0, ha="right", va="center", fontsize=9
        )
    plots = right.subplots(2 if count > 1 else 1, 1, squeeze=False)[:, 0]
    _bars(plots[0], sheet.usage, "#2a78d6", "#5d5d58")
    plots[0].set_title("share of the class's training images", fontsize=10)
    if count > 1:
        right.colorbar(_matrix(plots[1], sheet.similarity), ax=plots[1], shrink=0.85)
        plots[1].set_title("cosine between sub-prompts", fontsize=10)
    figure.suptitle(f"{sheet.name}: training images that each sub-prompt claims, with responsibilities", fontsize=12)
    figure.savefig(path, dpi=110)


def _tile(axes: Axes, sheet: Sheet, k: int, i: int) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    row = int(sheet.rows[k, i])
    if row < 0 or sheet.images is None:
        axes.imshow(np.full((1, 1, 3), GREY), vmin=0, vmax=1)
        if row >= 0:
            axes.text(0, 0, f"row\n{row}", ha="center", va="center", fontsize=8)
    else:
        axes.imshow(sheet.images[k, i])
    axes.set_xlabel(f"{sheet.shares[k, i]:.2f}" if row >= 0 else "empty", fontsize=8, labelpad=1)
