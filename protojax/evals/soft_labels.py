"""What a classifier of label distributions has learned, in numbers that a constant or a one-hot prediction cannot win.

N samples, C categories; targets t and predictions p [N,C], entropies in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import log_softmax

from protojax.api import Evaluation, Key, Probe
from protojax.evals import calibration
from protojax.ops import simplex

CLAMP = 1e-8
ROUNDING = 1e-3  # predictions are distinct outputs when they differ after rounding to this
BINS = 15


def entropy(rows: np.ndarray) -> np.ndarray:
    """-sum_j r_j ln r_j [N] with 0 ln 0 = 0."""
    return -np.sum(rows * np.log(np.where(rows > 0, rows, 1.0)), axis=1)


def kl(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """sum_j t_j (ln t_j - ln max(p_j, 1e-8)) [N]; predictions [N,C] or one row [C] for all."""
    predictions = np.broadcast_to(predictions, targets.shape)
    return -entropy(targets) - np.sum(targets * np.log(np.maximum(predictions, CLAMP)), axis=1)


def clamp_ceiling(targets: np.ndarray) -> float:
    """Mean KL of one-hot predictions on the least likely category: -ln(1e-8) (1 - t_hit) - H(t)."""
    return float(np.mean(-np.log(CLAMP) * (1.0 - np.min(targets, axis=1)) - entropy(targets)))


# ------------------------------------------------------------------------------------------------------- ranks
def top_one(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Share with argmax p = argmax t; with ties 1 / (tied argmaxes of p) if one of them is an argmax of t."""
    best_p = predictions == predictions.max(axis=1, keepdims=True)
    best_t = targets == targets.max(axis=1, keepdims=True)
    return float(np.mean((best_p & best_t).any(axis=1) / best_p.sum(axis=1)))


def true_in_top(targets: np.ndarray, predictions: np.ndarray, k: int = 3) -> float:
    """Share whose largest target is among the k largest predictions; ties by expected value over random orders."""
    hit = targets.argmax(axis=1)
    own = predictions[np.arange(len(hit)), hit][:, None]
    above, level = (predictions > own).sum(axis=1), (predictions == own).sum(axis=1)
    return float(np.mean(np.clip((k - above) / level, 0.0, 1.0)))


def overlap_top(targets: np.ndarray, predictions: np.ndarray, k: int = 3) -> float:
    """Share whose two top-k sets share a category (ties to the lower index): the original project's 'top-3'."""
    top = lambda rows: np.argsort(-rows, axis=1, kind="stable")[:, :k]  # noqa: E731
    return float(np.mean((top(targets)[:, :, None] == top(predictions)[:, None, :]).any(axis=(1, 2))))


def chance(categories: int, k: int = 3) -> dict[str, float]:
    """Random guessing: top-1 1/C, true-in-top-k k/C, overlap 1 - C(C-k, k) / C(C, k)."""
    from math import comb

    k = min(k, categories)
    overlap = 1.0 - comb(categories - k, k) / comb(categories, k)
    return {"top1": 1.0 / categories, "true_in_top3": k / categories, "overlap_top3": overlap}


# ------------------------------------------------------------------------------------------------ one split
def scores(
    targets: np.ndarray,
    predictions: np.ndarray,
    *,
    constant: np.ndarray,
    group: np.ndarray | None = None,
    bayes: np.ndarray | None = None,
    groups: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Every metric of one split. constant [C]: the training mean, which `skill` is measured against."""
    loss, h_p, h_t = kl(targets, predictions), entropy(predictions), entropy(targets)
    base = float(kl(targets, constant).mean())
    found: dict[str, Any] = {"kl": float(loss.mean()), "skill": 1.0 - float(loss.mean()) / base if base > 0 else None}
    if bayes is not None:
        floor = float(kl(targets, bayes).mean())
        found["gap_closed"] = (base - found["kl"]) / (base - floor) if base > floor else None
    found |= {
        "cross_entropy": float((loss + h_t).mean()),
        "top1": top_one(targets, predictions),
        "true_in_top3": true_in_top(targets, predictions),
        "overlap_top3": overlap_top(targets, predictions),
        "entropy": _entropies(h_p, h_t),
        "distinct": _distinct(targets, predictions, group),
        "spread": _spread(targets, predictions, group),
        "one_hot_share": float(np.mean(predictions.max(axis=1) > 0.999)),
        "target_one_hot_share": float(np.mean(targets.max(axis=1) > 0.999)),
        "ece": calibration.ece(predictions, targets, BINS, binning="mass"),
        "ece_classwise": calibration.classwise_ece(predictions, targets, BINS, binning="mass"),
        "mean_kl": float(kl(targets.mean(axis=0)[None], predictions.mean(axis=0))[0]),
        "ceiling": clamp_ceiling(targets),
    }
    if group is not None and len(groups) > 1:
        found["groups"] = {groups[g]: {"kl": float(loss[group == g].mean()), "count": int((group == g).sum())}
                           for g in np.unique(group)}  # fmt: skip
    return found


def baselines(targets: np.ndarray, constant: np.ndarray, bayes: np.ndarray | None = None) -> dict[str, Any]:
    """KL of predictors that look at nothing - uniform, the training mean, this split's own mean (oracle) - and of the
    Bayes prediction; majority share and chance levels of the accuracies."""
    categories = targets.shape[1]
    flat = np.full(categories, 1.0 / categories)
    shares = np.bincount(targets.argmax(axis=1), minlength=categories) / len(targets)
    found: dict[str, Any] = {
        "uniform": float(kl(targets, flat).mean()),
        "constant": float(kl(targets, constant).mean()),
        "oracle_constant": float(kl(targets, targets.mean(axis=0)).mean()),
    }
    if bayes is not None:
        found["bayes"] = float(kl(targets, bayes).mean())
    rows = np.broadcast_to(constant, targets.shape)
    found |= {
        "majority": float(np.max(shares)),
        "constant_true_in_top3": true_in_top(targets, rows),
        "constant_overlap_top3": overlap_top(targets, rows),
        "chance": chance(categories),
    }
    return found


def _entropies(h_p: np.ndarray, h_t: np.ndarray) -> dict[str, Any]:
    marks = (0.05, 0.25, 0.5, 0.75, 0.95)
    varies = h_p.std() > 1e-9 and h_t.std() > 1e-9
    out: dict[str, Any] = {"correlation": float(np.corrcoef(h_p, h_t)[0, 1]) if varies else 0.0}
    for name, values in (("prediction", h_p), ("target", h_t)):
        out[name] = {"mean": float(values.mean()), "std": float(values.std()),
                     "quantiles": {str(q): float(np.quantile(values, q)) for q in marks}}  # fmt: skip
    return out


def _distinct(targets: np.ndarray, predictions: np.ndarray, group: np.ndarray | None) -> dict[str, Any]:
    rounded = np.round(predictions / ROUNDING).astype(np.int64)
    out: dict[str, Any] = {
        "argmax": len(np.unique(predictions.argmax(axis=1))),
        "target_argmax": len(np.unique(targets.argmax(axis=1))),
        "outputs": len(np.unique(rounded, axis=0)),
        "samples": len(predictions),
    }
    if group is not None:
        out["outputs_within_groups"] = float(np.mean([len(np.unique(rounded[group == g], axis=0))
                                                      for g in np.unique(group)]))  # fmt: skip
    return out


def _spread(targets: np.ndarray, predictions: np.ndarray, group: np.ndarray | None) -> dict[str, Any]:
    stds, wanted = predictions.std(axis=0), targets.std(axis=0)
    out: dict[str, Any] = {"largest": float(np.max(stds)), "target": float(np.max(wanted)),
                           "ratio": float(stds.mean() / max(wanted.mean(), 1e-12))}  # fmt: skip
    if group is not None:
        # Groups of one have no spread of their own. Root mean square, as variances add.
        parts = [predictions[group == g].var(axis=0) for g in np.unique(group) if (group == g).sum() > 1]
        if parts:
            out["within_groups"] = float(np.sqrt(np.mean(parts, axis=0)).max())
    return out


# ---------------------------------------------------------------------------------------------- the evaluation
def build_facts(targets: np.ndarray, ratio: float | None, min_entropy: float | None) -> dict[str, Any]:
    """What can be said before training. ratio: logit norm / temperature, None: unbounded; min_entropy: of an entropy
    penalty, None: there is none."""
    categories, h = targets.shape[1], entropy(targets)
    facts: dict[str, Any] = {"categories": categories, "target_mean_max": float(targets.max(axis=1).mean()),
                             "target_entropy": float(h.mean())}  # fmt: skip
    if ratio is not None:
        wanted = min(max(facts["target_mean_max"], 1.0 / categories + 1e-9), 1.0 - 1e-9)
        facts |= {"ratio": ratio, "p_max": simplex.largest_probability(categories, ratio),
                  "least_entropy": simplex.least_entropy(categories, ratio),
                  "needed_ratio": simplex.ratio_for(categories, wanted)}  # fmt: skip
    if min_entropy is not None:
        facts |= {"min_entropy": min_entropy, "share_below": float(np.mean(h < min_entropy)),
                  "target_entropy_p25": float(np.quantile(h, 0.25))}  # fmt: skip
    return facts


def soft_label_evaluation(
    splits: Mapping[str, Any],
    *,
    facts: Mapping[str, Any],
    input_std: Mapping[str, float],
    calibrate: bool = True,
    name: str = "soft_labels",
) -> Evaluation:
    """{'soft_labels': {'val', 'test': `scores` and `baselines`, 'calibrated': temperature and `scores` of test with it,
    'build': facts, 'inputs': {'std': the three largest, 'ratio': largest to median}, 'logits'}}.

    splits: name -> a table with targets, group, groups and bayes ('train', 'val', 'test'). The calibration
    temperature is fitted on validation after training and never mixed with the one of training.
    """
    constant = splits["train"].targets.mean(axis=0)
    reference = {s: baselines(splits[s].targets, constant, splits[s].bayes) for s in ("val", "test")}
    ordered = sorted(input_std.items(), key=lambda item: -item[1])
    inputs = {"std": dict(ordered[:3])}
    if ordered:
        inputs["ratio"] = ordered[0][1] / max(float(np.median(list(input_std.values()))), 1e-12)  # type: ignore[assignment]

    def one(split: str, logits: np.ndarray, temperature: float = 1.0) -> dict[str, Any]:
        table = splits[split]
        predictions = np.exp(log_softmax(logits.astype(np.float64) / temperature, axis=1))
        return scores(table.targets, predictions, constant=constant, group=table.group, bayes=table.bayes,
                      groups=table.groups)  # fmt: skip

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        logits = {s: np.asarray(probe.bank(s).extra["logits"], np.float64) for s in ("val", "test")}
        found: dict[str, Any] = {s: {**one(s, z), "baselines": reference[s]} for s, z in logits.items()}
        if calibrate:
            temperature = calibration.fit_temperature(logits["val"], splits["val"].targets)
            found["calibrated"] = {"temperature": temperature, **one("test", logits["test"], temperature)}
            found["calibrated"].pop("groups", None)
        z = logits["val"]
        found["logits"] = {"largest": float(np.max(z)), "smallest": float(np.min(z)),
                           "range": float((z.max(axis=1) - z.min(axis=1)).mean())}  # fmt: skip
        return {name: {**found, "build": dict(facts), "inputs": inputs}}

    return Evaluation(name, run)
