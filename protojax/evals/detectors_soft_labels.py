"""What goes wrong with classifiers of label distributions: the rows of `detectors.TABLE` for soft labels.

They read the validation split (`soft_labels/val/...`), what is known before training (`soft_labels/build/...`), the
inputs (`soft_labels/inputs/...`) and the step's own numbers (`loss/soft_label/...`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from protojax.evals.detector_types import Detector, Threshold
from protojax.evals.history import History

Thresholds = Mapping[str, float]
Seen = dict[str, Any] | None
VAL, BUILD, INPUTS, LOSS = "soft_labels/val/", "soft_labels/build/", "soft_labels/inputs/", "loss/soft_label/"


def _largest_columns(history: History) -> tuple[str, float]:
    """('income (std 4.9e+03), ...', the largest std) of the three widest inputs as the network sees them."""
    prefix = INPUTS + "std/"
    found = {name.removeprefix(prefix): history.last(name) or 0.0 for name in history.names(prefix)}
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{n} (std {v:.2g})" for n, v in ordered) or "none", ordered[0][1] if ordered else 0.0


def one_hot(history: History, t: Thresholds) -> Seen:
    """Mean H(p) below `share` of mean H(t), or more than `rows` of the rows with max p > 0.999 beyond the targets'
    own."""
    predicted, target = history.last(VAL + "entropy/prediction/mean"), history.last(VAL + "entropy/target/mean")
    rows, own = history.last(VAL + "one_hot_share"), history.last(VAL + "target_one_hot_share")
    if predicted is None or target is None or rows is None or own is None:
        return None
    if predicted >= t["share"] * target and rows <= own + t["rows"]:
        return None
    columns, largest = _largest_columns(history)
    return {"predicted": predicted, "target": target, "rows": rows, "columns": columns, "largest": largest}


def exploding_logits(history: History, t: Thresholds) -> Seen:
    """Largest |logit| above `largest`, or the first recorded loss above `times` the KL of uniform."""
    names = (
        LOSS + "largest_logit",
        LOSS + "smallest_logit",
        "soft_labels/logits/largest",
        "soft_labels/logits/smallest",
    )
    top = max((abs(history.last(name) or 0.0) for name in names), default=0.0)
    first, uniform = history.finite(LOSS + "kl"), history.last(VAL + "baselines/uniform")
    burst = first[0].value / uniform if first and uniform else 0.0
    if top <= t["largest"] and burst <= t["times"]:
        return None
    return {"top": top, "burst": burst, "columns": _largest_columns(history)[0]}


def constant(history: History, t: Thresholds) -> Seen:
    """After initialisation: largest spread below `spread`, distinct outputs below `share` of the samples, or one argmax
    where targets have at least `argmaxes`."""
    if len(history.finite(VAL + "spread/largest")) < 2:
        return None
    read = lambda name: history.last(VAL + name) or 0.0  # noqa: E731
    spread, outputs, samples = read("spread/largest"), read("distinct/outputs"), read("distinct/samples")
    argmax, wanted = read("distinct/argmax"), read("distinct/target_argmax")
    narrow = spread < t["spread"] or outputs < max(2.0, t["share"] * samples)
    if not (narrow or (argmax <= 1 and wanted >= t["argmaxes"])):
        return None
    skill = read("skill")
    return {
        "spread": spread,
        "outputs": outputs,
        "samples": samples,
        "argmax": argmax,
        "wanted": wanted,
        "skill": skill,
    }


def constant_in_group(history: History, t: Thresholds) -> Seen:
    """Spread within groups below `share` of the spread over all, after initialisation, where all is not constant."""
    inside, whole = history.finite(VAL + "spread/within_groups"), history.last(VAL + "spread/largest")
    if len(inside) < 2 or whole is None or whole < t["spread"] or inside[-1].value >= t["share"] * whole:
        return None
    return {"inside": inside[-1].value, "whole": whole}


def uniform_by_construction(history: History, t: Thresholds) -> Seen:
    """The largest probability that logit norm and temperature allow is below the targets' mean largest one."""
    top, wanted = history.last(BUILD + "p_max"), history.last(BUILD + "target_mean_max")
    if top is None or wanted is None or top >= wanted:
        return None
    return {
        "top": top,
        "wanted": wanted,
        "ratio": history.last(BUILD + "ratio"),
        "need": history.last(BUILD + "needed_ratio"),
    }


def dead_penalty(history: History, t: Thresholds) -> Seen:
    """An entropy penalty that cannot fire (least entropy >= threshold), or that was not active for `epochs` epochs."""
    threshold, least = history.last(BUILD + "min_entropy"), history.last(BUILD + "least_entropy")
    if threshold is None:
        return None
    if least is not None and least >= threshold:
        why = f"the least entropy that logit norm and temperature allow is {least:.3f}"
        return {"threshold": threshold, "why": why}
    epoch = history.last(BUILD + "epoch_steps") or 0.0
    since = history.since("inactive", LOSS + "active", lambda value: value == 0.0)
    points = history.series(LOSS + "active")
    if since is None or not epoch or points[-1].step - since < t["epochs"] * epoch:
        return None
    return {"threshold": threshold, "why": f"no sample has been below it since step {since}"}


def penalty_fights_truth(history: History, t: Thresholds) -> Seen:
    """min_entropy above the 25th percentile of the targets' entropies."""
    threshold, quarter = history.last(BUILD + "min_entropy"), history.last(BUILD + "target_entropy_p25")
    if threshold is None or quarter is None or threshold <= quarter:
        return None
    return {"threshold": threshold, "share": history.last(BUILD + "share_below")}


def clamp_ceiling(history: History, t: Thresholds) -> Seen:
    """KL above `share` of what one-hot predictions on the wrong category score."""
    value, ceiling = history.last(VAL + "kl"), history.last(VAL + "ceiling")
    if value is None or ceiling is None or value <= t["share"] * ceiling:
        return None
    return {"kl": value, "ceiling": ceiling}


def below_constant(history: History, t: Thresholds) -> Seen:
    """Validation KL not below that of the training mean from `fraction` of the run on."""
    skill, done = history.last(VAL + "skill"), history.last("fraction")
    if skill is None or done is None or done < t["fraction"] or skill > 0:
        return None
    return {"kl": history.last(VAL + "kl"), "constant": history.last(VAL + "baselines/constant"), "done": done}


def unscaled_inputs(history: History, t: Thresholds) -> Seen:
    """The largest standard deviation of an input above `ratio` times the median one, as the network sees them."""
    ratio = history.last(INPUTS + "ratio")
    if ratio is None or ratio <= t["ratio"]:
        return None
    return {"ratio": ratio, "columns": _largest_columns(history)[0]}


_VAL, _BUILD, _INPUTS = (VAL,), (BUILD,), (INPUTS,)
TABLE: tuple[Detector, ...] = (
    Detector(
        "unscaled_inputs", "error",
        {"ratio": Threshold(100.0, "standardised columns differ by less than 10, even with rare categories")},
        _INPUTS, unscaled_inputs,
        "The widest input column is {ratio:.3g} times as wide as the median one: {columns}.",
        "Columns of very different scale reach the classifier: logits of thousands, then one-hot predictions.",
        "Set config.data.standardise='standard'. Temperature, smoothing and entropy penalties do not cure this.",
    ),
    Detector(
        "one_hot", "error",
        {
            "share": Threshold(0.3, "healthy runs stay above 0.9 of the targets' mean entropy"),
            "rows": Threshold(0.2, "one row in five: two groups may differ in sharpness"),
        },
        _VAL, one_hot,
        "Predictions are one-hot: mean entropy {predicted:.3f} where the targets' is {target:.3f}, {rows:.0%} of "
        "rows have "
        "a probability above 0.999. Largest input column std is {largest:.2g}.",
        "Inputs that are not standardised (widest columns in the finding on inputs), or a learning rate far too high.",
        "Set config.data.standardise='standard'; then look at config.method.optim.peak_lr.",
    ),
    Detector(
        "exploding_logits", "error",
        {
            "largest": Threshold(100.0, "exp(-100) is no probability; healthy runs reach 12 to 22"),
            "times": Threshold(20.0, "an untrained network on inputs of unit scale begins within a few times uniform"),
        },
        (*_VAL, LOSS, "soft_labels/logits/"), exploding_logits,
        "The largest logit is {top:.3g}; the first loss was {burst:.3g} times the KL of uniform. Widest inputs: "
        "{columns}.",
        "Inputs of scale 10^3 and more pass the residual path to the classifier.",
        "Set config.data.standardise='standard' and look at the named columns.",
    ),
    Detector(
        "uniform_by_construction", "error", {}, _BUILD, uniform_by_construction,
        "No input can reach the targets' sharpness: logit norm / temperature = {ratio:.3g} allows a largest "
        "probability of "
        "{top:.3f}, the targets' mean largest one is {wanted:.3f}.",
        "Logit normalisation with a small scale or a large temperature bounds every prediction near uniform.",
        "Raise config.method.soft_label.logit_norm / temperature to at least {need:.2f}, or switch logit_norm off.",
    ),
    Detector(
        "constant", "error",
        {
            "spread": Threshold(0.01, "healthy runs spread by 0.08 and more"),
            "share": Threshold(0.01, "one distinct output a hundred samples"),
            "argmaxes": Threshold(3, "with two categories one argmax may be right"),
        },
        _VAL, constant,
        "The prediction ignores the input: spread {spread:.4f}, {outputs:.0f} distinct outputs of {samples:.0f} "
        "samples, "
        "{argmax:.0f} argmaxes where targets have {wanted:.0f}; skill against the constant {skill:.3f}.",
        "Logits bounded over inputs that are not standardised, penalties that prefer uniform, or too small a "
        "learning rate.",
        "Look at the inputs first (config.data.standardise), then config.method.optim.peak_lr and the terms of "
        "config.method.soft_label.",
    ),
    Detector(
        "constant_in_group", "error",
        {
            "share": Threshold(0.1, "variance within groups below one per cent of all"),
            "spread": Threshold(0.01, "below it everything is constant, which is said elsewhere"),
        },
        _VAL, constant_in_group,
        "Only the group is used: the spread within groups is {inside:.4f}, over all {whole:.4f}.",
        "Columns that are constant within a group drown those that are not.",
        "Set config.data.standardise='standard'; look for columns that identify the group.",
    ),
    Detector(
        "clamp_ceiling", "error",
        {"share": Threshold(0.8, "only confident and wrong predictions come near the ceiling")},
        _VAL, clamp_ceiling,
        "Confidently wrong: KL {kl:.2f} of at most {ceiling:.2f}.",
        "One-hot predictions on the wrong category; the KL is that of the clamp at 1e-8.",
        "Standardise the inputs (config.data.standardise).",
    ),
    Detector(
        "below_constant", "error",
        {"fraction": Threshold(0.5, "half of the run is enough to beat a constant")},
        (VAL, "fraction"), below_constant,
        "Worse than a constant guess: KL {kl:.4f}, the training mean has {constant:.4f}, after {done:.0%} of the run.",
        "Nothing that generalises was learned: inputs, learning rate, or a split into groups that share nothing.",
        "Look at the other findings, then at config.method.optim.peak_lr, width and config.data.source.",
    ),
    Detector(
        "dead_penalty", "warning",
        {"epochs": Threshold(1, "a sample comes once an epoch")},
        (BUILD, LOSS + "active"), dead_penalty,
        "The entropy penalty below {threshold:.3f} never acts: {why}.",
        "Its threshold lies outside of what the predictions do; its gradient is exactly 0.",
        "Remove it (config.method.soft_label.entropy_weight = 0) or move min_entropy.",
    ),
    Detector(
        "penalty_fights_truth", "warning", {}, _BUILD, penalty_fights_truth,
        "min_entropy = {threshold:.3f} is above the entropy of {share:.0%} of the targets.",
        "The penalty punishes predictions for being as sharp as the truth.",
        "Lower config.method.soft_label.min_entropy, or use entropy_matched_weight.",
    ),
)  # fmt: skip
