"""The evaluation of a mixture of prompts: usage, purity, geometry, accuracy and baselines, as `api.Evaluation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from protojax.api import Evaluation, Key, Probe
from protojax.config import Data
from protojax.data.prompts_cache import FeatureCache, Features, class_means
from protojax.evals import prompts as scores
from protojax.evals.linear import RIDGE_DECAYS, ridge_probe, ridge_weights
from protojax.evals.prompts_baselines import adam_probe, class_centres
from protojax.objectives.prompts import PromptData, PromptOptions, e_step
from protojax.ops import prompts as prompt_ops
from protojax.workloads.prompts_protocol import Unseen

ROWS = 2048  # images scored at once
SAMPLE = 4096  # images whose scores against all classes are kept for calibration
MOST_CLASSES = 1000  # beyond, fitting baselines takes longer than training
FEWEST_TO_CHOOSE = 10  # rows of which a tenth can be held out to choose the probe's decay; else the strongest
VALIDATION = "val"

_scores = jax.jit(prompt_ops.class_scores)


class Tested(NamedTuple):
    """What an evaluation reads. held: the split 'val', where the cache has one; unseen: classes kept from training."""

    train: Features
    test: Features
    held: Features | None
    base: np.ndarray
    centre: np.ndarray
    counts: np.ndarray
    class_names: tuple[str, ...]
    levels: Mapping[str, tuple[str, ...]]
    options: PromptOptions
    std: float
    unseen: Unseen | None
    prior: np.ndarray | None


def tested(cache: FeatureCache, constants: Mapping[str, np.ndarray], options: PromptOptions, data: Data, std: float,
           unseen: Unseen | None) -> Tested:  # fmt: skip
    """The parts of a cache that are evaluated."""
    used = (data.train_split, data.test_split)
    held = cache.split(VALIDATION) if VALIDATION in cache.splits and VALIDATION not in used else None
    return Tested(cache.split(used[0]), cache.split(used[1]), held, constants["base"], constants["centre"],
                  constants["class_counts"], cache.class_names, cache.levels, options, std, unseen,
                  constants.get("prior"))  # fmt: skip


def prompts_evaluation(t: Tested, total_steps: int) -> Evaluation:
    """{'prompts': {'count', 'e_step', 'inference', 'geometry', 'accuracy', 'separation', 'baselines', ...}}.

    e_step: responsibilities of the true class at the final temperature and price; inference: nearest sub-prompt of the
    true class. Both have the usage on training images and the purity on test images. accuracy: `accuracy_numbers` on
    test images; validation: the same on the split 'val'; base_to_new: `seen_and_unseen`. 'ece' in accuracy and the
    baselines that have to be fitted come with the last step.
    """
    known: dict[str, Any] = {}

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        assert probe.codebook is not None
        offsets, usage = np.asarray(probe.codebook.prototypes), np.asarray(probe.codebook.bias)
        made = prompts_made(t.base, offsets)
        last = probe.step >= total_steps
        found: dict[str, Any] = {"count": made.shape[1],
                                 **assignments(t, made, usage, probe.info.get("potential"))}  # fmt: skip
        found["geometry"] = {**scores.prompt_geometry(made), "initial_cosine": scores.initial_cosine(
            made.shape[2], t.std)}  # fmt: skip
        found["accuracy"] = measured(t, _cosines(t.base, offsets), calibrated=last)
        if t.held is not None:
            found["validation"] = measured(t, _cosines(t.base, offsets), on=t.held)
        if t.train.mode is not None and t.test.mode is not None:
            known.setdefault("random_purity", random_purity(t, made.shape[1]))
            found["random_purity"] = known["random_purity"]
            found["effective_needed"] = 0.9 * mode_perplexity(t.train.label, t.train.mode, len(t.counts))
        found["near_empty_classes"] = int((t.counts < made.shape[1]).sum())
        known.setdefault("zero_shot", measured(t, _cosines(t.base), calibrated=True))
        if last and "class_mean" not in known and len(t.counts) <= MOST_CLASSES:
            known.update(fitted_baselines(t, made.shape[1]))
        found["baselines"] = {k: v for k, v in known.items() if isinstance(v, dict)}
        if t.unseen is not None:
            found["base_to_new"] = seen_and_unseen(t, t.unseen, offsets, found["accuracy"]["top1"])
        return {"prompts": found}

    return Evaluation("prompts", run)


def assignments(t: Tested, made: np.ndarray, usage: np.ndarray, potential: np.ndarray | None) -> dict[str, Any]:
    """{'e_step', 'inference': `usage_report` with purity where modes are known, 'separation'}."""
    classes, count = len(t.counts), made.shape[1]
    parts = {"train": t.train, "test": t.test}
    soft = {n: e_step_of(f, made, usage, t.centre, t.options, potential, t.prior) for n, f in parts.items()}
    near = {n: similarity_of(f, made) for n, f in parts.items()}
    hard = {n: np.eye(count, dtype=np.float32)[v.argmax(axis=1)] for n, v in near.items()}
    found: dict[str, Any] = {"separation": scores.separation(near["test"], soft["test"].argmax(axis=1))}
    for name, r in (("e_step", soft), ("inference", hard)):
        report = scores.usage_report(r["train"], t.train.label, classes)
        if t.train.mode is not None and t.test.mode is not None:
            chosen = (r["train"].argmax(1), t.train.label, t.train.mode, r["test"].argmax(1), t.test.label, t.test.mode)
            report["purity"] = scores.purity(*chosen, classes, count=count)
            report["purity_chance"] = scores.shuffled_purity(*chosen, classes, count=count)
        found[name] = report
    return found


def measured(t: Tested, scorer: Callable[[np.ndarray], np.ndarray], *, on: Features | None = None,
             cosines: bool = True, calibrated: bool = False) -> dict[str, Any]:  # fmt: skip
    """`accuracy_numbers` of scorer(images [n,D]) -> [n,C], a block at a time, with 'ece' where asked: its temperature
    is fitted on the split 'val', or crosswise on test; at most 4,096 rows of each are read for it."""
    features = on or t.test
    scored, sample, labels = _reduced(scorer, features, cosines)
    found = scores.accuracy_numbers(scored, features.label, t.counts, t.levels)
    if calibrated and len(t.counts) > 1:
        if t.held is not None:
            _, held, held_labels = _reduced(scorer, t.held, cosines)
            found["ece"] = scores.calibrated_ece(sample, labels, held, held_labels)
        else:
            found["ece"] = scores.crossed_ece(sample, labels)
    return found


def _reduced(scorer: Callable[[np.ndarray], np.ndarray], features: Features, cosines: bool) -> tuple[
    scores.Scored, np.ndarray, np.ndarray]:  # fmt: skip
    """(what accuracy needs of all rows, scores of at most 4,096 rows evenly among them, their labels)."""
    number = len(features.label)
    chosen = np.unique(np.linspace(0, number - 1, min(number, SAMPLE)).astype(np.int64))
    parts, sample = [], []
    for start in range(0, number, ROWS):
        rows = np.minimum(np.arange(start, start + min(ROWS, number)), number - 1)  # one shape: one compilation
        block = scorer(features.image[rows])[: number - start]
        parts.append(scores.score_rows(block, features.label[start : start + ROWS], cosines=cosines))
        sample.append(block[chosen[(chosen >= start) & (chosen < start + ROWS)] - start])
    scored = scores.Scored(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    return scored, np.concatenate(sample), features.label[chosen]


def fitted_baselines(t: Tested, count: int) -> dict[str, dict[str, Any]]:
    """class_mean: nearest mean image of a class; k_means: nearest of K spherical centres of each class, with their mode
    purity; linear_probe: ridge, its decay chosen on training images; linear_probe_adam: nothing chosen."""
    classes, width = t.base.shape
    none = np.zeros((classes, width), np.float32)
    means = class_means(t.train, classes)[:, None]
    centres = class_centres(t.train.image, t.train.label, classes, count)
    found = {"class_mean": measured(t, _cosines(none, means), calibrated=True),
             "k_means": measured(t, _cosines(none, centres), calibrated=True)}  # fmt: skip
    if t.train.mode is not None and t.test.mode is not None:
        found["k_means"]["purity"] = nearest_purity(t, centres)
    labels = t.train.label.astype(np.int64)
    decay = RIDGE_DECAYS[-1]
    if len(labels) >= FEWEST_TO_CHOOSE:
        ridge = ridge_probe(t.train.image, labels, t.test.image, t.test.label.astype(np.int64), num_classes=classes)
        decay = ridge.chosen["decay"]
    weights, biases = ridge_weights(t.train.image, labels, [decay], classes)
    adam = adam_probe(t.train.image, labels, classes=classes)
    for name, probe in (("linear_probe", (weights[0], biases[0])), ("linear_probe_adam", adam)):
        found[name] = measured(t, partial(_linear, *probe), cosines=False, calibrated=True)
    return found


def _linear(weights: np.ndarray, biases: np.ndarray, images: np.ndarray) -> np.ndarray:
    return images @ weights + biases[None, :]


def nearest_purity(t: Tested, centres: np.ndarray) -> float:
    """Mode purity when every image goes to the nearest of its class's centres [C,K,D]."""
    assert t.train.mode is not None
    assert t.test.mode is not None
    train, test = (similarity_of(f, centres).argmax(axis=1) for f in (t.train, t.test))
    return scores.purity(train, t.train.label, t.train.mode, test, t.test.label, t.test.mode, len(t.counts),
                         count=centres.shape[1])  # fmt: skip


def random_purity(t: Tested, count: int) -> float:
    """Purity of normal offsets that nobody trained, assigned as the published recipe does."""
    start = prompt_ops.normal_offsets(jax.random.key(0), (len(t.counts), count, t.base.shape[1]), t.std or 0.01)
    return nearest_purity(t, prompts_made(t.base, np.asarray(start)))


def seen_and_unseen(t: Tested, unseen: Unseen, offsets: np.ndarray, seen: float) -> dict[str, float]:
    """Base-to-new: {'base', 'new', 'new_zero_shot', 'harmonic_mean'}; top-1 on test images of the classes that were
    trained among these, and of the classes that were not among those.

    An unseen class gets what training did to all classes alike, the mean offset: prompt = unit(base + mean offset)."""
    shift = np.broadcast_to(offsets.mean(axis=(0, 1)), (len(unseen.base), 1, offsets.shape[2]))
    new, zero = (
        float(_reduced(_cosines(unseen.base, given), unseen.test, True)[0].credit.mean()) for given in (shift, None)
    )
    return {"base": seen, "new": new, "new_zero_shot": zero, "harmonic_mean": scores.harmonic_mean(seen, new)}


def prompts_made(base: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """unit(base_c + offsets_ck) [C,K,D]."""
    return np.asarray(prompt_ops.prompts_of(jnp.asarray(base), jnp.asarray(offsets)))


def e_step_of(features: Features, made: np.ndarray, usage: np.ndarray, centre: np.ndarray, options: PromptOptions,
              potential: np.ndarray | None = None, prior: np.ndarray | None = None) -> np.ndarray:  # fmt: skip
    """Responsibilities [N,K] of the sub-prompts of the true class, final temperature and price (or potential)."""
    arrays = jax.tree.map(jnp.asarray, (usage, made, centre, potential, prior))
    return _rows(lambda x, y: _responsibilities(x, y, arrays, options.tau(1.0), options), features)


@partial(jax.jit, static_argnames=("options",))  # compiled once, not at every evaluation
def _responsibilities(x: jax.Array, y: jax.Array, arrays: tuple, tau: jax.Array, options: PromptOptions) -> jax.Array:
    usage, made, centre, potential, prior = arrays
    data = PromptData(x, y, jnp.ones(y.shape, bool), centre, centre, usage, potential, prior)
    return e_step(made[y], data, options, tau).responsibilities


def similarity_of(features: Features, made: np.ndarray) -> np.ndarray:
    """<x, prompts_yk> [N,K]."""
    prompts = jnp.asarray(made)
    return _rows(lambda x, y: _similarity(x, y, prompts), features)


@jax.jit
def _similarity(x: jax.Array, y: jax.Array, made: jax.Array) -> jax.Array:
    return jnp.einsum("nd,nkd->nk", x, made[y])


def _cosines(base: np.ndarray, offsets: np.ndarray | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """images [n,D] -> max_k <x, unit(base_c + offsets_ck)> [n,C]."""
    given = jnp.asarray(np.zeros((len(base), 1, base.shape[1]), np.float32) if offsets is None else offsets)
    at = jnp.asarray(base)
    return lambda images: np.asarray(_scores(jnp.asarray(images), at, given))


def _rows(function: Any, features: Features) -> np.ndarray:
    """A function of (images, labels) over all rows, a block of one shape at a time."""
    count = len(features.label)
    size = min(ROWS, count)
    out = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        block = np.asarray(function(jnp.asarray(features.image[rows]), jnp.asarray(features.label[rows])))
        out.append(block[: count - start])
    return np.concatenate(out)


def mode_perplexity(labels: np.ndarray, modes: np.ndarray, classes: int) -> float:
    """Mean over classes of exp H(mode shares): how many prompts a class can use at most, when modes are known."""
    table = np.zeros((classes, int(modes.max()) + 1))
    np.add.at(table, (labels, modes), 1)
    kept = table[table.sum(axis=1) > 0]
    return float(np.exp(scores.entropies(kept / kept.sum(axis=1, keepdims=True))).mean())
