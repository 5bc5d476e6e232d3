"""Image-text pairs in NumPy archives: the embedded emoji, emoji of several styles, game tiles, groceries, and
caches."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from protojax.data.embedded import hierarchy, open_embedded
from protojax.data.npz import _open_archive, open_npz
from protojax.data.pairs import Pairs, Texts, distinct, image_content, token_content, warn_of_false_negatives
from protojax.data.pairs_text import hashed_texts

_ASSETS = importlib.resources.files("protojax.data") / "assets"
STYLES = ("noto", "twemoji", "openmoji", "emojitwo")


@functools.cache
def open_emoji(split: str, *, flags: bool = True) -> Pairs:
    """The embedded pairs: Noto emoji, 64x64, with their Unicode names; 'train' 1,523, 'test' 377 (concepts that
    training does not have: new captions). flags=False leaves the group Flags out (a country's flag is not guessable).

    Noto Emoji: Apache-2.0 (assets/EMOJI_LICENSE.txt). Raises ValueError for another split."""
    if split not in ("train", "test"):
        raise ValueError(f"emoji has no split {split!r}; it has: train, test")
    with (_ASSETS / "emoji_noto.npz").open("rb") as file:
        records = open_npz(file, split, on_corrupt="error", name="emoji")
    with (_ASSETS / "emoji_noto.npz").open("rb") as file, np.load(file, allow_pickle=False) as archive:
        captions, group = archive[f"{split}_captions"].astype(str), archive[f"{split}_group"].astype(str)
    keep = np.flatnonzero((group != "Flags") | flags)
    content = np.concatenate([records.read(np.arange(records.size))[0]["image"]])[keep]
    return _images(f"emoji/{split}", content, captions[keep])


def open_emoji_styles(
    root: str, split: str, *, train_styles: tuple[str, ...] = STYLES[:3], test_styles: tuple[str, ...] = STYLES[3:],
    protocol: str = "cross_style", flags: bool = True,
) -> Pairs:  # fmt: skip
    """Emoji in several drawing styles: `root` holds emoji_STYLE_64.npz files (arrays images, concept, and the concept
    table concept_captions, concept_group, concept_is_test).

    protocol 'cross_style': 'train' is every concept in `train_styles`, 'test' every concept in `test_styles`: known
    captions, unseen style. 'unseen_captions': 'train' is the concepts of concept_is_test = False in `train_styles`,
    'test' the others in `test_styles`. Raises ValueError for an unknown protocol, split, style or missing file.
    """
    if split not in ("train", "test"):
        raise ValueError(f"emoji_styles has no split {split!r}; it has: train, test")
    if protocol not in ("cross_style", "unseen_captions"):
        raise ValueError(f"protocol must be 'cross_style' or 'unseen_captions', got {protocol!r}")
    images, captions = [], []
    for style in train_styles if split == "train" else test_styles:
        if style not in STYLES:
            raise ValueError(f"unknown emoji style {style!r}; known: {', '.join(STYLES)}")
        with _open_archive(Path(root) / f"emoji_{style}_64.npz") as archive:
            concept, group = archive["concept"], archive["concept_group"].astype(str)
            keep = np.ones(len(concept), bool) if flags else group[concept] != "Flags"
            if protocol == "unseen_captions":
                keep &= archive["concept_is_test"][concept] == (split == "test")
            images.append(archive["images"][keep])
            captions.append(archive["concept_captions"].astype(str)[concept[keep]])
    return _images(f"emoji/{protocol}/{split}", np.concatenate(images), np.concatenate(captions))


@functools.cache
def open_grocery(split: str) -> Pairs:
    """The embedded grocery photographs with the product description of their class (81 texts), labels 'fine' and
    'coarse': a class-level set. 'classes': one example a class, in label order (for zero-shot classification)."""
    if split == "classes":
        texts = hashed_texts(hierarchy().descriptions)
        blank = np.zeros((len(texts.captions), 64, 64, 3), np.uint8)
        shapes, read = image_content(blank, "grocery/classes")
        own = tuple(np.asarray([i], np.int32) for i in range(len(texts.captions)))
        return Pairs("grocery/classes", len(own), shapes, read, own, texts)
    records = open_embedded(split)
    texts = hashed_texts(hierarchy().descriptions)
    caption = tuple(np.asarray([label], np.int32) for label in records.labels["fine"])
    shapes = {"image": records.shapes["image"]}
    return Pairs(f"grocery/{split}", records.size, shapes, records.read, caption, texts, records.labels,
                 records.classes,                 records.problems)  # fmt: skip


def open_pairs_npz(root: str, split: str) -> Pairs:
    """Pairs of one .npz archive. Images: `images` uint8 [M,H,W,3], or frozen tokens `image_tokens` [M,N,D] with
    `image_mask` [M,N]. Text: `captions` [M] strings, or states of a frozen tower, pooled: `text_eos_state`,
    `text_mean`, `text_bos` [M,D] (any of them), with `caption_id` [M] where captions repeat. Splits: `is_test` bool
    [M] ('train', 'test'), or none ('all'); `fingerprint` names the towers, `causal` says whether position 0 sees the
    caption.

    Raises ValueError for missing arrays, other lengths and an unknown split.
    """
    name = Path(root).stem
    with _open_archive(root) as archive:
        arrays = {key: archive[key] for key in archive.files if key in _KEYS}
    side = "images" if "images" in arrays else "image_tokens"
    if side not in arrays:
        raise ValueError(f"{name} holds neither 'images' nor 'image_tokens'; it holds {sorted(arrays)}")
    size = len(arrays[side])
    for key, value in arrays.items():
        if value.ndim and len(value) != size:
            raise ValueError(f"{name}: {size} images but {len(value)} entries of {key!r}: the pairs are out of step")
    if "is_test" not in arrays and split != "all":
        raise ValueError(f"{name} has no split {split!r}: it has no array 'is_test', only the split 'all'")
    if "is_test" in arrays and split not in ("train", "test"):
        raise ValueError(f"{name} has no split {split!r}; it has: train, test")
    rows = np.arange(size) if split == "all" else np.flatnonzero(arrays["is_test"].astype(bool) == (split == "test"))
    own = {key: value[rows] if value.ndim else value for key, value in arrays.items()}
    name = f"{name}/{split}"
    if "captions" in own:
        if side == "images":
            return _images(name, own["images"], own["captions"].astype(str))
        captions, caption = distinct([[c] for c in own["captions"].astype(str)], name)
        texts = hashed_texts(captions)
    else:
        texts, caption = _cached_texts(own, name)
    content = image_content(own[side], name) if side == "images" else token_content(
        own[side], own.get("image_mask"), name
    )  # fmt: skip
    return Pairs(name, len(rows), *content, caption, texts)


_KEYS = ("images", "image_tokens", "image_mask", "captions", "text_eos_state", "text_mean", "text_bos", "caption_id",
         "is_test", "fingerprint", "causal")  # fmt: skip
_POOLS = {"text_eos_state": "eos", "text_mean": "mean", "text_bos": "bos"}


def _cached_texts(own: dict[str, np.ndarray], name: str) -> tuple[Texts, tuple[np.ndarray, ...]]:
    pooled = {pool: own[key].astype(np.float32) for key, pool in _POOLS.items() if key in own}
    if not pooled:
        raise ValueError(f"{name} holds no text: give 'captions', or pooled states ({', '.join(_POOLS)})")
    size = len(next(iter(pooled.values())))
    ids = np.asarray(own.get("caption_id", np.arange(size)))
    if "caption_id" not in own:
        states = next(iter(pooled.values()))
        warn_of_false_negatives(name, [row.tobytes() for row in states])  # type: ignore[misc]
    _, first, number = np.unique(ids, return_index=True, return_inverse=True)
    texts = Texts(
        tuple(f"caption {ids[i]}" for i in first), {pool: states[first] for pool, states in pooled.items()},
        bool(own.get("causal", True)), str(own.get("fingerprint", "unnamed")),
    )  # fmt: skip
    return texts, tuple(np.asarray([i], np.int32) for i in number)


def _images(name: str, images: np.ndarray, captions: Sequence[str] | np.ndarray) -> Pairs:
    texts, caption = distinct([[str(c)] for c in captions], name)
    shapes, read = image_content(images, name)
    return Pairs(name, len(images), shapes, read, caption, hashed_texts(texts))
