"""Are all sub-prompts at work, and is that worth anything? Numbers for mixtures of prompts, in NumPy.

Assignments are responsibilities r [N,K] of the sub-prompts of each image's own class. Averages over classes are over
those with at least 4 K images. Usage alone deceives (K identical prompts are used evenly): read effective prompts,
duplicates and purity beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax, softmax

from protojax.evals.calibration import ece, fit_temperature

ROWS_PER_PROMPT = 4
TWIN = 0.95
MARGIN_SHARPNESS = 100.0  # the same for every method: probabilities are softmax(100 cos)


def entropies(shares: np.ndarray) -> np.ndarray:
    """-sum p ln p along the last axis, in nats."""
    safe = np.where(shares > 0, shares, 1.0)
    return -np.sum(shares * np.log(safe), axis=-1)


def usage_report(r: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Any]:
    """How the images of a class are shared among its K sub-prompts, averaged over classes with 4 K images or more.

    r [N,K]: rows sum to one; labels [N]. usage_perplexity: exp H of the mean responsibility; usage_perplexity_hard: of
    the shares of argmax; effective: exp(H(mean r) - mean H(r)), 1 both for one winner and for identical prompts;
    dead: share of sub-prompts that are nobody's argmax; max_usage; conditional_entropy in nats; collapsed: share of
    classes with a perplexity below max(1.5, 0.35 K); classes, excluded: how many were averaged and how many were too
    small (if all are, all count).
    """
    count = r.shape[1]
    sizes = np.bincount(labels, minlength=classes)
    big = np.flatnonzero(sizes >= ROWS_PER_PROMPT * count)
    used = big if big.size else np.flatnonzero(sizes)
    soft, hard, conditional = (_by_class(v, labels, classes)[used] for v in (r, _one_hot(r), entropies(r)))
    perplexity = np.exp(entropies(soft))
    return {
        "usage_perplexity": float(perplexity.mean()),
        "usage_perplexity_hard": float(np.exp(entropies(hard)).mean()),
        "effective": float(np.exp(entropies(soft) - conditional).mean()),
        "dead": float((hard == 0).mean()),
        "max_usage": float(soft.max(axis=1).mean()),
        "conditional_entropy": float(entropies(r).mean()),
        "collapsed": float((perplexity < max(1.5, 0.35 * count)).mean()) if count > 1 else 0.0,
        "classes": int(used.size),
        "excluded": int((sizes > 0).sum() - used.size),
    }


def purity(train: np.ndarray, train_labels: np.ndarray, train_modes: np.ndarray, test: np.ndarray,
           test_labels: np.ndarray, test_modes: np.ndarray, classes: int, *,
           count: int | None = None) -> float:  # fmt: skip
    """Share of test images whose sub-prompt stands for their mode: mean over classes with two modes or more.

    train, test int [N]: sub-prompt of each image. Sub-prompt k stands for the majority mode of the training images that
    it claims; one that claims none for the class's majority mode. NaN when no class has two modes.
    """
    k = int(max(train.max(initial=0), test.max(initial=0))) + 1 if count is None else count
    modes = int(max(train_modes.max(initial=0), test_modes.max(initial=0))) + 1
    table = np.zeros((classes, k, modes), np.int64)
    np.add.at(table, (train_labels, train, train_modes), 1)
    overall = table.sum(axis=1)
    majority = np.where(table.sum(axis=2) > 0, table.argmax(axis=2), overall.argmax(axis=1)[:, None])
    right = majority[test_labels, test] == test_modes
    several = (overall > 0).sum(axis=1) >= 2
    sizes = np.bincount(test_labels, minlength=classes)
    counted = several & (sizes > 0)
    if not counted.any():
        return float("nan")
    return float((np.bincount(test_labels, right, minlength=classes)[counted] / sizes[counted]).mean())


def shuffled_purity(train: np.ndarray, train_labels: np.ndarray, train_modes: np.ndarray, test: np.ndarray,
                    test_labels: np.ndarray, test_modes: np.ndarray, classes: int, *, count: int,
                    shuffles: int = 20, seed: int = 0) -> float:  # fmt: skip
    """`purity` with the modes shuffled within each class, mean of several: the chance level."""
    generator = np.random.default_rng(seed)

    def shuffle(modes: np.ndarray, labels: np.ndarray) -> np.ndarray:
        order = np.lexsort((generator.random(len(labels)), labels))
        out = np.empty_like(modes)
        out[np.argsort(labels, kind="stable")] = modes[order]
        return out

    values = [
        purity(train, train_labels, shuffle(train_modes, train_labels), test, test_labels,
               shuffle(test_modes, test_labels), classes, count=count)
        for _ in range(shuffles)
    ]  # fmt: skip
    return float(np.mean(values))


def prompt_geometry(prompts: np.ndarray) -> dict[str, float]:
    """Cosines of prompts [C,K,D] within classes: mean, min, max over pairs, share above 0.9, and `centred_duplicates`,
    the share of prompts with a neighbour of cosine above 0.95 once the class's mean prompt is subtracted.

    The mean *centred* cosine is about -1/(K-1) for any set and says nothing."""
    count = prompts.shape[1]
    if count < 2:
        return {"cos_mean": 1.0, "cos_min": 1.0, "cos_max": 1.0, "cos_above_0.9": 0.0, "centred_duplicates": 0.0}
    rows, columns = np.triu_indices(count, 1)
    pairs = np.einsum("ckd,cld->ckl", prompts, prompts)[:, rows, columns]
    centred = prompts - prompts.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=2, keepdims=True)
    # Identical prompts leave nothing but rounding: they are twins.
    same = norms[..., 0] < 1e-6
    centred = centred / np.where(norms > 0, norms, 1.0)
    cosine = np.einsum("ckd,cld->ckl", centred, centred)
    cosine[:, np.arange(count), np.arange(count)] = -1.0
    twins = (cosine.max(axis=2) > TWIN) | same
    return {
        "cos_mean": float(pairs.mean()), "cos_min": float(pairs.min()), "cos_max": float(pairs.max()),
        "cos_above_0.9": float((pairs > 0.9).mean()), "centred_duplicates": float(twins.mean()),
    }  # fmt: skip


def initial_cosine(width: int, std: float) -> float:
    """Cosine of two prompts of a class right after normal initialisation: 1 / (1 + D std^2), 0.951 for D = 512 and
    std = 0.01. A trained value near it says that nothing moved, not that prompts collapsed."""
    return 1.0 / (1.0 + width * std**2)


def separation(similarity: np.ndarray, chosen: np.ndarray) -> float:
    """Mean similarity to the own sub-prompt minus mean similarity to the others; similarity [N,K], chosen [N]."""
    if similarity.shape[1] < 2:
        return 0.0
    own = np.take_along_axis(similarity, chosen[:, None], axis=1)[:, 0]
    others = (similarity.sum(axis=1) - own) / (similarity.shape[1] - 1)
    return float((own - others).mean())


# ------------------------------------------------------------------------------------------------ accuracy
class Scored(NamedTuple):
    """What accuracy needs of scored images: credit float [N] (1 / t for a tie of t classes that includes the true one),
    predicted class [N], margin [N] (NaN where scores are no cosines)."""

    credit: np.ndarray
    predicted: np.ndarray
    margin: np.ndarray


def score_rows(scores: np.ndarray, labels: np.ndarray, *, cosines: bool = True) -> Scored:
    """Reduce class scores [N,C]. cosines: whether they are, and p1 - p2 of softmax(100 cos) means anything."""
    best = scores.max(axis=1, keepdims=True)
    tied = scores >= best
    rows = np.arange(len(labels))
    credit = np.where(tied[rows, labels], 1.0 / tied.sum(axis=1), 0.0)
    return Scored(credit, scores.argmax(axis=1), margins(scores) if cosines else np.full(len(labels), np.nan))


def accuracy_numbers(scored: Scored, labels: np.ndarray, counts: np.ndarray,
                     levels: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:  # fmt: skip
    """top1: a tie of t classes that includes the true one counts 1/t; balanced: mean recall of classes present; many,
    medium, few: top-1 over classes with more than 100, 20 to 100, fewer than 20 training images (None where there is
    none); margin: mean of p1 - p2 of softmax(100 cos), None for scores that are no cosines; levels: accuracy at each
    coarser level, and 'leaf'; largest: share of the most frequent prediction.

    counts [C]: training images; levels: name -> coarser class of each class.
    """
    credit, predicted, classes = scored.credit, scored.predicted, len(counts)
    sizes = np.bincount(labels, minlength=classes)
    recall = np.bincount(labels, credit, minlength=classes)[sizes > 0] / sizes[sizes > 0]
    size = counts[labels]
    groups = {"many": size > 100, "medium": (size >= 20) & (size <= 100), "few": size < 20}
    found: dict[str, Any] = {
        "top1": float(credit.mean()),
        "balanced": float(recall.mean()),
        **{name: float(credit[mask].mean()) if mask.any() else None for name, mask in groups.items()},
        "margin": None if np.isnan(scored.margin).any() else float(scored.margin.mean()),
        "largest": float(np.max(np.bincount(predicted, minlength=classes)) / len(labels)),
    }
    for name, values in (levels or {}).items():
        names = np.asarray(values)
        found.setdefault("levels", {"leaf": found["top1"]})[name] = float((names[predicted] == names[labels]).mean())
    return found


def margins(cosine: np.ndarray) -> np.ndarray:
    """p1 - p2 of softmax(100 cos) of each row; 1 where there is but one class."""
    if cosine.shape[1] < 2:
        return np.ones(len(cosine))
    probabilities = softmax(MARGIN_SHARPNESS * cosine.astype(np.float64), axis=1)
    top = np.partition(probabilities, -2, axis=1)
    return top[:, -1] - top[:, -2]


def crossed_ece(scores: np.ndarray, labels: np.ndarray) -> float:
    """`calibrated_ece` where there is no validation split: the temperature for every second row is fitted on the
    others, and the two halves are averaged."""
    halves = [slice(0, None, 2), slice(1, None, 2)]
    return float(np.mean([calibrated_ece(scores[a], labels[a], scores[b], labels[b])
                          for a, b in (halves, halves[::-1])]))  # fmt: skip


def calibrated_ece(cosine: np.ndarray, labels: np.ndarray, held: np.ndarray, held_labels: np.ndarray) -> float:
    """Calibration error (15 bins of equal mass) after one temperature fitted on held-out rows.

    Scores are first divided by their own spread, so that the temperature's limits (0.01 to 100) mean the same for
    cosines and for logits."""
    sharp = 10.0 / max(float(np.std(held)), 1e-12)
    temperature = fit_temperature(sharp * held.astype(np.float64), held_labels)
    return ece(np.exp(log_softmax(sharp * cosine.astype(np.float64) / temperature, axis=1)), labels, binning="mass")


def harmonic_mean(base: float, new: float) -> float:
    """2 b n / (b + n): accuracy on classes with and without training images, as prompt-learning papers report it."""
    return 0.0 if base + new == 0 else 2.0 * base * new / (base + new)


# --------------------------------------------------------------------------------------------------- helpers
def _one_hot(r: np.ndarray) -> np.ndarray:
    out = np.zeros_like(r)
    out[np.arange(len(r)), r.argmax(axis=1)] = 1.0
    return out


def _by_class(values: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Mean of values [N,...] over the rows of each class."""
    sums = np.zeros((classes, *values.shape[1:]))
    np.add.at(sums, labels, values)
    sizes = np.maximum(np.bincount(labels, minlength=classes), 1)
    return sums / sizes.reshape(-1, *([1] * (values.ndim - 1)))
