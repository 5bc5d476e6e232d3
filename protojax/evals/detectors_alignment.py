"""What goes wrong with image-text alignment. Types in `detector_types`; joined with the other tables in `detectors`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from protojax.evals.detector_types import Detector, Threshold
from protojax.evals.history import History

Seen = dict[str, Any] | None
Thresholds = Mapping[str, float]
LAST = 0.999  # share of the run


def _widths(history: History) -> list[int]:
    """Prefix widths that the training loss is logged for, ascending."""
    names = [n.removeprefix("loss/prefix_") for n in history.names("loss/prefix_")]
    return sorted(int(n) for n in names if n.isdigit())


def chance_loss(history: History, t: Thresholds) -> Seen:
    """|contrastive loss - chance| below `band`, averaged over the records of the last `steps` steps, after warm-up (an
    error) or before it (a notice)."""
    gap = history.finite("loss/above_chance")
    if not gap or gap[-1].step - gap[0].step < t["steps"]:
        return None
    tail = [p for p in gap if p.step > gap[-1].step - t["steps"]]
    value = sum(p.value for p in tail) / len(tail)
    if abs(value) >= t["band"]:
        return None
    seen = {"loss": history.last("loss/contrastive_full"), "chance": history.last("loss/chance"), "steps": t["steps"]}
    early = tail[0].step <= history.warmup_steps
    return seen | ({"severity": "notice"} if early else {})


def constant_side(history: History, t: Thresholds) -> Seen:
    """Mean pairwise cosine above `cosine` or effective rank below `rank`, of text first. At step 0 a cosine or rank may
    be the initialisation's: then only identical rows (cosine above `identical`) count."""
    for side in ("text", "image"):
        cosine, rank = history.last(f"alignment/{side}/cosine"), history.last(f"alignment/{side}/rank")
        if cosine is None or rank is None:
            continue
        trained = len(history.finite(f"alignment/{side}/cosine")) > 1
        if (trained and (cosine > t["cosine"] or rank < t["rank"])) or cosine > t["identical"]:
            return {"side": side, "cosine": cosine, "rank": rank}
    return None


def chance_retrieval(history: History, t: Thresholds) -> Seen:
    """|R@k - chance| below the larger of `images` / G and `deviations` standard deviations of a mean over Q queries,
    sqrt(chance (1 - chance) / Q), for every k in both directions, after initialisation and warm-up."""
    seen = []
    widths = _eval_widths(history)
    if not widths:
        return None
    full = widths[-1]
    for side in ("i2t", "t2i"):
        gallery = history.last(f"alignment/{side}/{full}/gallery")
        queries = history.last(f"alignment/{side}/{full}/queries") or gallery
        for name in history.names(f"alignment/{side}/{full}/recall/"):
            points, chance = history.finite(name), history.last(name.replace("/recall/", "/chance/"))
            if len(points) < 2 or points[-1].step <= history.warmup_steps or chance is None or not gallery:
                return None
            assert queries is not None
            error = math.sqrt(max(chance * (1.0 - chance), 0.0) / queries)
            if abs(points[-1].value - chance) >= max(t["images"] / gallery, t["deviations"] * error):
                return None
            seen.append((points[-1].value, chance, gallery))
    if not seen:
        return None
    return {"recall": seen[0][0], "chance": seen[0][1], "gallery": seen[0][2]}


def _eval_widths(history: History) -> list[int]:
    names = [n.split("/")[-1] for n in history.names("alignment/r1/")]
    return sorted(int(n) for n in names if n.isdigit())


def equal_parts(history: History, t: Thresholds) -> Seen:
    """The contrastive loss and every prefix loss within `band` of each other for `steps` steps."""
    widths = _widths(history)
    if len(widths) < 2:
        return None
    series = [history.finite(f"loss/prefix_{d}") for d in widths]
    last = series[0][-1].step if series[0] else 0
    if not series[0] or last - series[0][0].step < t["steps"]:
        return None
    tails = [[p.value for p in points if p.step > last - t["steps"]] for points in series]
    gaps = [max(values) - min(values) for values in zip(*tails, strict=False)]
    return {"gap": max(gaps), "steps": t["steps"]} if gaps and max(gaps) < t["band"] else None


def flat_attention(history: History, t: Thresholds) -> Seen:
    """Attention entropy above `ratio` of ln(tokens) once `share` of the run has passed."""
    ratio, fraction = history.last("alignment/attention_entropy"), history.last("fraction")
    if ratio is None or fraction is None or fraction < t["share"] or ratio <= t["ratio"]:
        return None
    return {"ratio": ratio}


def prefix_order(history: History, t: Thresholds) -> Seen:
    """R@1 of a longer prefix more than `points` below a shorter one's, at the end of training."""
    fraction = history.last("fraction")
    if fraction is None or fraction < LAST:
        return None
    found = [(d, history.last(f"alignment/r1/{d}")) for d in _eval_widths(history)]
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :] if a[1] is not None and b[1] is not None]
    for (short, low), (long, high) in pairs:
        if high < low - t["points"]:  # type: ignore[operator]
            return {"long": long, "short": short, "long_r1": high, "short_r1": low}
    return None


def milestone(history: History, t: Thresholds) -> Seen:
    """Missed: the held-out loss falls by epoch `falling`; R@1 at least `early` x chance by epoch `by_early` and `late`
    x chance by epoch `by_late` (each judged once, at the first evaluation past it)."""
    epochs = {p.step: p.value for p in history.finite("alignment/epoch")}
    losses = [p for p in history.finite("alignment/loss/above_chance") if p.step in epochs]
    widths = _eval_widths(history)
    chance = history.last("alignment/chance/1")
    if not losses or not widths or not chance:
        return None
    past = [p for p in losses if epochs[p.step] >= t["falling"]]
    if past and past[0].value >= losses[0].value:
        return {"what": f"the held-out loss had not fallen by epoch {epochs[past[0].step]:.1f}"}
    recall = [p for p in history.finite(f"alignment/r1/{widths[-1]}") if p.step in epochs]
    for factor, epoch in ((t["early"], t["by_early"]), (t["late"], t["by_late"])):
        past = [p for p in recall if epochs[p.step] >= epoch]
        wanted = min(factor * chance, 0.5)
        if past and past[0].value < wanted:
            at = epochs[past[0].step]
            return {"what": f"R@1 is {past[0].value:.4f} at epoch {at:.1f}; {wanted:.4f} was expected"}
    return None


def start_loss(history: History, t: Thresholds) -> Seen:
    """First-step loss outside [chance - low, chance + high]; where short embeddings at a low temperature T make the
    expected excess of random ones, 1 / (2 D T^2), larger, twice that is allowed."""
    gap, widths, temperature = history.finite("loss/above_chance"), _widths(history), history.last("loss/temperature")
    expected = 1.0 / (2.0 * widths[-1] * temperature**2) if widths and temperature else 0.0
    if not gap or gap[0].step > 1 or -t["low"] <= gap[0].value <= max(t["high"], 2.0 * expected):
        return None
    return {"gap": gap[0].value, "chance": history.last("loss/chance")}


def dead_parameter(history: History, t: Thresholds) -> Seen:
    """A part whose gradient is exactly 0 on the first step and still is: it is declared and not used."""
    if not history.names("loss/above_chance"):
        return None
    for name in history.names("gradient/"):
        points = history.finite(name)
        if points and points[0].step <= t["step"] and points[0].value == 0.0 and points[-1].value == 0.0:
            return {"part": name.removeprefix("gradient/")}
    return None


_BAND = Threshold(1e-3, "a loss this close to ln B carries no information about pairs")
_STEPS = Threshold(100, "long enough to average over batches")

TABLE: tuple[Detector, ...] = (
    Detector(
        "constant_side", "error",
        {
            "cosine": Threshold(0.999, "a mean angle below 2.6 degrees between any two inputs"),
            "rank": Threshold(1.5, "one direction has rank 1, two even ones have rank 2"),
            "identical": Threshold(1.0 - 1e-5, "before training only identical rows are a fault"),
        },
        ("alignment/text/", "alignment/image/"), constant_side,
        "The {side} embeddings are identical: mean pairwise cosine {cosine:.4f}, effective rank {rank:.2f}.",
        "One tower says the same of every input, so that no pairing can be learned. For text: text_pool='bos' on a "
        "causal tower sees only the start token, or all captions are equal.",
        "Use config.method.alignment.text_pool = 'eos' or 'mean'; look at the captions and at the image tokens.",
    ),
    Detector(
        "chance_loss", "error", {"band": _BAND, "steps": _STEPS}, ("loss/above_chance",), chance_loss,
        "The contrastive loss is {loss:.4f}, chance is {chance:.4f} (ln B without duplicates): no information "
        "passes, for {steps:.0f} steps.",
        "One side is constant, or images and captions are not paired.",
        "See constant_side first; then check that captions belong to their images, and config.method.optim.peak_lr.",
    ),
    Detector(
        "chance_retrieval", "error",
        {
            "images": Threshold(2.0, "two images of the gallery"),
            "deviations": Threshold(3.0, "sampling error of R@k: pairs that match by chance alone scatter that far"),
        },
        ("alignment/i2t/", "alignment/t2i/"), chance_retrieval,
        "Retrieval is at chance in both directions: R@1 {recall:.5f}, chance {chance:.5f} of {gallery:.0f}.",
        "All rows rank alike (a constant side), or the pairs carry no common content.",
        "See constant_side and chance_loss; check that pairs are in step.",
    ),
    Detector(
        "equal_parts", "warning",
        {"band": Threshold(1e-4, "different widths never agree so well once anything is learned"), "steps": _STEPS},
        ("loss/prefix_",), equal_parts,
        "All prefix losses agree to {gap:.1e} for {steps:.0f} steps.",
        "Nothing is learned, or prefixes are not sliced.",
        "See chance_loss; check config.method.alignment.prefix_dims.",
    ),
    Detector(
        "flat_attention", "warning",
        {
            "ratio": Threshold(0.99, "within one per cent of uniform: no token is preferred"),
            "share": Threshold(1 / 3, "attention starts flat and needs time to choose"),
        },
        ("alignment/attention_entropy",), flat_attention,
        "Attention over tokens has {ratio:.4f} of the entropy of uniform weights.",
        "The pool or the latents average all tokens: token choice is unused.",
        "Raise config.method.optim.peak_lr, train longer, or use image_path='token_mean', which is cheaper.",
    ),
    Detector(
        "prefix_order", "warning",
        {"points": Threshold(0.02, "two points: above what a gallery of a thousand scatters")},
        ("alignment/r1/",), prefix_order,
        "R@1 at width {long} is {long_r1:.3f}, below {short_r1:.3f} at width {short}.",
        "The longer prefix carries noise, or its loss has too little weight.",
        "Raise config.method.alignment.contrastive_weight or the longest width's prefix_weights.",
    ),
    Detector(
        "milestone", "warning",
        {
            "falling": Threshold(2, "epochs by which the loss must have fallen"),
            "early": Threshold(30, "x chance: 1% of the published gallery of 2,984"),
            "by_early": Threshold(3, "epochs"),
            "late": Threshold(150, "x chance: 5% of that gallery (at most 50%)"),
            "by_late": Threshold(5, "epochs"),
        },
        ("alignment/r1/", "alignment/loss/"), milestone,
        "Milestone missed: {what}.",
        "Learning is slower than on comparable data: little data, a weak tower, or a low learning rate.",
        "Compare with the quickstart; raise config.method.optim.peak_lr or give more pairs.",
    ),
    Detector(
        "dead_parameter", "error",
        {"step": Threshold(1, "the first step: nothing can have died yet, it was never alive")},
        ("gradient/",), dead_parameter,
        "The gradient of {part} is exactly 0 since the first step.",
        "A parameter is declared and does not reach the loss, or all inputs that it tells apart are equal.",
        "Remove it, or look at the inputs (equal image tokens?). Necessary, not sufficient: with a constant text every "
        "gradient of the image side is non-zero.",
    ),
    Detector(
        "start_loss", "warning",
        {
            "low": Threshold(0.1, "below chance before any step: inputs leak the pairing"),
            "high": Threshold(1.0, "random embeddings start at chance + 1 / (2 D T^2)"),
        },
        ("loss/above_chance",), start_loss,
        "The first loss is {gap:+.3f} from chance ({chance:.3f}).",
        "Embeddings do not start at random unit vectors: temperature too low for the width, or features far from unit "
        "scale.",
        "Expected: chance + 1 / (2 D T^2); raise config.method.alignment.temperature.",
    ),
)  # fmt: skip
