"""A frozen text tower that needs no download: hashed word and trigram vectors through a causal mean.

It knows no language: captions that share words or spellings are near, nothing else. What it is for: data sets without
a supplied tower, and showing how pooling a causal tower at position 0 fails.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from protojax.data import seeding
from protojax.data.pairs import Texts

WORD_WIDTH = 128
LONGEST = 77
HASHED = "hashed-"


def normals(size: int, seed: int, *stream: int) -> np.ndarray:
    """float32 [size] standard normal numbers of a stream, by Box and Muller: the same on every machine."""
    half = (size + 1) // 2
    words = seeding.raw_stream(2 * half, seed, seeding.SYNTHETIC, *stream)
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:half]))
    angle = 2.0 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size].astype(np.float32)


@functools.cache
def _hashed(piece: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=6).digest(), "little")
    return normals(WORD_WIDTH, seed)


@functools.cache
def word_vector(word: str) -> np.ndarray:
    """[128] float32 of unit variance: half a vector of the word, half the sum of its trigrams' ('<cat>': <ca, cat,
    at>)."""
    framed = f"<{word}>"
    pieces = [framed[i : i + 3] for i in range(max(1, len(framed) - 2))]
    trigrams = np.sum([_hashed(f"3:{p}") for p in pieces], axis=0) / np.sqrt(len(pieces))
    return ((_hashed(f"w:{word}") + trigrams) / np.sqrt(2.0)).astype(np.float32)


def words_of(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def causal_states(vectors: np.ndarray) -> np.ndarray:
    """The frozen causal tower: state i of word vectors [.., S, W] is [tanh(m_i), tanh(v_i / 2 + m_i / 2)] with m_i the
    mean of v_0 .. v_i: [.., S, 2 W]. Position 0 sees the start token alone."""
    count = np.arange(1, vectors.shape[-2] + 1, dtype=np.float32)[:, None]
    mean = np.cumsum(vectors, axis=-2, dtype=np.float32) / count
    return np.concatenate([np.tanh(mean), np.tanh(0.5 * vectors + 0.5 * mean)], axis=-1)


def pool_states(states: np.ndarray, mask: np.ndarray, eos: np.ndarray) -> dict[str, np.ndarray]:
    """All pools of token states [T,S,D] at once, float32 [T,D]: 'eos' (state at eos [T]), 'mean' (mask [T,S]), 'bos',
    'unmasked_mean'; the last two are failing arms."""
    weight = mask.astype(np.float32)[..., None]
    return {
        "eos": states[np.arange(len(states)), eos],
        "mean": (states * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1.0),
        "bos": np.ascontiguousarray(states[:, 0]),
        "unmasked_mean": states.mean(axis=1),
    }


def hashed_texts(captions: Sequence[str], *, longest: int = LONGEST) -> Texts:
    """`Texts` of captions by the hashed tower: start, words, end; longer captions are cut, keeping the end token.

    Raises ValueError for captions without any word."""
    captions = tuple(captions)
    words = [words_of(c) for c in captions]
    bare = [i for i, w in enumerate(words) if not w]
    if bare:
        raise ValueError(f"{len(bare)} captions hold no word, the first is {captions[bare[0]]!r}")
    cut = sum(len(w) > longest - 2 for w in words)
    words = [w[: longest - 2] for w in words]
    length = max(len(w) for w in words) + 2
    parts: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(words), 512):
        for pool, states in pool_states(*_states(words[first : first + 512], length)).items():
            parts.setdefault(pool, []).append(states)
    return Texts(
        captions, {pool: np.concatenate(states) for pool, states in parts.items()}, True,
        f"{HASHED}{WORD_WIDTH}-{longest}", cut=cut,
        empty={pool: states[0] for pool, states in pool_states(*_states([[]], length)).items()},
        mask=np.arange(length)[None, :] < np.asarray([len(w) + 2 for w in words])[:, None],
        states=lambda rows: _states([words[i] for i in rows], length)[0],
    )  # fmt: skip


def longest_of(fingerprint: str) -> int:
    """The longest caption of the hashed tower with this fingerprint. Raises ValueError for another tower's."""
    if not fingerprint.startswith(f"{HASHED}{WORD_WIDTH}-"):
        raise ValueError(
            f"texts of the tower {fingerprint!r}, which is not in the package: give its states to `encode_states`"
        )
    return int(fingerprint.rsplit("-", 1)[-1])


def _states(words: Sequence[Sequence[str]], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(states [T,S,256], mask [T,S], position of the end token [T])."""
    vectors = np.zeros((len(words), length, WORD_WIDTH), np.float32)
    vectors[:, 0] = _hashed("<start>")
    eos = np.asarray([len(w) + 1 for w in words])
    for row, own in enumerate(words):
        for position, word in enumerate(own, 1):
            vectors[row, position] = word_vector(word)
        vectors[row, eos[row]] = _hashed("<end>")
    return causal_states(vectors), np.arange(length)[None, :] <= eos[:, None], eos
