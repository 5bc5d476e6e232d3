"""The figures of one run: each takes what was recorded and returns a titled figure, or says what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from protojax.reporting.facts import EPSILONS, Facts, primary_label
from protojax.reporting.page import Html, plot
from protojax.reporting.records import Run, series
from protojax.reporting.svg import (
    ROLES,
    SERIES,
    STYLES,
    drawing,
    legend_above,
    new_axes,
    plain_numbers,
    short,
    to_svg,
)

Curve = tuple[str, np.ndarray, np.ndarray]
MOST_POINTS = 400
MOST_DOTS = 1500
MOST_LOSSES = 6
MEASURED_BESIDE = ("active", "largest_logit", "smallest_logit", "logit_range")  # of a term, in plots of their own


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` points: means over equal runs of neighbouring points; a run without a finite value is NaN,
    which is drawn as a gap."""
    if steps.size <= MOST_POINTS:
        return steps, values
    thinned = [
        (s.mean(), v[np.isfinite(v)].mean() if np.isfinite(v).any() else math.nan)
        for s, v in zip(np.array_split(steps, MOST_POINTS), np.array_split(values, MOST_POINTS), strict=True)
    ]
    return np.asarray([s for s, _ in thinned]), np.asarray([v for _, v in thinned])


def drawable(curves: Sequence[Curve]) -> list[Curve]:
    """The curves that have at least one finite value, thinned."""
    return [(name, *thin(steps, values)) for name, steps, values in curves if np.isfinite(values).any()]


def level(axes: Axes, value: float | None, label: str, colour: str) -> None:
    """A dotted horizontal control line."""
    if value is not None:
        axes.axhline(value, color=colour, linestyle=(0, (1.2, 2.2)), linewidth=1.6, label=label)


def axis_from_zero(axes: Axes) -> None:
    """Start the y axis at 0, so that noise on a constant looks like noise, and leave room above the highest value."""
    axes.set_ylim(0.0, 1.08 * max(float(axes.dataLim.y1), 1e-9))


def percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axis_from_zero(axes)


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    for number, (name, steps, values) in enumerate(curves):
        # A single point would be an invisible line.
        marker = "o" if steps.size <= 40 else None
        style = STYLES[number % len(STYLES)]
        axes.plot(steps, values, color=SERIES[number % 8], linestyle=style, marker=marker, label=name)


def line_plot(
    title: str,
    curves: Sequence[Curve],
    caption: str,
    missing: str,
    levels: Sequence[tuple[str, float | None, str]] = (),
    share: bool = False,
    log: bool = False,
    from_zero: bool = False,
    y_label: str = "",
    x_label: str = "step",
) -> Html:
    """Curves over steps (or what x_label names) with dotted control levels. share: values in [0, 1], drawn as per cent
    from 0. log: positive values, on a logarithmic axis where they span more than a factor of 20."""
    found = drawable(curves)
    if log:
        found = [(name, s, np.where(v > 0, v, math.nan)) for name, s, v in found if (v > 0).any()]
    if not found:
        return plot(title, None, "", missing)
    # Within one decade a logarithmic axis would have no tick to read.
    log = log and max(np.nanmax(v) for _, _, v in found) > 20 * min(np.nanmin(v) for _, _, v in found)
    with drawing():
        figure, axes = new_axes(x_label=x_label, y_label=y_label)
        if log:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
        draw_curves(axes, found)
        for name, value, colour in levels:
            level(axes, value, name, colour)
        if share:
            percent_axis(axes)
        elif from_zero:
            axis_from_zero(axes)
        legend_above(figure, axes)
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)


def losses(run: Run) -> Html:
    keys = sorted({key for record in run.train for key in _names(record) if key.startswith("loss/")}, key=_loss_order)
    chance_keys = [key for key in keys if key.split("/")[-1] == "chance"]
    # The one term of an objective that has no other is the total again.
    terms = [key for key in keys if key.count("/") > 1 and key.endswith("/loss")]
    other = {key for key in keys if key.split("/")[-1] in MEASURED_BESIDE}
    shown = [k for k in keys if k not in {*chance_keys, *other} and (k not in terms or len(terms) > 1)][:MOST_LOSSES]
    curves = [(key.removeprefix("loss/"), *series(run.train, "metrics", key)) for key in shown]
    chance = series(run.train, "metrics", chance_keys[0])[1] if chance_keys else np.empty(0)
    chance = chance[np.isfinite(chance)]
    bad = sum(int((~np.isfinite(values)).sum()) for _, _, values in curves)
    caption = "Dotted: the loss of an encoder that cannot tell anything apart (chance)." if chance.size else ""
    if bad:
        caption += f" {bad} values were not finite and are gaps."
    caption = caption.strip() or "Means over the steps between two records."
    levels = [("chance", float(chance[-1]) if chance.size else None, ROLES["muted"])]
    return line_plot("Losses", curves, caption, "no training record with a loss.", levels)


def _loss_order(key: str) -> tuple[int, str]:
    order, last = ("total", "loss", "consistency", "regulariser"), key.split("/")[-1]
    return (order.index(last) if last in order else len(order), key)


def _names(record: dict) -> list[str]:
    metrics = record.get("metrics")
    return list(metrics) if isinstance(metrics, dict) else []


def knn(run: Run, facts: Facts) -> Html:
    labels = list(facts.knn) or list(facts.untrained_knn)
    curves = [(label, *series(run.evals, "metrics", "knn", label, str(facts.k))) for label in labels[:4]]
    levels = [
        (f"{label}, untrained", facts.untrained_knn.get(label), SERIES[i % 8]) for i, label in enumerate(labels[:4])
    ]
    caption = f"Share of test images whose {facts.k} nearest training images vote for the right class. "
    caption += "Dotted: the same encoder before training; the gap is what was learned."
    return line_plot("k-NN accuracy", curves, caption, "no k-NN evaluation was recorded.", levels, share=True)


def unique(run: Run, facts: Facts) -> Html:
    curves = [(f"ε {epsilon:g}", *_audit_series(run, "unique", epsilon, facts.count)) for epsilon in EPSILONS]
    caption = "Share of prototypes with no other one within cosine distance ε. Dotted: random directions at ε = 0.5."
    control = facts.random.unique.get(0.5)
    share = control / facts.count if control is not None and facts.count else None
    missing = "no prototype audit was recorded."
    return line_plot("Unique prototypes", curves, caption, missing, [("random 0.5", share, ROLES["muted"])], share=True)


def live(run: Run, facts: Facts) -> Html:
    count = facts.count or math.nan
    steps, alive = series(run.evals, "metrics", "prototypes", "live")
    curves = [("live", steps, alive / count)]
    for epsilon in (0.025, 0.5):
        name = f"live-unique {epsilon:g}"
        curves.append((name, *_audit_series(run, "live_unique", epsilon, facts.count)))
    caption = "Live: nearest prototype of more than 1/(10 K) of the training images. Live-unique: live and distinct."
    return line_plot("Live prototypes", curves, caption, "no prototype audit was recorded.", share=True)


def _audit_series(run: Run, field: str, epsilon: float, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    steps, values = series(run.evals, "metrics", "prototypes", field, f"{epsilon:g}")
    return steps, values / (count or math.nan)


def perplexity(run: Run, facts: Facts) -> Html:
    steps, nearest = series(run.evals, "metrics", "prototypes", "perplexity")
    own_steps, own = series(run.train, "metrics", "estimator/usage_perplexity")
    curves = [("nearest prototype", steps, nearest), ("estimator's own", own_steps, own)]
    caption = "Effective number of prototypes in use. Only the first counts: an estimator can balance its own figure."
    levels = [("K", float(facts.count) if facts.count else None, ROLES["muted"])]
    return line_plot("Usage perplexity", curves, caption, "no usage was recorded.", levels, from_zero=True)


def rank(run: Run, facts: Facts) -> Html:
    steps, values = series(run.evals, "metrics", "effective_rank")
    caption = "Effective number of independent directions in the features; near 1 the encoder has collapsed."
    levels = [("untrained", facts.untrained_rank, ROLES["muted"])]
    missing = "effective rank was not recorded."
    title = "Effective rank of the features"
    return line_plot(title, [("trained", steps, values)], caption, missing, levels, from_zero=True)


def gradient(run: Run) -> Html:
    curve = ("gradient norm", *series(run.train, "metrics", "grad_norm"))
    caption = "Before clipping. Spikes come before a diverging loss."
    return line_plot("Gradient norm", [curve], caption, "gradient norm was not recorded.", log=True)


def throughput(run: Run) -> Html:
    curve = ("images/s", *series(run.train, "images_per_second"))
    caption = "The first point may hold the time of compilation."
    missing = "no training record with images per second."
    return line_plot("Throughput", [curve], caption, missing, from_zero=True, y_label="images/s")


def usage(run: Run) -> Html:
    return usage_plot(run.arrays.get("usage"), "report_data.npz holds no usage.")


def usage_plot(shares: np.ndarray | None, missing: str) -> Html:
    """Usage shares [K], sorted, with the borders of live and of an equal share."""
    title = "Usage, sorted"
    if shares is None or not np.isfinite(shares).all() or shares.sum() <= 0:
        return plot(title, None, "", missing)
    shares = np.sort(shares.astype(np.float64) / shares.sum())[::-1]
    count, used = shares.size, int((shares > 0).sum())
    alive = int((shares > 1 / (10 * count)).sum())
    ranks = np.unique(np.linspace(0, used - 1, min(used, MOST_POINTS)).astype(np.int64))
    caption = f"Share of training images per prototype, most used first: {alive} of {count} live, "
    caption += f"{count - used} never nearest to any image."
    with drawing():
        figure, axes = new_axes(x_label="prototypes, by usage", y_label="share of images")
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        axes.plot(ranks + 1, shares[ranks], color=SERIES[0], marker="o" if used < 20 else None, label="usage")
        floor = min(float(shares[used - 1]), 1 / (10 * count)) / 2
        axes.fill_between(ranks + 1, floor, shares[ranks], color=SERIES[0], alpha=0.15, linewidth=0)
        level(axes, 1 / count, "equal share 1/K", ROLES["muted"])
        level(axes, 1 / (10 * count), "live above 1/(10 K)", SERIES[1])
        axes.set_xlim(0, count + 1)
        axes.set_ylim(bottom=floor)
        legend_above(figure, axes)
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)


def similarity(run: Run) -> Html:
    return similarity_plot(run.arrays.get("similarity"), "report_data.npz holds no similarity matrix.")


def similarity_plot(cosines: np.ndarray | None, missing: str = "") -> Html:
    """Cosines [n,n] as a picture."""
    title = "Prototype against prototype"
    if cosines is None:
        return plot(title, None, "", missing)
    cosines = np.clip(cosines.astype(np.float32), -1.0, 1.0)
    caption = f"Cosine among {len(cosines)} prototypes, ordered by cluster. Bright squares off the diagonal are near "
    caption += "copies of one another; a bright whole is one cone."
    with drawing():
        figure, axes = new_axes(4.4, "", "")
        axes.grid(visible=False)
        low = min(0.0, float(np.nanquantile(cosines, 0.01)))
        picture = axes.imshow(cosines, cmap="viridis", vmin=low, vmax=1.0, interpolation="none")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(picture, ax=axes, shrink=0.85, label="cosine")
        bar.outline.set_visible(False)  # type: ignore[operator]
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)


def groups(facts: Facts) -> Html:
    title = "Accuracy by group of classes"
    found = [(label, values) for label, values in facts.groups.items() if any(v is not None for v in values.values())]
    if not found:
        return plot(title, None, "", "no accuracy by group was recorded.")
    names = list(dict.fromkeys(group for _, values in found for group in values))
    width = 0.8 / len(found)
    with drawing():
        figure, axes = new_axes(x_label="")
        for number, (label, values) in enumerate(found):
            places = np.arange(len(names)) + (number - (len(found) - 1) / 2) * width
            heights = [values.get(name) for name in names]
            for place, value in zip(places, heights, strict=True):
                shown = "none" if value is None else f"{100 * value:.0f}"
                axes.text(place, value or 0.0, shown, ha="center", va="bottom", fontsize=10)
            filled = [value or 0.0 for value in heights]
            axes.bar(places, filled, width * 0.92, color=SERIES[number % 8], label=label)
            before = facts.untrained_groups.get(label, {})
            marks = [(place, before.get(name)) for place, name in zip(places, names, strict=True)]
            drawn = [(place, value) for place, value in marks if value is not None]
            if drawn:
                label_once = "untrained" if number == 0 else "_again"
                x, y = np.asarray(drawn).T
                axes.hlines(y, x - width * 0.46, x + width * 0.46, color=ROLES["ink"], linewidth=2, label=label_once)
        axes.set_xticks(np.arange(len(names)), [short(name, 12) for name in names])
        axes.tick_params(axis="x", length=0)
        percent_axis(axes)
        legend_above(figure, axes)
        caption = "k-NN accuracy in per cent over classes with many (head), some and few (tail) training images"
        caption += "; balanced: mean over classes." if "balanced" in names else "."
        caption += f" The verdict above speaks of the {primary_label(facts.groups)} labels."
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)


def projection(run: Run) -> Html | None:
    """Map of the prototypes in two dimensions, or None where it was not written (it is optional)."""
    points = run.arrays.get("projection")
    if points is None or points.shape[1] != 2:
        return None
    return projection_plot(points, run.arrays.get("usage"))


def projection_plot(points: np.ndarray, usage: np.ndarray | None) -> Html:
    """Points [K,2]; usage [K] gives their sizes and tells live from dead; None: all alike."""
    title = "Map of the prototypes"
    shares = np.ones(len(points)) if usage is None else usage
    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), MOST_DOTS)).astype(np.int64))
    alive = shares[chosen] > shares.sum() / (10 * len(points))
    sizes = np.clip(16.0 * shares[chosen] * len(points) / max(float(shares.sum()), 1e-30), 10.0, 120.0)
    caption = "Projection on the first two principal axes; distances are only roughly kept."
    caption += "" if usage is None else " Size: usage."
    if chosen.size < len(points):
        caption += f" {chosen.size} of {len(points)} prototypes are drawn."
    with drawing():
        figure, axes = new_axes(4.2, "", "")
        axes.grid(visible=False)
        for name, mask, colour, marker in (("live", alive, SERIES[0], "o"), ("dead", ~alive, SERIES[1], "X")):
            if mask.any():
                x, y = points[chosen][mask].T
                axes.scatter(x, y, s=sizes[mask], c=colour, marker=marker, alpha=0.7, linewidths=0, label=name)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        legend_above(figure, axes)
        return plot(title, to_svg(figure, f"{title}. {caption}"), caption)
