"""The page of an image-text alignment run: retrieval beside chance, prefixes, both sides, attention, neighbours."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from protojax.reporting import plots, sections
from protojax.reporting.facts import facts_of
from protojax.reporting.page import Html, card, grid, image, plot, section, table, tag, text
from protojax.reporting.plots import line_plot
from protojax.reporting.records import Run, dig, series
from protojax.reporting.svg import ROLES

MOST_NEIGHBOURS, MOST_QUERIES = 5, 8
AT_CHANCE, LEARNED = 2.0, 30.0  # times chance: below is none, above is clear


def parts(run: Run) -> tuple[str, tuple[Html, ...]]:
    """(title, sections in reading order)."""
    facts = facts_of(run)
    return f"{facts.name}: {facts.arm}", (
        sections.heading(run, facts),
        in_short(run),
        sections.found(facts),
        sections.reading_problems(run),
        numbers(run),
        figures(run),
        attention(run),
        neighbours(run),
        sections.configuration(run),
    )


def last(run: Run) -> Mapping[str, Any]:
    """The last evaluation: from the summary, else from the records."""
    found = dig(run.summary, "alignment")
    if isinstance(found, Mapping):
        return found
    return next((f for r in reversed(run.evals) if isinstance(f := dig(r, "metrics", "alignment"), Mapping)), {})


def widths_of(found: Mapping[str, Any]) -> list[str]:
    return sorted(found.get("r1") or {}, key=int, reverse=True)


def in_short(run: Run) -> Html:
    """Three questions: did it learn, do prefixes hold, is a side constant."""
    found = last(run)
    if not widths_of(found):
        nothing = card("Does it retrieve?", "unknown", "no evaluation", ["No evaluation was recorded."])
        return section("In short", Html(f'<div class="cards">{nothing}</div>'), anchor="verdict")
    full, short = widths_of(found)[0], widths_of(found)[-1]
    chance, recall = found["chance"]["1"], found["r1"][full]
    times = recall / chance if chance else 0.0
    status, answer = (
        ("bad", "at chance") if times < AT_CHANCE else ("warn", "a little") if times < LEARNED else ("good", "yes")
    )
    size = found["i2t"][full]["gallery"]
    first = card("Does it retrieve?", status, answer, [
        f"R@1 is {100 * recall:.1f}% (mean of both directions), {times:.0f} times chance ({100 * chance:.2f}% of a "
        f"gallery of {size})."])  # fmt: skip
    kept = (found.get("retention") or {}).get(short)
    answer, status = (
        ("not known", "unknown") if kept is None else (f"{100 * kept:.0f}% kept", "good" if kept >= 0.9 else "warn")
    )
    second = card("Do short prefixes hold?", status, answer, [f"R@1 at width {short} against width {full}."])
    cosines = {side: found[side]["cosine"] for side in ("image", "text")}
    worst = max(cosines, key=lambda side: cosines[side])
    constant = cosines[worst] > 0.999
    third = card("Is a side constant?", "bad" if constant else "good", f"{worst} is" if constant else "no", [
        f"Mean pairwise cosine of the {side}s: {value:.3f}, effective rank {found[side]['rank']:.1f}."
        for side, value in cosines.items()])  # fmt: skip
    return section("In short", Html(f'<div class="cards">{first}{second}{third}</div>'), anchor="verdict")


def numbers(run: Run) -> Html:
    """Every prefix, both directions, with chance."""
    found = last(run)
    rows = []
    for d in widths_of(found):
        i2t, t2i = found["i2t"][d], found["t2i"][d]
        kept = (found.get("retention") or {}).get(d)
        cells = [
            f"{100 * side['recall'][k]:.1f}" for side in (i2t, t2i) for k in ("1", "5", "10") if k in side["recall"]
        ]
        rows.append([d, *cells, f"{i2t['median_rank']:.1f} / {t2i['median_rank']:.1f}",
                     f"{i2t['mrr']:.3f} / {t2i['mrr']:.3f}",
                     "" if kept is None else f"{100 * kept:.1f}"])  # fmt: skip
    if not rows:
        return section("Retrieval", tag("p", "No evaluation was recorded."), anchor="numbers")
    level = [
        f"{100 * side['chance'][k]:.2f}"
        for side in (found["i2t"][rows[0][0]], found["t2i"][rows[0][0]])
        for k in ("1", "5", "10")
        if k in side["chance"]
    ]
    rows.append(["chance", *level, "", "", ""])
    headers = [
        "width",
        "image to text R@1 %",
        "R@5",
        "R@10",
        "text to image R@1 %",
        "R@5",
        "R@10",
        "median rank",
        "MRR",
        "kept %",
    ]
    return section("Retrieval", table(headers, rows, strong=[len(rows) - 1]), *beside(found), anchor="numbers")


def beside(found: Mapping[str, Any]) -> list[Html]:
    """A sentence a score that the data allow beside retrieval, with its chance."""
    out = []
    for key, what in (("zero_shot", "class text"), ("zero_shot_names", "class name")):
        if isinstance(zero := found.get(key), Mapping):
            shares = ", ".join(f"{d}: {100 * v:.1f}%" for d, v in zero["accuracy"].items())
            level = f"{zero['classes']} classes (chance {100 * zero['chance']:.1f}%)"
            out.append(f"Zero-shot by {what}, {level}: {shares}.")
    if isinstance(own := found.get("matching"), Mapping):
        cells = ", ".join(f"{d}: {100 * own['accuracy'][d]:.1f}%, AUC {own['auc'][d]:.3f}" for d in own["accuracy"])
        out.append(
            f"Is the sentence true of the image? {own['pairs']} pairs, threshold from other pairs (always the more "
            f"frequent answer: {100 * own['majority']:.1f}%; AUC of chance 0.500, standard error "
            f"{own['auc_error']:.3f}): {cells}."
        )
    if isinstance(known := found.get("factors"), Mapping):
        out.append(
            f"Known content: linear regression from image embeddings gives the {known['factors']} factors with R^2 = "
            f"{known['r2']:.3f} (the worst {known['r2_least']:.3f}; nothing known: 0)."
        )
    return [tag("p", sentence) for sentence in out]


def figures(run: Run) -> Html:
    found = last(run)
    names = widths_of(found)
    muted = ROLES["muted"]
    recall = [(f"R@1, width {d}", *series(run.evals, "metrics", "alignment", "r1", d)) for d in names]
    level = (found.get("chance") or {}).get("1")
    losses = [
        (name, *series(run.train, "metrics", f"loss/{name}")) for name in ("contrastive_full", "prefix_objective")
    ]
    losses.append(("held out", *series(run.evals, "metrics", "alignment", "loss", "contrastive_full")))
    chance = dig(found, "loss", "chance")
    sides = [(side, *series(run.evals, "metrics", "alignment", side, "rank")) for side in ("image", "text")]
    kept = [
        (f"R@{k}", np.log2([float(d) for d in names]), np.asarray([found[key].get(d) for d in names], float))
        for k, key in ((1, "retention"), (10, "retention_r10"))
        if names and isinstance(found.get(key), Mapping)
    ]
    drawn = [
        line_plot("Kept by prefix", kept, "Share of the full width's, over log2 of the prefix width.",
                  "no evaluation was recorded.", share=True, x_label="log2 width"),
        line_plot("Retrieval", recall, "Mean of both directions. Dotted: chance.", "no evaluation was recorded.",
                  [("chance", level, muted)], share=True),
        line_plot("Losses", losses, "Dotted: the loss of embeddings that do not depend on their input.",
                  "no training record with a loss.", [("chance", chance, muted)]),
        line_plot("Effective rank of both sides", sides, "A constant tower has rank 1.", "no evaluation was recorded."),
        plots.gradient(run),
        plots.throughput(run),
    ]  # fmt: skip
    return section("Curves", grid(*drawn), anchor="plots")


def attention(run: Run) -> Html:
    """Maps of the last layer's latents over the tokens of test images."""
    title = "What the latents look at"
    maps = run.arrays.get("attention_map")
    if maps is None or maps.ndim != 3:
        return section(
            title,
            plot(title, None, "", "the run has no resampler, or its maps are too large to keep."),
            anchor="attention",
        )
    blocks = []
    for row in range(min(len(maps), 4)):
        shade = maps[row] / max(float(maps[row].max()), 1e-12)
        pixels = (255 * (1.0 - np.kron(shade, np.ones((8, 8))))).astype(np.uint8)
        picture = image(_png(np.repeat(pixels[..., None], 3, axis=2)), "image/png", f"attention of test image {row}")
        blocks.append(Html(f"<figure><h3>{text(f'Test image {row}')}</h3>{picture}</figure>"))
    note = "Rows: latents; columns: tokens; dark: looked at. Equal rows do the same work."
    return section(
        title, tag("p", note, "note"), Html(f'<div class="samples">{"".join(blocks)}</div>'), anchor="attention"
    )


def neighbours(run: Run) -> Html:
    """For some test captions, the images that are nearest; for pictures only."""
    title = "Nearest images to test captions"
    pictures, captions = run.arrays.get("images"), run.arrays.get("captions")
    images, texts = run.arrays.get("image_embedding"), run.arrays.get("text_embedding")
    if pictures is None or captions is None or images is None or texts is None:
        return section(
            title, plot(title, None, "", "the run was trained on tokens, not on pictures."), anchor="neighbours"
        )
    blocks = []
    for row in np.linspace(0, len(texts) - 1, min(MOST_QUERIES, len(texts))).astype(int):
        order = np.argsort(-(images @ texts[row]), kind="stable")[:MOST_NEIGHBOURS]
        strip = "".join(image(_png(pictures[i]), "image/png", str(captions[i])) for i in order)
        hit = "found" if captions[row] in captions[order] else "not among them"
        blocks.append(Html(f'<figure><h3>{text(str(captions[row]))} ({hit})</h3><div class="strip" '
                           f'style="--columns: {MOST_NEIGHBOURS}">{strip}</div></figure>'))  # fmt: skip
    note = f"Nearest first, among {len(images)} test images."
    return section(
        title, tag("p", note, "note"), Html(f'<div class="samples">{"".join(blocks)}</div>'), anchor="neighbours"
    )


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
