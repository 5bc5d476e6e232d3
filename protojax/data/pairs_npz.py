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
from protojax.data.pairs_text import hashed_texts, pool_states

_ASSETS = importlib.resources.files("protojax.data") / "assets"
PRODUCT_TEXT = 96  # positions: the longest product description has 91 words
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
    'coarse': a class-level set. 'classes', 'class_names': one example a class, in label order, with its description or
    its name (for zero-shot classification)."""
    if split in ("classes", "class_names"):
        names = open_embedded("test").classes["fine"]
        chosen = hierarchy().descriptions if split == "classes" else [n.replace("-", " ") for n in names]
        texts = hashed_texts(chosen, longest=PRODUCT_TEXT)
        blank = np.zeros((len(texts.captions), 64, 64, 3), np.uint8)
        shapes, read = image_content(blank, f"grocery/{split}")
        own = tuple(np.asarray([i], np.int32) for i in range(len(texts.captions)))
        return Pairs(f"grocery/{split}", len(own), shapes, read, own, texts)
    records = open_embedded(split)
    texts = hashed_texts(hierarchy().descriptions, longest=PRODUCT_TEXT)
    caption = tuple(np.asarray([label], np.int32) for label in records.labels["fine"])
    shapes = {"image": records.shapes["image"]}
    return Pairs(f"grocery/{split}", records.size, shapes, records.read, caption, texts, records.labels,
                 records.classes, records.problems)  # fmt: skip


def open_pairs_npz(root: str, split: str) -> Pairs:
    """Pairs of one .npz archive. Images: `images` uint8 [M,H,W,3], or frozen tokens `image_tokens` [M,N,D] with
    `image_mask` [M,N]. Text: `captions` [M] strings, or states of a frozen tower: at every position, `text_hidden`
    [M,S,D] with `text_mask` bool [M,S] and `text_eos` int [M] (position of the end token; without it there is no pool
    'eos'), or pooled, `text_eos_state`, `text_mean`, `text_bos` [M,D] (any of them); with `caption_id` [M] where
    captions repeat. Splits: `is_test` bool [M] ('train', 'test'), or none ('all'); `fingerprint` names the towers,
    `causal` says that position 0 cannot see the caption.

    Raises ValueError for missing arrays, other lengths, captions of padding alone and an unknown split.
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


_KEYS = ("images", "image_tokens", "image_mask", "captions", "text_hidden", "text_mask", "text_eos", "text_eos_state",
         "text_mean", "text_bos", "caption_id", "is_test", "fingerprint", "causal")  # fmt: skip
_POOLS = {"text_eos_state": "eos", "text_mean": "mean", "text_bos": "bos"}


def _cached_texts(own: dict[str, np.ndarray], name: str) -> tuple[Texts, tuple[np.ndarray, ...]]:
    hidden = own.get("text_hidden")
    pooled = {pool: own[key].astype(np.float32) for key, pool in _POOLS.items() if key in own}
    if not pooled and hidden is None:
        raise ValueError(
            f"{name} holds no text: give 'captions', 'text_hidden', or pooled states ({', '.join(_POOLS)})"
        )
    states = next(iter(pooled.values())) if pooled else hidden
    assert states is not None
    ids = np.asarray(own.get("caption_id", np.arange(len(states))))
    if "caption_id" not in own:
        warn_of_false_negatives(name, [row.tobytes() for row in states])  # type: ignore[misc]
    _, first, number = np.unique(ids, return_index=True, return_inverse=True)
    made = {pool: rows[first] for pool, rows in pooled.items()}
    if hidden is not None:
        made = {**_pooled_hidden(hidden, own, first, name), **made}
    texts = Texts(
        tuple(f"caption {ids[i]}" for i in first), made, bool(own.get("causal", True)),
        str(own.get("fingerprint", "unnamed")), mask=None if hidden is None else own["text_mask"][first].astype(bool),
        states=None if hidden is None else lambda rows: hidden[first[rows]].astype(np.float32),
    )  # fmt: skip
    return texts, tuple(np.asarray([i], np.int32) for i in number)


def _pooled_hidden(
    hidden: np.ndarray, own: dict[str, np.ndarray], rows: np.ndarray, name: str
) -> dict[str, np.ndarray]:
    """Every pool of the states of these rows that the archive allows."""
    mask = own.get("text_mask")
    if hidden.ndim != 3 or mask is None or mask.shape != hidden.shape[:2]:
        given = "none" if mask is None else list(mask.shape)
        raise ValueError(
            f"{name}: text_hidden must be [M,S,D] with text_mask [M,S]; got {list(hidden.shape)} and {given}"
        )
    blank = np.flatnonzero(~mask.astype(bool).any(axis=1))
    if blank.size:
        raise ValueError(f"{name}: {blank.size} captions hold padding alone, the first are {blank[:5].tolist()}")
    eos = own.get("text_eos")
    if eos is not None:
        outside = np.flatnonzero((eos < 0) | (eos >= mask.shape[1]))
        beside = outside if outside.size else np.flatnonzero(~mask.astype(bool)[np.arange(len(eos)), eos])
        if beside.size:
            raise ValueError(f"{name}: text_eos names no valid position in {beside.size} rows, the first are "
                             f"{beside[:5].tolist()}")  # fmt: skip
    at = np.zeros(len(hidden), np.int64) if eos is None else eos.astype(np.int64)
    pools = pool_states(hidden[rows].astype(np.float32), mask[rows].astype(bool), at[rows])
    return {pool: states for pool, states in pools.items() if pool != "eos" or eos is not None}


def _images(name: str, images: np.ndarray, captions: Sequence[str] | np.ndarray) -> Pairs:
    texts, caption = distinct([[str(c)] for c in captions], name)
    shapes, read = image_content(images, name)
    return Pairs(name, len(images), shapes, read, caption, hashed_texts(texts))
