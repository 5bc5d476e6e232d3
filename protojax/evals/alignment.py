"""What an aligner is judged by: retrieval at every prefix, the training losses on held-out pairs, and its two sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from protojax.api import Evaluation, Key, Probe
from protojax.evals.rank import effective_rank, spread
from protojax.evals.retrieval_pairs import RECALLS, pair_retrieval, prefix_units, zero_shot
from protojax.ops.contrastive import ContrastiveLosses, nested_contrastive

SIDE_ROWS = 1024  # enough for a rank up to a few hundred; more only costs time


def side_report(embeddings: np.ndarray, widths: Sequence[int]) -> dict[str, Any]:
    """Signs of a constant tower on at most 1,024 rows, at full width and by prefix: mean pairwise cosine (constant: 1),
    effective rank, uncentred (1), smallest column standard deviation (0)."""
    rows = np.asarray(embeddings[:SIDE_ROWS], np.float32)
    out: dict[str, Any] = {"mean_cosine": {}, "effective_rank": {}}
    for width in widths:
        units = prefix_units(rows, width)
        out["mean_cosine"][str(width)] = spread(units)["mean_cosine"]
        out["effective_rank"][str(width)] = effective_rank(units)
    full = str(max(widths))
    out |= {"std": float(np.min(np.std(rows, axis=0, dtype=np.float64)))}
    return out | {"cosine": out["mean_cosine"][full], "rank": out["effective_rank"][full]}


def held_out_losses(
    image: np.ndarray, text: np.ndarray, caption_id: np.ndarray, *, widths: Sequence[int], sharpness: float, batch: int
) -> dict[str, float]:
    """The training loss by its own code on held-out pairs, in batches of the training size in order (the last may be
    partial and counts by its pairs): {'contrastive_full', 'prefix_<d>', 'chance', 'above_chance'}."""
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
    full = values[f"prefix_{ascending[-1]}"]
    return {"contrastive_full": full, **values, "chance": chance / count, "above_chance": full - chance / count}


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
    classes_split: str | None = None,
    label: str = "fine",
    ks: Sequence[int] = RECALLS,
    epochs: float = 0.0,
    steps: int = 1,
    name: str = "alignment",
) -> Evaluation:
    """{'alignment': retrieval of `split` (see `pair_retrieval`), 'loss', 'image' and 'text' (`side_report`),
    'attention_entropy' and 'latent_cosine' where the encoder has them, 'zero_shot' where `classes_split` holds a text a
    class, and 'epoch' (of `epochs` in `steps`)}.

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
        if classes_split is not None:
            texts = np.asarray(probe.bank(classes_split).extra["text"])
            result["zero_shot"] = zero_shot(image, bank.labels[label], texts, widths=widths)
        return {name: result}

    return Evaluation(name, run)


def _measures(extra: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(np.mean(extra[name])) for name in ("attention_entropy", "latent_cosine") if name in extra}
