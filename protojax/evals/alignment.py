"""What an aligner is judged by: retrieval at every prefix, the training losses on held-out pairs, and its two sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from protojax.api import Evaluation, FeatureBank, Key, Probe
from protojax.evals.pair_scores import factor_score, matching
from protojax.evals.rank import effective_rank, spread
from protojax.evals.retrieval_pairs import RECALLS, pair_retrieval, prefix_units, zero_shot
from protojax.ops.contrastive import ContrastiveLosses, nested_contrastive

ZERO_SHOT = {"zero_shot": "classes", "zero_shot_names": "class_names"}  # split with a text a class
MEASURES = ("attention_entropy", "identical_maps", "latent_cosine", "latent_rank")
MATCHING = ("dev_matching", "test_matching")
SIDE_ROWS = 1024  # enough for a rank up to a few hundred; more only costs time


def side_report(embeddings: np.ndarray, widths: Sequence[int]) -> dict[str, Any]:
    """Signs of a constant tower on at most 1,024 rows, at full width (cosine, rank, std) and by prefix: mean pairwise
    cosine (constant: 1), effective rank, uncentred (1), smallest column standard deviation (0)."""
    rows = np.asarray(embeddings[:SIDE_ROWS], np.float32)
    out: dict[str, Any] = {"mean_cosine": {}, "effective_rank": {}, "smallest_std": {}}
    for width in widths:
        units = prefix_units(rows, width)
        out["mean_cosine"][str(width)] = spread(units)["mean_cosine"]
        out["effective_rank"][str(width)] = effective_rank(units)
        out["smallest_std"][str(width)] = float(np.min(np.std(units, axis=0, dtype=np.float64)))
    full = str(max(widths))
    return out | {
        "cosine": out["mean_cosine"][full], "rank": out["effective_rank"][full], "std": out["smallest_std"][full]
    }  # fmt: skip


def held_out_losses(
    image: np.ndarray, text: np.ndarray, caption_id: np.ndarray, *, widths: Sequence[int], sharpness: float, batch: int
) -> dict[str, float]:
    """The training loss by its own code on held-out pairs, in batches of the training size in order (the last may be
    partial and counts by its pairs): {'contrastive_full', 'prefix_<d>', 'chance', 'above_chance',
    'above_chance_<d>'}."""
    ascending = tuple(sorted(widths))
    sums, chance, count = np.zeros(len(ascending)), 0.0, 0.0
    for first in range(0, len(image), batch):
        rows = slice(first, first + batch)
        size = len(image[rows])
        if size < 2:
            continue
        fill = lambda a, n=batch - size: np.concatenate([a, np.zeros((n, *a.shape[1:]), a.dtype)])  # noqa: E731
        parts = [
            fill(np.asarray(a[rows], t)) for a, t in ((image, np.float32), (text, np.float32), (caption_id, np.int32))
        ]
        found = _losses(*map(jnp.asarray, parts), jnp.arange(batch) < size, widths=ascending, sharpness=sharpness)
        sums += size * np.asarray(found.losses, np.float64)
        chance, count = chance + size * float(found.chance), count + size
    values = {f"prefix_{d}": float(s / count) for d, s in zip(ascending, sums, strict=True)}
    full, level = values[f"prefix_{ascending[-1]}"], chance / count
    above = {f"above_chance_{d}": values[f"prefix_{d}"] - level for d in ascending}
    return {"contrastive_full": full, **values, "chance": level, "above_chance": full - level, **above}


@partial(jax.jit, static_argnames=("widths", "sharpness"))
def _losses(
    image: jax.Array, text: jax.Array, ids: jax.Array, mask: jax.Array, *, widths: tuple[int, ...], sharpness: float
) -> ContrastiveLosses:
    """Compiled once, not at every evaluation."""
    return nested_contrastive(image, text, widths=widths, sharpness=sharpness, caption_id=ids, mask=mask)


def alignment_evaluation(
    *,
    widths: Sequence[int],
    temperature: float,
    batch: int,
    split: str = "test",
    splits: Sequence[str] = (),
    factors: Mapping[str, np.ndarray] | None = None,
    label: str = "fine",
    ks: Sequence[int] = RECALLS,
    epochs: float = 0.0,
    steps: int = 1,
    name: str = "alignment",
) -> Evaluation:
    """{'alignment': retrieval of `split` (see `pair_retrieval`), 'loss', 'image' and 'text' (`side_report`), the
    encoder's measures where it has them ('attention_entropy', 'identical_maps', 'latent_cosine', 'latent_rank'), and
    'epoch' (of `epochs` in `steps`)}; and where `splits` says that there are the data for it:

    'zero_shot', 'zero_shot_names': classification of `split` by a text a class (split 'classes' its description,
    'class_names' its name). 'matching': is a sentence true of an image, on the pairs of 'test_matching' with the
    threshold of 'dev_matching' (`pair_scores.matching`). 'factors': of the known content that embeddings hold, fitted
    on split 'bank' and scored on `split`; factors: split -> [M,F]. This one passes over all training pairs: before the
    first and after the last step alone.

    Losses are at the configured temperature, learned or not: a number by which runs compare.
    """

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        bank = probe.bank(split)
        image, text = bank.image, np.asarray(bank.extra["text"])
        ids, image_id = np.asarray(bank.extra["caption_id"]), np.asarray(bank.extra["image_id"])
        result: dict[str, Any] = pair_retrieval(image, text, ids, image_id, widths=widths, ks=ks)
        result["loss"] = held_out_losses(image, text, ids, widths=widths, sharpness=1.0 / temperature, batch=batch)
        result |= {"image": side_report(image, widths), "text": side_report(text, widths)}
        result |= _measures(bank.extra)
        result["epoch"] = epochs * probe.step / max(1, steps)
        for what, source in ZERO_SHOT.items():
            if source in splits and label in bank.labels:
                texts = np.asarray(probe.bank(source).extra["text"])
                result[what] = zero_shot(image, bank.labels[label], texts, widths=widths)
        if set(MATCHING) <= set(splits):
            choosing, scored = (_matched(probe.bank(source)) for source in MATCHING)
            result["matching"] = matching(choosing, scored, widths=widths)
        if factors and "bank" in factors and probe.step in (0, steps):
            known = probe.bank("bank")
            rows = (known.image, factors["bank"][known.positions], image, factors[split][bank.positions])
            result["factors"] = factor_score(*rows)
        return {name: result}

    return Evaluation(name, run)


def _matched(bank: FeatureBank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return bank.image, np.asarray(bank.extra["text"]), bank.labels["true"].astype(bool)


def _measures(extra: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(np.mean(extra[name])) for name in MEASURES if name in extra}
