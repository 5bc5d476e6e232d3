"""What goes wrong with mixtures of prompts: the rows of `detectors.TABLE` for them.

All read the evaluation 'prompts' and nothing else, so that they are silent in other workloads. None speaks of the
evaluation at step 0: it shows the initialisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from protojax.evals.detector_types import Detector, Threshold
from protojax.evals.history import History

Thresholds = Mapping[str, float]
Seen = dict[str, Any] | None
_E = "prompts/e_step/"


def _trained(history: History) -> bool:
    """Whether the last evaluation was of a trained state, of more than one sub-prompt a class."""
    points = history.finite(_E + "usage_perplexity")
    return bool(points) and points[-1].step > 0 and (history.last("prompts/count") or 0) >= 2


def winner_take_all(history: History, t: Thresholds) -> Seen:
    """Usage perplexity below max(1.5, 0.35 K) in most classes, or a mean largest share above `largest`."""
    if not _trained(history):
        return None
    collapsed, largest = history.last(_E + "collapsed") or 0.0, history.last(_E + "max_usage") or 0.0
    if collapsed <= t["classes"] and largest <= t["largest"]:
        return None
    return {
        "used": history.last(_E + "usage_perplexity"), "count": history.last("prompts/count"),
        "largest": largest, "collapsed": collapsed,
    }  # fmt: skip


def identical_prompts(history: History, t: Thresholds) -> Seen:
    """Effective prompts below `effective` while soft usage is above `usage` K: all are used because all are one."""
    if not _trained(history):
        return None
    count, used = history.last("prompts/count") or 0.0, history.last(_E + "usage_perplexity") or 0.0
    effective = history.last(_E + "effective") or 0.0
    if effective >= t["effective"] or used <= t["usage"] * count:
        return None
    return {"effective": effective, "used": used, "count": count}


def nothing_learned(history: History, t: Thresholds) -> Seen:
    """Prompt cosine within `cosine` of its value at initialisation, top-1 within `purity` of its first value, and mode
    purity within `purity` of that of random offsets or of the run's own first value (without known modes: usage within
    a share `purity` of its first value), once `fraction` of the run has passed. Pixels may have no modes to find:
    whoever classifies better has learned."""
    done = history.last("fraction")
    if not _trained(history) or (done is not None and done < t["fraction"]):
        return None
    now, start = history.last("prompts/geometry/cos_mean"), history.last("prompts/geometry/initial_cosine")
    if now is None or start is None or abs(now - start) > t["cosine"]:
        return None
    if _moved(history, "prompts/accuracy/top1") > t["purity"]:
        return None
    purity, chance = history.last(_E + "purity"), history.last("prompts/random_purity")
    if purity is not None and chance is not None:
        unchanged = min(abs(purity - chance), _moved(history, _E + "purity")) <= t["purity"]
    else:
        used = history.finite(_E + "usage_perplexity")
        unchanged = _moved(history, _E + "usage_perplexity") <= t["purity"] * used[0].value
    return {"cosine": now, "start": start} if unchanged else None


def _moved(history: History, name: str) -> float:
    """|last - first| of a number."""
    points = history.finite(name)
    return abs(points[-1].value - points[0].value) if points else 0.0


def diverse_unused(history: History, t: Thresholds) -> Seen:
    """Prompt cosine below `cosine` under winner-takes-all."""
    cosine = history.last("prompts/geometry/cos_mean")
    if cosine is None or cosine >= t["cosine"]:
        return None
    seen = winner_take_all(history, t)
    return None if seen is None else {**seen, "cosine": cosine}


def train_infer_gap(history: History, t: Thresholds) -> Seen:
    """Usage by nearest sub-prompt below `share` of the usage in the E-step."""
    if not _trained(history):
        return None
    inference = history.last("prompts/inference/usage_perplexity_hard")
    step = history.last(_E + "usage_perplexity_hard")
    if inference is None or not step or inference >= t["share"] * step:
        return None
    return {"inference": inference, "step": step}


def near_empty_class(history: History, t: Thresholds) -> Seen:
    """Classes with fewer training images than sub-prompts."""
    empty = history.last("prompts/near_empty_classes") or 0.0
    return {"empty": empty, "count": history.last("prompts/count")} if empty > t["classes"] else None


_CLASSES = {
    "classes": Threshold(0.5, "most classes"),
    "largest": Threshold(0.95, "the other K - 1 sub-prompts share a twentieth"),
}
TABLE: tuple[Detector, ...] = (
    Detector(
        "winner_take_all", "error", _CLASSES, (_E,), winner_take_all,
        "On average {used:.1f} of {count:.0f} sub-prompts are used (mean largest share {largest:.2f}; {collapsed:.0%} "
        "of the classes below max(1.5, 0.35 K)).",
        "Image features share a direction that the text features lie off; the sub-prompt that turned there first is "
        "nearest to every image, and only winners get a gradient.",
        "Enable config.method.prompts.e_step_centre = 'class', balance = 'price' and offset_init = 'plus_plus'.",
    ),
    Detector(
        "identical_prompts", "error",
        {
            "effective": Threshold(1.2, "the assignment tells a fifth of a nat about the image at most"),
            "usage": Threshold(0.9, "nearly even use, which identical prompts have exactly"),
        },
        (_E,), identical_prompts,
        "{used:.1f} of {count:.0f} sub-prompts are used, but they amount to {effective:.2f}.",
        "The prompts of a class do not differ: zero initialisation, or an entropy term that is too strong.",
        "Use config.method.prompts.offset_init = 'plus_plus' and lower entropy_weight.",
    ),
    Detector(
        "diverse_unused", "warning",
        {**_CLASSES, "cosine": Threshold(0.3, "prompts of a class start at 0.95: something drove them apart")},
        (_E, "prompts/geometry/"), diverse_unused,
        "Prompts of a class are far apart (cosine {cosine:.2f}), yet {used:.1f} of {count:.0f} are used.",
        "A diversity loss moved vectors that own no images.",
        "Set config.method.prompts.diversity_weight = 0 and cure the assignment instead (e_step_centre, balance).",
    ),
    Detector(
        "nothing_learned", "warning",
        {
            "cosine": Threshold(0.02, "re-drawing the initialisation changes less"),
            "purity": Threshold(0.02, "the spread of purity over random offsets"),
            "fraction": Threshold(0.5, "a start that finds the modes keeps its purity: offsets need time to move"),
        },
        (_E, "prompts/geometry/"), nothing_learned,
        "The mean cosine of prompts is {cosine:.3f}; right after initialisation it is {start:.3f}, and the assignment "
        "is that of random offsets.",
        "This is the initial value: no prompt has moved to a mode.",
        "Raise config.method.optim.peak_lr or the number of epochs, and look at grad_norm.",
    ),
    Detector(
        "train_infer_gap", "warning",
        {"share": Threshold(0.6, "two prompts of five that training uses are never chosen afterwards")},
        ("prompts/inference/", _E), train_infer_gap,
        "Inference uses {inference:.1f} sub-prompts a class, the E-step {step:.1f}.",
        "Prices, or an exact balance, keep sub-prompts busy in training that are nobody's nearest.",
        "Lower config.method.prompts.price (or use balance = 'price'), or set e_step_centre = 'class'.",
    ),
    Detector(
        "near_empty_class", "notice",
        {"classes": Threshold(0.0, "one is enough to be told")},
        ("prompts/near_empty_classes",), near_empty_class,
        "{empty:.0f} classes have fewer training images than the {count:.0f} sub-prompts.",
        "Sub-prompts beyond the number of images start from noise and own nothing.",
        "Lower config.method.prompts.num_prompts, or read their usage with care.",
    ),
)  # fmt: skip
