"""Feature caches by name: what `data.source` means for mixtures of prompts.

'synthetic_modes'       the synthetic sets with known modes
'cache'                 the user's own .npz (data.root), see `prompts_cache`
'fashion_superclasses'  Fashion-MNIST pixels (data.root: its archive), 3 superclasses whose members are the hidden modes
'grocery'               the embedded photographs' pixels; class 'fine' (81) or 'coarse' (43, the fine ones as modes)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from protojax.data import embedded
from protojax.data.npz import open_npz
from protojax.data.prompts_cache import FeatureCache, Features, check_cache, open_cache, with_base
from protojax.data.prompts_synthetic import synthetic_modes
from protojax.data.records import Records

FASHION = {
    "upper body": ("T-shirt/top", "Pullover", "Coat", "Shirt"),
    "footwear": ("Sandal", "Sneaker", "Ankle boot"),
    "other": ("Trouser", "Dress", "Bag"),
}


def open_synthetic(*, seed: int, preset: str = "standard", base: str = "text", xor: float = 0.5, classes: int = 0,
                   train: int = 0, test: int = 0, width: int = 512) -> FeatureCache:  # fmt: skip
    """A synthetic cache; classes, train, test: other sizes than the preset's (0: the preset's)."""
    changes = {k: v for k, v in {"classes": classes, "train": train, "test": test}.items() if v}
    return with_base(synthetic_modes(preset, seed=seed, width=width, xor=xor, **changes), base)


def open_file(*, root: str | Path | None, seed: int, base: str = "text", normalise: bool = False,
              drop_empty_classes: bool = False, fingerprint: str = "") -> FeatureCache:  # fmt: skip
    """The user's own cache."""
    if not root:
        raise ValueError("data source 'cache' needs data.root, the path of your feature cache (.npz)")
    cache = open_cache(root, normalise=normalise, fingerprint=fingerprint)
    return with_base(check_cache(cache, drop_empty_classes=drop_empty_classes), base, seed=seed)


def open_fashion(*, root: str | Path | None, seed: int, base: str = "class_mean", train: int = 600,
                 test: int = 200) -> FeatureCache:  # fmt: skip
    """Unit pixels [784] of Fashion-MNIST; train, test: images of each of the ten modes."""
    if not root:
        raise ValueError("data source 'fashion_superclasses' needs data.root, the archive fashion_mnist_28.npz")
    names = tuple(FASHION)
    splits, found = {}, {}
    for split, number in (("train", train), ("test", test)):
        records = open_npz(root, split)
        fine = records.classes["fine"]
        rows = _first(records.labels["fine"], number)
        group, mode = np.zeros(len(fine), np.int32), np.zeros(len(fine), np.int32)
        for c, members in enumerate(FASHION.values()):
            for m, member in enumerate(members):
                group[fine.index(member)], mode[fine.index(member)] = c, m
        found[split] = records, rows
        label = records.labels["fine"][rows]
        splits[split] = Features(_pixels(records, rows, grey=True), group[label], mode[label])

    def pictures(split: str, rows: np.ndarray) -> np.ndarray:
        records, kept = found[split]
        return _colour(records.take(kept[rows])["image"])

    cache = FeatureCache("fashion_superclasses", splits, None, names, pictures=pictures,
                         mode_names=tuple(FASHION.values()))  # fmt: skip
    return with_base(check_cache(cache), base, seed=seed)


def open_grocery(*, seed: int, base: str = "class_mean", label: str = "coarse", side: int = 16) -> FeatureCache:
    """Unit pixels of the embedded photographs, averaged to side x side; label 'fine' or 'coarse'."""
    if label not in ("fine", "coarse"):
        raise ValueError(f"data source 'grocery', label: expected 'fine' or 'coarse', got {label!r}.")
    splits: dict[str, Features] = {}
    to_coarse = embedded.hierarchy().class_to_coarse
    records = {split: embedded.open_embedded(split) for split in ("train", "test")}
    for split, found in records.items():
        fine = found.labels["fine"]
        rank = np.asarray([int((to_coarse[:c] == to_coarse[c]).sum()) for c in range(len(to_coarse))], np.int32)
        mode = rank[fine] if label == "coarse" else None
        splits[split] = Features(_pixels(found, np.arange(found.size), side=side),
                                 found.labels[label].astype(np.int32), mode)  # fmt: skip
    names = records["train"].classes[label]
    coarse = records["train"].classes["coarse"]
    levels = {"coarse": tuple(coarse[c] for c in to_coarse)} if label == "fine" else {}
    fine_names = records["train"].classes["fine"]
    members = tuple(tuple(n for n, c in zip(fine_names, to_coarse, strict=True) if c == g) for g in range(len(names)))
    cache = FeatureCache(
        f"grocery_{label}", splits, None, names, levels,
        pictures=lambda split, rows: _colour(records[split].take(rows)["image"]),
        descriptions=embedded.hierarchy().descriptions if label == "fine" else (),
        mode_names=members if label == "coarse" else (),
    )  # fmt: skip
    return with_base(check_cache(cache), base, seed=seed)


SOURCES: dict[str, Callable[..., FeatureCache]] = {
    "synthetic_modes": open_synthetic,
    "cache": open_file,
    "fashion_superclasses": open_fashion,
    "grocery": open_grocery,
}


def _first(labels: np.ndarray, number: int) -> np.ndarray:
    """Rows of the first `number` images of each class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:number] for c in np.unique(labels)]))


def _colour(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W,3] of images with one or three channels."""
    return images if images.shape[-1] == 3 else np.repeat(images[..., :1], 3, axis=-1)


def _pixels(records: Records, rows: np.ndarray, *, side: int | None = None, grey: bool = False) -> np.ndarray:
    images = records.take(rows)["image"].astype(np.float32) / 255.0
    if grey:
        images = images[..., :1]
    if side is not None:
        height = images.shape[1] // side
        images = images.reshape(len(images), side, height, side, height, images.shape[-1]).mean(axis=(2, 4))
    flat = images.reshape(len(images), -1)
    return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True), np.float32)
