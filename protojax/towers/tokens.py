"""Token banks: what frozen towers say of images and texts before they are pooled, for the alignment workload
(`pairs_npz`, docs/alignment.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from protojax.data.pairs_text import pool_states
from protojax.data.prompts_pictures import Pictures, batches
from protojax.towers.model import ImageText

LARGEST = 2**35  # bytes of image tokens: the archive is put together in memory
SPLITS = ("train", "test")


def write_tokens(
    out: Path, towers: ImageText, pictures: Pictures, texts: Sequence[Sequence[str]] | None, made: Mapping[str, str]
) -> str:
    """An archive for the source `pairs_npz`: image_tokens float16 [M,N,W], text_eos_state, text_mean, text_bos float32
    [M,W_text], caption_id, is_test, causal, fingerprint. The text of an image is its caption, where the data has
    captions, else the first text of its class. Returns a line that says what is there.

    Raises ValueError without any text, for other splits than train and test, and for more than 32 GiB of tokens.
    """
    config, unknown = towers.config, [name for name in pictures.splits if name not in SPLITS]
    if unknown:
        raise ValueError(
            f"--tokens: pairs have the splits train and test, the data has {unknown}: name them in --splits"
        )
    if texts is None and not pictures.captions:
        raise ValueError("--tokens: pairs need texts; the data has no captions, so leave --templates=none out")
    patches = (config.vision.image_size // config.vision.patch_size) ** 2
    count = sum(records.size for records in pictures.splits.values())
    if (size := count * patches * config.vision.transformer.width * 2) > LARGEST:
        raise ValueError(
            f"--tokens: {count} images of {patches} tokens are {size / 2**30:.0f} GiB, at most {LARGEST / 2**30:.0f} "
            "are written: take a part of the data, or run the tower in the step"
        )
    images: list[np.ndarray] = []
    captions: list[str] = []
    is_test: list[np.ndarray] = []
    for name, records in pictures.splits.items():
        labels, own = records.labels[pictures.label], pictures.captions.get(name)
        for rows, content, good in batches(records, towers.batch_size, name):
            images.append(towers.encode_images(content[good], "tokens").astype(np.float16))
            captions += [own[row] if own else texts[labels[row]][0] for row in rows[good]]  # type: ignore[index]
            is_test.append(np.full(int(good.sum()), name == "test"))
    distinct = list(dict.fromkeys(captions))
    number = {text: i for i, text in enumerate(distinct)}
    caption_id = np.asarray([number[text] for text in captions], np.int64)
    arrays = {f"text_{name}": rows[caption_id] for name, rows in text_states(towers, distinct).items()}
    arrays |= {"image_tokens": np.concatenate(images), "caption_id": caption_id, "is_test": np.concatenate(is_test)}
    arrays |= {"causal": np.asarray(config.kind == "clip"), **{k: np.asarray(v) for k, v in made.items()}}
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return f"{out}: image_tokens {list(arrays['image_tokens'].shape)}, {len(distinct)} texts, {made['fingerprint']}"


def text_states(towers: ImageText, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """'eos_state' (where the tower pools), 'mean' (over tokens), 'bos' (position 0): float32 [T,W]."""
    parts: dict[str, list[np.ndarray]] = {"eos_state": [], "mean": [], "bos": []}
    for first in range(0, len(texts), towers.batch_size):
        own = list(texts[first : first + towers.batch_size])
        mask = towers.tokeniser(own).mask
        pools = pool_states(towers.encode_texts(own, "tokens"), mask, np.zeros(len(own), np.int64))
        parts["eos_state"].append(towers.encode_texts(own, "pooled"))
        parts["mean"].append(pools["mean"])
        parts["bos"].append(pools["bos"])
    return {name: np.concatenate(rows) for name, rows in parts.items()}
