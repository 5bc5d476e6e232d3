"""The page of a run on label distributions: did it learn, does it vary, is it calibrated, was any penalty active."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import log_softmax

from protojax.evals import calibration
from protojax.evals.soft_labels import BINS, entropy, kl
from protojax.reporting import plots, sections
from protojax.reporting.facts import facts_of
from protojax.reporting.page import Html, card, details, grid, plot, section, table, tag
from protojax.reporting.plots import line_plot, percent_axis
from protojax.reporting.records import Run, as_number, dig, flatten, series
from protojax.reporting.svg import SERIES, drawing, legend_above, new_axes, to_svg

ABSENT = "–"
MOST_DOTS, MOST_GROUPS, MOST_CATEGORIES = 1200, 24, 12
GOOD_SKILL, GOOD_ECE, GOOD_CORRELATION = 0.6, 0.03, 0.8


def parts(run: Run) -> tuple[str, tuple[Html, ...]]:
    """(title, sections in reading order)."""
    facts = facts_of(run)
    final = last(run)
    return f"{facts.name}: {facts.arm}", (
        sections.heading(run, facts),
        verdict(final),
        sections.found(facts),
        sections.reading_problems(run),
        figures(run, final),
        group_table(final),
        numbers(run, final),
        sections.configuration(run),
    )


def last(run: Run) -> dict[str, Any]:
    """The soft-label part of the last evaluation; {} where there is none."""
    found = dig(run.summary, "soft_labels") or (dig(run.evals[-1], "metrics", "soft_labels") if run.evals else None)
    return found if isinstance(found, dict) else {}


def _read(final: dict[str, Any], *path: str) -> float | None:
    return as_number(dig(final, *path))


def _show(value: float | None, digits: int = 3) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def verdict(final: dict[str, Any]) -> Html:
    """Four questions, each with its answer against a baseline."""
    value, skill = _read(final, "test", "kl"), _read(final, "test", "skill")
    constant = _read(final, "test", "baselines", "constant")
    status, answer = "unknown", "Not known"
    if skill is not None:
        status = "good" if skill >= GOOD_SKILL else "warn" if skill > 0 else "bad"
        answer = {"good": "Yes", "warn": "Partly", "bad": "No"}[status]
    said = [f"KL on the test split is {_show(value, 4)}; the best constant guess of the training split has "
            f"{_show(constant, 4)}: skill {_show(skill)} (0: no better than the constant, 1: perfect; from "
            f"{GOOD_SKILL} on "
            "this page says yes)."]  # fmt: skip
    if _read(final, "test", "gap_closed") is not None:
        said.append(f"{_show(_read(final, 'test', 'gap_closed'))} of the gap to the best possible model is closed.")
    cards = [
        card("Is it better than a constant?", status, answer, said),
        _varies(final),
        _sharp(final),
        _calibrated(final),
    ]
    return section("In short", Html('<div class="cards">' + "\n".join(cards) + "</div>"), anchor="verdict")


def _varies(final: dict[str, Any]) -> Html:
    spread, wanted = _read(final, "test", "spread", "largest"), _read(final, "test", "spread", "target")
    argmax, of = _read(final, "test", "distinct", "argmax"), _read(final, "test", "distinct", "target_argmax")
    if spread is None or argmax is None or of is None:
        return card("Does the prediction vary?", "unknown", "Not known", ["Nothing was recorded."])
    good, bad = spread >= 0.05 and argmax >= 0.5 * of, spread < 0.01 or argmax <= 1
    status = "bad" if bad else "good" if good else "warn"
    text = f"The widest output varies by {spread:.3f} over samples (targets: {_show(wanted)}); {argmax:.0f} of "
    text += f"the {of:.0f} "
    text += "categories that lead in the targets lead in a prediction; "
    text += f"{_show(_read(final, 'test', 'distinct', 'outputs'), 0)} "
    text += "distinct outputs."
    return card("Does the prediction vary?", status, {"good": "Yes", "warn": "A little", "bad": "No"}[status], [text])


def _sharp(final: dict[str, Any]) -> Html:
    ours, theirs = (_read(final, "test", "entropy", k, "mean") for k in ("prediction", "target"))
    correlation = _read(final, "test", "entropy", "correlation")
    if ours is None or theirs is None or correlation is None:
        return card("As sharp as the truth?", "unknown", "Not known", ["Nothing was recorded."])
    near = abs(ours - theirs) <= 0.15
    status = "good" if near and correlation >= GOOD_CORRELATION else "bad" if ours < 0.3 * theirs else "warn"
    answer = (
        "Yes" if status == "good" else "One-hot" if status == "bad" else "Too flat" if ours > theirs else "Not quite"
    )
    text = (
        f"Mean entropy {ours:.3f} (targets {theirs:.3f}), correlation of the two {correlation:.3f} (0 for a constant)."
    )
    return card("As sharp as the truth?", status, answer, [text])


def _calibrated(final: dict[str, Any]) -> Html:
    value, wise = _read(final, "test", "ece"), _read(final, "test", "ece_classwise")
    if value is None:
        return card("Is it calibrated?", "unknown", "Not known", ["Nothing was recorded."])
    status = "good" if value <= GOOD_ECE else "warn" if value <= 3 * GOOD_ECE else "bad"
    text = [f"Expected calibration error {value:.4f} of the leading category, {_show(wise, 4)} over all categories."]
    temperature = _read(final, "calibrated", "temperature")
    if temperature is not None:
        text.append(f"A calibration temperature of {temperature:.3f}, fitted on validation, gives "
                    f"{_show(_read(final, 'calibrated', 'ece'), 4)}.")  # fmt: skip
    return card("Is it calibrated?", status, {"good": "Yes", "warn": "Nearly", "bad": "No"}[status], text)


# ----------------------------------------------------------------------------------------------------- figures
def figures(run: Run, final: dict[str, Any]) -> Html:
    """Course of the KL against the baselines, then what the last predictions look like."""
    curves = [(split, *series(run.evals, "metrics", "soft_labels", split, "kl")) for split in ("val", "test")]
    levels = [(name.replace("_", " "), _read(final, "test", "baselines", name), SERIES[i + 2])
              for i, name in enumerate(("constant", "oracle_constant", "uniform", "bayes"))]  # fmt: skip
    drawn = [
        line_plot(
            "KL to the targets",
            curves,
            "Dotted: guesses that look at no input (test split), and the best possible model where it is known.",
            "no evaluation was recorded",
            levels,
            log=True,
        )
    ]
    arrays = run.arrays
    if "logits" in arrays and "targets" in arrays:
        p = np.exp(log_softmax(arrays["logits"].astype(np.float64), axis=1))
        t = arrays["targets"].astype(np.float64)
        drawn += [_scatter(t, p), _reliability(t, p), _entropies(t, p), _bars(run, t, p), _group_bars(run, t, p)]
    else:
        drawn.append(plot("Predicted against target", None, "", "report_data.npz holds no predictions"))
    drawn += [_penalties(run), _logits(run), plots.losses(run), plots.gradient(run)]
    return section("Figures", grid(*drawn), anchor="figures")


def _thinned(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, MOST_DOTS)).round().astype(int))


def _scatter(t: np.ndarray, p: np.ndarray) -> Html:
    rows = _thinned(len(t))
    with drawing():
        figure, axes = new_axes(x_label="target", y_label="prediction")
        top = t.argmax(axis=1)
        axes.plot([0, 1], [0, 1], color=SERIES[7], linewidth=1)
        axes.plot(t[rows, top[rows]], p[rows, top[rows]], ".", markersize=3, color=SERIES[0], alpha=0.5)
        high = 1.05 * max(t[rows].max(), p[rows].max())
        axes.set_xlim(0, high)
        axes.set_ylim(0, high)
        caption = (
            "Each dot is a sample: its largest target, and what is predicted for that category. A constant is a few "
        )
        caption += "horizontal lines."
        return plot("Predicted against target", to_svg(figure, "Predicted against target"), caption)


def _reliability(t: np.ndarray, p: np.ndarray) -> Html:
    found = calibration.reliability(p, t, BINS, binning="mass")
    with drawing():
        figure, axes = new_axes(x_label="confidence", y_label="target mass")
        axes.plot([0, 1], [0, 1], color=SERIES[7], linewidth=1, label="perfect")
        axes.plot(found["confidence"], found["accuracy"], "o-", color=SERIES[0], label="this run")
        high = min(1.0, 1.1 * max(*found["confidence"], *found["accuracy"]))
        axes.set_xlim(0, high)
        axes.set_ylim(0, high)
        legend_above(figure, axes)
        caption = (
            f"{BINS} bins of equal numbers of samples; target mass of the leading category against its probability."
        )
        return plot("Reliability", to_svg(figure, "Reliability diagram"), caption)


def _entropies(t: np.ndarray, p: np.ndarray) -> Html:
    edges = np.linspace(0.0, np.log(t.shape[1]) * 1.0001, 41)
    with drawing():
        figure, axes = new_axes(x_label="entropy, nats", y_label="share of samples")
        for name, rows, colour in (("targets", t, SERIES[2]), ("predictions", p, SERIES[0])):
            counts, _ = np.histogram(entropy(rows), edges)
            axes.stairs(counts / len(rows), edges, color=colour, label=name, linewidth=1.8)
        percent_axis(axes)
        legend_above(figure, axes)
        caption = "A peak at 0 is one-hot, a single narrow peak is a constant, one at the right end is uniform."
        return plot("Entropy of predictions and targets", to_svg(figure, "Entropy histograms"), caption)


def _bars(run: Run, t: np.ndarray, p: np.ndarray) -> Html:
    names = [str(c) for c in run.arrays.get("categories", np.arange(t.shape[1]))]
    chosen = np.argsort(-t.mean(axis=0), kind="stable")[:MOST_CATEGORIES]
    with drawing():
        figure, axes = new_axes(x_label="", y_label="mean and spread")
        x = np.arange(len(chosen))
        for shift, name, rows, colour in ((-0.18, "target", t, SERIES[2]), (0.18, "prediction", p, SERIES[0])):
            axes.bar(
                x + shift,
                rows.mean(axis=0)[chosen],
                0.34,
                yerr=rows.std(axis=0)[chosen],
                color=colour,
                label=name,
                error_kw={"linewidth": 1},
            )
        axes.set_xticks(x, [names[i][:12] for i in chosen], rotation=30, ha="right")
        legend_above(figure, axes)
        caption = "Means may agree for a constant: the thin lines (standard deviation over samples) may not."
        return plot("Categories", to_svg(figure, "Mean and spread of every category"), caption)


def _group_bars(run: Run, t: np.ndarray, p: np.ndarray) -> Html:
    group = run.arrays.get("group")
    if group is None or len(np.unique(group)) < 2:
        return plot("Groups", None, "", "the data have one group")
    names, loss = run.arrays["groups"], kl(t, p)
    means = sorted(((float(loss[group == g].mean()), str(names[g])) for g in np.unique(group)), reverse=True)[
        :MOST_GROUPS
    ]
    with drawing():
        figure, axes = new_axes(height=max(2.0, 0.24 * len(means)), x_label="KL", y_label="")
        axes.barh(np.arange(len(means)), [m for m, _ in means], color=SERIES[0])
        axes.set_yticks(np.arange(len(means)), [n[:18] for _, n in means])
        axes.invert_yaxis()
        return plot(
            "KL of every group", to_svg(figure, "KL of every group"), f"The {len(means)} hardest groups, test split."
        )


def _penalties(run: Run) -> Html:
    curves = [("share of samples below min_entropy", *series(run.train, "metrics", "loss/soft_label/active")),
              ("share of clipped steps", *series(run.train, "metrics", "clipped"))]  # fmt: skip
    caption = (
        "When the entropy penalty had something to do (with weight 0 it is only counted), and how often gradients "
    )
    caption += "were clipped."
    return line_plot("Penalties and clipping", curves, caption, "nothing was recorded", share=True)


def _logits(run: Run) -> Html:
    curves = [
        (name, *series(run.train, "metrics", f"loss/soft_label/{key}"))
        for name, key in (("largest", "largest_logit"), ("smallest", "smallest_logit"), ("mean range", "logit_range"))
    ]
    return line_plot("Logits", curves, "Largest, smallest and mean range within a batch.", "nothing was recorded")


# ------------------------------------------------------------------------------------------------------- tables
def group_table(final: dict[str, Any]) -> Html:
    found = dig(final, "test", "groups")
    if not isinstance(found, dict):
        return Html("")
    ordered = sorted(found.items(), key=lambda item: -(as_number(dig(item[1], "kl")) or 0.0))
    rows = [(name, _show(as_number(dig(v, "kl")), 4), _show(as_number(dig(v, "count")), 0)) for name, v in ordered]
    return section(
        "Groups", details(f"{len(rows)} groups, hardest first", table(("", "KL", "samples"), rows)), anchor="groups"
    )


def numbers(run: Run, final: dict[str, Any]) -> Html:
    """Every number beside its chance level or baseline."""
    out = []
    for split in ("val", "test"):
        s, b = final.get(split) or {}, dig(final, split, "baselines") or {}
        chance = dig(b, "chance") or {}
        rows = [
            (
                "KL",
                _show(_read(s, "kl"), 4),
                f"constant {_show(_read(b, 'constant'), 4)}, uniform {_show(_read(b, 'uniform'), 4)}",
            ),
            ("skill", _show(_read(s, "skill")), "constant 0"),
            (
                "soft cross-entropy",
                _show(_read(s, "cross_entropy"), 4),
                f"H(t) {_show(_read(s, 'entropy', 'target', 'mean'), 4)}",
            ),
            (
                "top-1",
                _show(_read(s, "top1")),
                f"majority {_show(_read(b, 'majority'))}, random {_show(_read(chance, 'top1'))}",
            ),
            (
                "true category in top 3",
                _show(_read(s, "true_in_top3")),
                f"constant {_show(_read(b, 'constant_true_in_top3'))}, random {_show(_read(chance, 'true_in_top3'))}",
            ),
            (
                "top-3 sets overlap (never alone)",
                _show(_read(s, "overlap_top3")),
                f"constant {_show(_read(b, 'constant_overlap_top3'))}, random {_show(_read(chance, 'overlap_top3'))}",
            ),
            ("ECE, leading category", _show(_read(s, "ece"), 4), "0 is perfect"),
            ("ECE, class-wise", _show(_read(s, "ece_classwise"), 4), "0 is perfect"),
            ("KL of the mean prediction (never alone)", _show(_read(s, "mean_kl"), 4), "a constant scores 0"),
        ]
        out += [tag("h3", {"val": "Validation", "test": "Test"}[split]), table(("", "this run", "compare"), rows)]
    every = [
        (name, f"{v:.5g}" if (v := as_number(value)) is not None else str(value))
        for name, value in flatten(final).items()
    ]
    return section(
        "All numbers with their baselines",
        *out,
        details("Everything in the last evaluation", table(("", "value"), every)),
        anchor="numbers",
    )
