"""Sentences that are true or false of an image: hard negatives, for matching beside retrieval (NLVR, Suhr, Lewis, Yeh
and Artzi, ACL 2017; CC BY 4.0)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from protojax.data.npz import _open_archive
from protojax.data.pairs import Pairs, distinct, image_content
from protojax.data.pairs_text import hashed_texts

BOX, STEP, GAP = 50, 75, 10  # pixels: side of a box, from the left edge of one to that of the next, and ours between
PARTS = {"train": "hidden", "test": "test", "dev_matching": "dev", "test_matching": "test"}
KEYS = ("images", "sentences", "is_true", "split", "split_names")


def open_nlvr(root: str, split: str) -> Pairs:
    """Pairs of an archive with `images` uint8 [M,50,200,3] (three boxes side by side), `sentences` [M], `is_true` bool
    [M], `split` int [M] into `split_names` (dev, test, hidden).

    'train': the true pairs of part hidden. 'test': the true pairs of part test. 'dev_matching', 'test_matching': all
    pairs of dev and test with the label 'true' (classes 'false', 'true'): the first chooses the threshold of the
    second, and neither is trained on. Images are squares of 110 pixels, see `boxes_as_square`.

    Raises ValueError for another split, missing arrays, arrays out of step and images of another shape."""
    if split not in PARTS:
        raise ValueError(f"nlvr has no split {split!r}; it has: {', '.join(PARTS)}")
    name = Path(root).stem
    with _open_archive(root) as archive:
        missing = [key for key in KEYS if key not in archive.files]
        if missing:
            raise ValueError(f"{name} lacks the arrays {missing}; it holds {sorted(archive.files)}")
        images, sentences, truth, part, names = (archive[key] for key in KEYS)
    lengths = {key: len(value) for key, value in zip(KEYS, (images, sentences, truth, part), strict=False)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: the pairs are out of step: {lengths}")
    known = [str(n) for n in names]
    if PARTS[split] not in known:
        raise ValueError(f"{name} has no part {PARTS[split]!r}; it has: {', '.join(known)}")
    matching = split.endswith("_matching")
    rows = np.flatnonzero((part == known.index(PARTS[split])) & (truth | matching))
    own = f"{name}/{split}"
    texts, caption = distinct([[str(s)] for s in sentences[rows]], own)
    shapes, read = image_content(boxes_as_square(images[rows]), own)
    labels = {"true": truth[rows].astype(np.int64)} if matching else {}
    classes = {"true": ("false", "true")} if matching else {}
    return Pairs(own, len(rows), shapes, read, caption, hashed_texts(texts), labels, classes)


def boxes_as_square(images: np.ndarray) -> np.ndarray:
    """Three boxes of 50 pixels side by side with gaps, [M,50,200,3] -> two above one on the gaps' grey, [M,110,110,3]:
    views and evaluation look at squares, and the central one would be a single box. Raises ValueError for another
    shape."""
    if images.ndim != 4 or images.shape[1:] != (BOX, 2 * STEP + BOX, 3):
        raise ValueError(f"images must be [M,{BOX},{2 * STEP + BOX},3], three boxes side by side, got {images.shape}")
    square = np.empty((len(images), 2 * BOX + GAP, 2 * BOX + GAP, 3), images.dtype)
    square[:] = images[:, :1, BOX : BOX + 1]
    for i in range(3):
        top, left = (BOX + GAP) * (i // 2), (BOX + GAP) * (i % 2)
        square[:, top : top + BOX, left : left + BOX] = images[:, :, STEP * i : STEP * i + BOX]
    return square
