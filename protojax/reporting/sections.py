"""The sections of one run's page, in reading order."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from protojax.reporting import plots, usage_plots
from protojax.reporting.facts import EPSILONS, Audit, Facts
from protojax.reporting.page import Html, card, code, details, grid, image, join, plot, section, table, tag, text
from protojax.reporting.records import Run, as_number, dig, flatten
from protojax.reporting.verdict import collapsed, encoder, findings, learned, next_steps, percent, suffering, whole

ABSENT = "–"
MOST_SAMPLES = 16
MOST_IMAGES = 12


def heading(run: Run, facts: Facts) -> Html:
    parts = [f"{facts.arm} arm" if facts.arm else None]
    parts.append(None if facts.seed is None else f"seed {facts.seed}")
    parts.append(None if facts.steps is None else f"{facts.steps:,} steps")
    parts.append(f"{facts.count:,} prototypes in {facts.dim} dimensions" if facts.count and facts.dim else None)
    device = dig(run.summary, "device")
    parts.append(str(device) if isinstance(device, str) else None)
    said = [tag("h1", facts.name), tag("p", " · ".join(p for p in parts if p), "sub")]
    if not facts.finished:
        said.append(tag("p", f"This run is not finished. Final numbers are from {facts.origin}.", "note"))
    return tag("header", join(said))


def verdict(run: Run, facts: Facts) -> Html:
    answers = (learned(run, facts), collapsed(facts), encoder(facts), suffering(facts))
    cards = "\n".join(card(a.question, a.status, a.answer, a.sentences) for a in answers)
    return section("In short", Html(f'<div class="cards">{cards}</div>'), anchor="verdict")


def found(facts: Facts) -> Html:
    entries = findings(facts)
    if not entries:
        said = "No detector fired in this run. The answers above have thresholds of their own and stand without one."
        return section("Findings", tag("p", said), anchor="findings")
    blocks = []
    for finding in entries:
        when = "" if finding.first is None else f", step {finding.first:,}"
        if finding.times > 1 and finding.first != finding.last:
            when += f" to {finding.last:,} ({finding.times} times)"
        title = join((tag("span", finding.severity, "severity"), f": {finding.detector}{when}"), "")
        body = [tag("h3", title)]
        for name, field in (("Seen", "evidence"), ("Usual cause", "cause"), ("Try", "advice")):
            if finding.record.get(field):
                body.append(tag("p", join((tag("strong", f"{name}: "), _plain(finding.record[field])), "")))
        blocks.append(tag("div", join(body), f"finding {finding.severity}"))
    return section("Findings", *blocks, anchor="findings")


def what_next(run: Run, facts: Facts) -> Html:
    items = [
        tag("li", join((advice, code(command)) if command else (advice,), ""))
        for advice, command in next_steps(run, facts)
    ]
    if not items:
        items = [tag("li", "Nothing pressing: no detector fired and the prototypes held.")]
    note = tag("p", "Commands start from the config of the arm: add the --config.KEY=VALUE this run was given.", "note")
    return section("What next", tag("ol", join(items)), note, anchor="next")


def reading_problems(run: Run) -> Html:
    if not run.problems:
        return Html("")
    items = join(tag("li", problem) for problem in run.problems)
    return section("What this page could not use", tag("ul", items), anchor="problems")


def figures(run: Run, facts: Facts) -> Html:
    drawn = [
        plots.knn(run, facts),
        plots.losses(run),
        plots.live(run, facts),
        plots.unique(run, facts),
        plots.usage(run),
        usage_plots.usage_over_time(run),
        plots.groups(facts),
        usage_plots.tail(run),
        plots.similarity(run),
        plots.projection(run),
        plots.perplexity(run, facts),
        plots.rank(run, facts),
        plots.gradient(run),
        plots.throughput(run),
    ]
    return section("Curves and pictures", grid(*[figure for figure in drawn if figure is not None]), anchor="plots")


# ------------------------------------------------------------------------------------------ sample images
def samples(run: Run) -> Html:
    title = "Images nearest to sample prototypes"
    pictures, names = run.arrays.get("sample_images"), run.arrays.get("sample_prototypes")
    if pictures is None or pictures.dtype != np.uint8 or pictures.shape[-1] != 3:
        reason = "report_data.npz holds no sample images."
        if pictures is not None:
            reason = f"sample_images is {pictures.dtype} {pictures.shape}, expected uint8 [p, m, h, w, 3]."
        return section(title, plot(title, None, "", reason), anchor="samples")
    chosen = np.unique(np.linspace(0, len(pictures) - 1, min(len(pictures), MOST_SAMPLES)).astype(np.int64))
    usage = run.arrays.get("usage")
    classes, purity = run.arrays.get("sample_names"), run.arrays.get("sample_purity")
    blocks = []
    for row in chosen:
        prototype = int(names[row]) if names is not None else int(row)
        caption = f"Prototype {prototype}"
        if usage is not None and 0 <= prototype < len(usage) and usage.sum() > 0:
            caption += f" · {percent(float(usage[prototype] / usage.sum()), 2)} of images"
        if classes is not None and purity is not None and str(classes[row]):
            caption += f", {percent(float(purity[row]), 0)} of them {classes[row]}"
        strip = "".join(
            image(jpeg(pixels), "image/jpeg", f"near prototype {prototype}") for pixels in pictures[row][:MOST_IMAGES]
        )
        columns = pictures.shape[1] if pictures.shape[1] <= 6 else -(-min(pictures.shape[1], MOST_IMAGES) // 2)
        grid_of = f'<div class="strip" style="--columns: {columns}">{strip}</div>'
        blocks.append(Html(f"<figure><h3>{text(caption)}</h3>{grid_of}</figure>"))
    note = "Training images whose features are nearest to a prototype, nearest first. A row of one kind of thing is a "
    note += "prototype with a meaning; the same row twice is a duplicate."
    return section(
        title, tag("p", note, "note"), Html(f'<div class="samples">{"".join(blocks)}</div>'), anchor="samples"
    )


def jpeg(pixels: np.ndarray) -> bytes:
    """uint8 [h,w,3] as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=88, subsampling=0)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ tables
def numbers(run: Run, facts: Facts) -> Html:
    headers = ("", "final", "start", "random")
    note = f"Final numbers are from {facts.origin}. Counts are prototypes"
    note += f" out of {facts.count:,}; " if facts.count else "; "
    note += (
        "start: right after initialisation, the untrained encoder; random: a codebook of random directions of equal "
    )
    note += "number and width."
    accuracy = [
        (f"k-NN, {label}, k = {facts.k}", percent(value), _share(facts.untrained_knn.get(label)), ABSENT)
        for label, value in facts.knn.items()
    ]
    for label, values in facts.groups.items():
        before = facts.untrained_groups.get(label, {})
        accuracy += [(f"{label}: {g}", _share(v), _share(before.get(g)), ABSENT) for g, v in values.items()]
    rows = [*accuracy, *_audit_rows(facts.final, facts.initial, facts.random)]
    rows.append(("effective rank", _decimal(facts.effective_rank, 1), _decimal(facts.untrained_rank, 1), ABSENT))
    rows.append(("images per second, median", _decimal(facts.images_per_second, 1), ABSENT, ABSENT))
    parts = [tag("p", note, "note"), table(headers, rows)]
    return section("All numbers with their controls", *parts, _centred(run), _last_record(run), anchor="numbers")


def _audit_rows(final: Audit, initial: Audit, control: Audit) -> list[tuple[str, str, str, str]]:
    audits = (final, initial, control)
    rows = [(f"unique at {e:g}", *(_whole(a.unique.get(e)) for a in audits)) for e in EPSILONS]
    rows.append(("live", *(_whole(a.live) for a in audits)))
    rows += [(f"live-unique at {e:g}", *(_whole(a.live_unique.get(e)) for a in audits)) for e in EPSILONS]
    rows.append(("usage perplexity", *(_decimal(a.perplexity, 1) for a in audits)))
    rows.append(("coverage (mean largest cosine)", *(_decimal(a.coverage, 3) for a in audits)))
    return rows  # type: ignore[return-value]


def _centred(run: Run) -> Html:
    """The audit again after subtracting the mean feature, from the last record that has one."""
    source = dig(run.summary, "prototypes", "centred")
    source = source or next((c for r in reversed(run.evals) if (c := dig(r, "metrics", "prototypes", "centred"))), None)
    if not isinstance(source, Mapping):
        return details("After subtracting the mean feature", tag("p", "The centred audit was not recorded."))
    rows = [(name.replace("/", ", "), _cell(value)) for name, value in flatten(source).items()]
    why = "Features often share one large direction, which makes everything look alike; here it is removed."
    return details("After subtracting the mean feature", tag("p", why, "note"), table(("", "final"), rows))


def _last_record(run: Run) -> Html:
    if not run.evals:
        return Html("")
    flat = flatten(run.evals[-1].get("metrics", {}))
    rows = [(name, _cell(value)) for name, value in flat.items() if not name.startswith("prototypes/usage/")]
    return details(f"Everything in the last evaluation (step {run.evals[-1]['step']})", table(("", "value"), rows))


def configuration(run: Run) -> Html:
    parts = []
    if run.config is None:
        parts.append(tag("p", "config.json is absent or damaged."))
    else:
        parts.append(details("Resolved config", code(json.dumps(run.config, indent=2, ensure_ascii=False), "listing")))
    versions = flatten(run.versions)
    device = dig(run.summary, "device")
    listed = [("device", _plain(device))] if device else []
    listed += [(name, _plain(value)) for name, value in versions.items()]
    if listed:
        parts.append(Html(f'<div class="plain">{table(("", "version"), listed)}</div>'))
    else:
        parts.append(tag("p", "Versions were not recorded."))
    if run.events:
        rows = [(_plain(r.get("event", "")), _plain(r.get("step", "")), _plain(r.get("text", ""))) for r in run.events]
        parts.append(Html(f'<div class="plain">{table(("event", "step", "text"), rows)}</div>'))
    return section("Config and versions", *parts, anchor="config")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cell(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return "none" if value is None else _plain(value)
    return f"{number:,.0f}" if number == int(number) else f"{number:.4g}"


def _share(value: float | None) -> str:
    return ABSENT if value is None else percent(value)


def _whole(value: float | None) -> str:
    return ABSENT if value is None else whole(value)


def _decimal(value: float | None, digits: int) -> str:
    return ABSENT if value is None else f"{value:,.{digits}f}"
