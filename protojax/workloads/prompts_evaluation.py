"""The evaluation of a mixture of prompts: usage, purity, geometry, accuracy and baselines, as `api.Evaluation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from protojax.api import Evaluation, Key, Probe
from protojax.config import Data
from protojax.data.prompts_cache import FeatureCache, Features
from protojax.evals import prompts as scores
from protojax.evals.linear import ridge_probe
from protojax.objectives.prompts import PromptData, PromptOptions, e_step
from protojax.ops import prompts as prompt_ops

ROWS = 2048  # images scored at once


def prompts_evaluation(cache: FeatureCache, constants: Mapping[str, np.ndarray], options: PromptOptions, data: Data,
                       std: float, total_steps: int) -> Evaluation:  # fmt: skip
    """{'prompts': {'count', 'e_step', 'inference', 'geometry', 'accuracy', 'separation', 'baselines', ...}}.

    e_step: responsibilities of the true class at the final temperature and price; inference: nearest sub-prompt of the
    true class. Both have the usage on training images and the purity on test images. The linear probe among the
    baselines is fitted once, at the last step.
    """
    train, test = cache.split(data.train_split), cache.split(data.test_split)
    counts, base = constants["class_counts"], constants["base"]
    classes, width = base.shape
    chance: dict[str, float] = {}
    known: dict[str, float] = {}

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        assert probe.codebook is not None
        offsets, usage = np.asarray(probe.codebook.prototypes), np.asarray(probe.codebook.bias)
        made = prompts_made(base, offsets)
        count = made.shape[1]
        found: dict[str, Any] = {"count": count}
        soft = {n: e_step_of(f, made, usage, base, constants["centre"], options) for n, f in _both(train, test)}
        near = {n: similarity_of(f, made) for n, f in _both(train, test)}
        hard = {n: np.eye(count, dtype=np.float32)[v.argmax(axis=1)] for n, v in near.items()}
        for name, r in (("e_step", soft), ("inference", hard)):
            report = scores.usage_report(r["train"], train.label, classes)
            if train.mode is not None and test.mode is not None:
                chosen = (r["train"].argmax(1), train.label, train.mode, r["test"].argmax(1), test.label, test.mode)
                report["purity"] = scores.purity(*chosen, classes, count=count)
                report["purity_chance"] = scores.shuffled_purity(*chosen, classes, count=count)
            found[name] = report
        cosine = class_cosines(test.image, base, offsets)
        found["geometry"] = {**scores.prompt_geometry(made), "initial_cosine": scores.initial_cosine(width, std)}
        found["separation"] = scores.separation(near["test"], soft["test"].argmax(axis=1))
        found["accuracy"] = scores.accuracy_report(cosine, test.label, cache.class_names, counts, cache.levels)
        if train.mode is not None and test.mode is not None:
            found["random_purity"] = random_purity(count)
        found["near_empty_classes"] = int((counts < count).sum())
        if train.mode is not None:
            found["effective_needed"] = 0.9 * mode_perplexity(train.label, train.mode, classes)
        found["baselines"] = baselines(probe.step >= total_steps)
        return {"prompts": found}

    def random_purity(count: int) -> float:
        """Purity of normal offsets that nobody trained, assigned as the published recipe does: once a run."""
        if "random_purity" not in known:
            start = prompt_ops.normal_offsets(jax.random.key(0), (classes, count, width), std or 0.01)
            made = prompts_made(base, np.asarray(start))
            near = [similarity_of(f, made).argmax(axis=1) for f in (train, test)]
            assert train.mode is not None
            assert test.mode is not None
            modes = (near[0], train.label, train.mode, near[1], test.label, test.mode)
            known["random_purity"] = scores.purity(*modes, classes, count=count)
        return known["random_purity"]

    def baselines(last: bool) -> dict[str, float]:
        if not chance:
            chance["zero_shot"] = scores.accuracy_report(test.image @ base.T, test.label, cache.class_names, counts)[
                "top1"
            ]
        if last and "linear_probe" not in chance and classes <= 1000:
            chance["linear_probe"] = ridge_probe(
                train.image, train.label.astype(np.int64), test.image, test.label.astype(np.int64), num_classes=classes
            ).accuracy
        return dict(chance)

    return Evaluation("prompts", run)


def prompts_made(base: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """unit(base_c + offsets_ck) [C,K,D]."""
    return np.asarray(prompt_ops.prompts_of(jnp.asarray(base), jnp.asarray(offsets)))


def _both(train: Features, test: Features) -> tuple[tuple[str, Features], ...]:
    return ("train", train), ("test", test)


def e_step_of(features: Features, made: np.ndarray, usage: np.ndarray, base: np.ndarray, centre: np.ndarray,
              options: PromptOptions) -> np.ndarray:  # fmt: skip
    """Responsibilities [N,K] of the sub-prompts of the true class, final temperature and price."""
    tau = options.tau(1.0)
    step = jax.jit(
        lambda x, y, u, p, c: e_step(p[y], PromptData(x, y, jnp.ones(len(y), bool), c, c, u), options, tau)
        .responsibilities
    )  # fmt: skip
    arrays = (jnp.asarray(usage), jnp.asarray(made), jnp.asarray(centre))
    return _rows(lambda x, y: step(x, y, *arrays), features)


def similarity_of(features: Features, made: np.ndarray) -> np.ndarray:
    """<x, prompts_yk> [N,K]."""
    step = jax.jit(lambda x, y, p: jnp.einsum("nd,nkd->nk", x, p[y]))
    return _rows(lambda x, y: step(x, y, jnp.asarray(made)), features)


def class_cosines(images: np.ndarray, base: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """max_k <x, prompts_ck> [N,C]."""
    step = jax.jit(lambda x, b, o: prompt_ops.class_scores(x, b, o))
    blank = np.zeros(len(images), np.int32)
    return _rows(lambda x, y: step(x, jnp.asarray(base), jnp.asarray(offsets)), Features(images, blank))


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
