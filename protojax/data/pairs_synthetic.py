"""Synthetic pairs of known shared content: factors that images and captions both express, among noise and distractors.

An image is a shuffled set of tokens, one a factor u_g W_g + tag_g + noise, and as many distractors, behind a constant
class token. A caption is a shuffled set of word vectors u_g V_g + tag'_g + noise between a start and an end token,
read by a frozen causal tower (`pairs_text.causal_states`): position 0 is constant, the end token has seen everything.
What factors and tags add to a number has variance 1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from protojax.data import seeding
from protojax.data.pairs import Pairs, Texts, token_content
from protojax.data.pairs_text import causal_states, normals, pool_states

SPLITS = ("train", "test")
IMAGE_WIDTH, WORD_WIDTH, DISTRACTORS = 64, 48, 16


class Preset(NamedTuple):
    """noise: standard deviation on tokens and words. factors: G. length: S positions. fillers: most meaningless
    words."""

    noise: float
    factors: int
    length: int
    fillers: int


PRESETS = {
    "easy": Preset(0.25, 12, 16, 0),
    "standard": Preset(0.7, 16, 20, 0),
    "long": Preset(0.7, 16, 64, 44),
}


@functools.lru_cache(maxsize=4)
def open_synthetic_pairs(
    split: str, *, preset: str = "standard", size: int = 8192, test_size: int = 1024, seed: int = 0
) -> Pairs:
    """`size` training or `test_size` test pairs of a preset: 'easy', 'standard', or 'long' (lengths of captions vary
    up to 64 positions, so that masking matters). Tokens [33,64] (29 for 'easy'), text states [96], captions named
    'pair i'.

    The maps W, V and the tags come from (seed), the pairs from (seed, split). Raises ValueError for another split,
    preset or size.
    """
    if split not in SPLITS:
        raise ValueError(f"synthetic_pairs has no split {split!r}; it has: {', '.join(SPLITS)}")
    if preset not in PRESETS:
        raise ValueError(f"synthetic_pairs: preset must be one of {', '.join(map(repr, PRESETS))}; got {preset!r}")
    count = size if split == "train" else test_size
    if count < 2:
        raise ValueError(f"synthetic_pairs: size and test_size must be at least 2, got {size} and {test_size}")
    kind, stream = PRESETS[preset], 10 + SPLITS.index(split)
    factors = kind.factors
    draw = lambda shape, *key: normals(int(np.prod(shape)), seed, *key).reshape(shape)  # noqa: E731
    half = 2.0**-0.5  # a factor is two numbers
    maps, tags = half * draw((factors, 2, IMAGE_WIDTH), 9, 0), draw((factors, IMAGE_WIDTH), 9, 1)
    word_maps, word_tags = half * draw((factors, 2, WORD_WIDTH), 9, 2), draw((factors, WORD_WIDTH), 9, 3)
    offset, class_token, ends = draw((IMAGE_WIDTH,), 9, 4), draw((IMAGE_WIDTH,), 9, 5), draw((3, WORD_WIDTH), 9, 6)
    shared = draw((count, factors, 2), stream, 0)

    tokens = np.einsum("mgi,gid->mgd", shared, maps) + tags[None]
    tokens = tokens + kind.noise * draw(tokens.shape, stream, 1)
    others = offset[None, None] + 2.0 * draw((count, DISTRACTORS, IMAGE_WIDTH), stream, 2)
    tokens = _shuffled(np.concatenate([tokens, others], axis=1), seed, stream, 3)
    first = np.broadcast_to(class_token, (count, 1, IMAGE_WIDTH))
    tokens = np.concatenate([first, tokens], axis=1).astype(np.float32)

    words = np.einsum("mgi,gid->mgd", shared, word_maps) + word_tags[None]
    words = words + kind.noise * draw(words.shape, stream, 4)
    texts = _texts(words.astype(np.float32), kind, ends, seed, stream)
    shapes, read = token_content(tokens, None, f"synthetic_pairs/{split}")
    caption = tuple(np.asarray([i], np.int32) for i in range(count))
    return Pairs(f"synthetic_pairs/{preset}/{split}", count, shapes, read, caption, texts,
                 factors=shared.reshape(count, -1))  # fmt: skip


def _texts(words: np.ndarray, kind: Preset, ends: np.ndarray, seed: int, stream: int) -> Texts:
    """Start, the words (with fillers among them, as many as a caption draws), end, padding to S."""
    count, factors = words.shape[:2]
    fillers = np.zeros(count, np.int64)
    if kind.fillers:
        fillers = (seeding.raw_stream(count, seed, seeding.SYNTHETIC, stream, 5) % np.uint64(kind.fillers + 1)).astype(
            np.int64
        )
        noise = normals(count * kind.fillers * WORD_WIDTH, seed, stream, 6).reshape(count, kind.fillers, WORD_WIDTH)
        words = np.concatenate([words, noise], axis=1)
    most = words.shape[1]
    order = np.argsort(
        np.where(
            np.arange(most)[None, :] < factors + fillers[:, None],
            seeding.raw_stream(count * most, seed, seeding.SYNTHETIC, stream, 7).reshape(count, most) >> np.uint64(1),
            np.uint64(2**64 - 1),
        ),
        axis=1, kind="stable",
    )  # fmt: skip
    words = np.take_along_axis(words, order[..., None], axis=1)
    eos = factors + fillers + 1
    sequence = np.broadcast_to(ends[2], (count, kind.length, WORD_WIDTH)).copy()  # padding
    sequence[:, 0] = ends[0]
    inside = min(most, kind.length - 2)
    position = np.arange(1, inside + 1)
    kept = position[None, :] < eos[:, None]
    sequence[:, 1 : inside + 1] = np.where(kept[..., None], words[:, :inside], sequence[:, 1 : inside + 1])
    sequence[np.arange(count), eos] = ends[1]
    mask = np.arange(kind.length)[None, :] <= eos[:, None]
    pooled = pool_states(causal_states(sequence), mask, eos)
    return Texts(tuple(f"pair {i}" for i in range(count)), pooled, True, "synthetic-causal-48", mask=mask,
                 states=lambda rows: causal_states(sequence[rows]))  # fmt: skip


def _shuffled(tokens: np.ndarray, seed: int, *stream: int) -> np.ndarray:
    """The tokens of every row in an order of its own."""
    draws = seeding.raw_stream(tokens.shape[0] * tokens.shape[1], seed, seeding.SYNTHETIC, *stream)
    order = np.argsort(draws.reshape(tokens.shape[:2]), axis=1, kind="stable")
    return np.take_along_axis(tokens, order[..., None], axis=1)
