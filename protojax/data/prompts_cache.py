"""Frozen features with labels: what mixtures of prompts learn from.

One archive (.npz) holds everything, so that a user's own tower can fill it:

    image [N,D] float16 or float32     unit rows (or data.normalise=True)
    label [N] integers in 0..C-1
    base [C,D]                         text feature of each class; optional (see `with_base`)
    class_names [C] text
    split [N] text                     'train', 'test', 'val', ...; optional: all rows are 'train' and 'test'
    mode [N] integers                  what a sub-prompt should find, for evaluation alone; optional
    level_<name> [C] text              a coarser level of the hierarchy, such as genus; optional
    fingerprint text                   encoder and preprocessing that made the features; optional
    about text                         JSON: from which data, weights and templates; optional
    description [C] text, mode_name [C,M] text ('' beyond a class's modes): for reports; optional
    thumbnail [N,h,w,3] uint8          small pictures for reports, or
    path [N] text                      their files, absolute or relative to the archive; optional, read when drawn
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protojax.config import suggest
from protojax.data.prompts_thumbnails import PATH, THUMBNAIL, of_archive

NORM_TOLERANCE = 1e-2  # float16 rows of a unit vector in 512 dimensions differ from 1 by at most 5e-4


class Features(NamedTuple):
    """image float32 [N,D], unit rows; label int32 [N]; mode int32 [N], numbered within a class, or None."""

    image: np.ndarray
    label: np.ndarray
    mode: np.ndarray | None = None


class Tower(NamedTuple):
    """A frozen image tower that runs in the step. variables: its weights; side: S of the pictures that it reads.

    features(variables, key, images uint8 [B,S,S,3]) -> unit float32 [B,D]; key: of random views, where there are any.
    """

    variables: Any
    side: int
    features: Callable[[Any, Any, Any], Any]


class FeatureCache(NamedTuple):
    """splits by name; base float32 [C,D] or None; class_names [C]; levels: name -> coarser class of each class.

    For reports: pictures(split, rows) -> uint8 [n,h,w,3]; descriptions [C]; mode_names: of each class's modes. tower:
    what reads these pictures in the step (None: features are looked up)."""

    name: str
    splits: Mapping[str, Features]
    base: np.ndarray | None
    class_names: tuple[str, ...]
    levels: Mapping[str, tuple[str, ...]] = {}
    fingerprint: str = ""
    about: str = ""
    pictures: Callable[[str, np.ndarray], np.ndarray] | None = None
    descriptions: tuple[str, ...] = ()
    mode_names: tuple[tuple[str, ...], ...] = ()
    tower: Tower | None = None

    def split(self, name: str) -> Features:
        """One split. Raises ValueError with the known ones."""
        if name not in self.splits:
            raise ValueError(f"{self.name} has no split {name!r}{suggest(name, self.splits)}; it has: "
                             f"{', '.join(self.splits)}.")  # fmt: skip
        return self.splits[name]


# ------------------------------------------------------------------------------------------------ reading
def open_cache(path: str | Path, *, normalise: bool = False, fingerprint: str = "") -> FeatureCache:
    """Read an archive laid out as above and check it with `check_cache`.

    normalise: divide rows by their norms instead of refusing them. fingerprint: what is expected to have made the
    features; '' accepts any. Raises ValueError for a missing, damaged or incomplete file and for another fingerprint.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"no such feature cache: {path}; fill one with `protojax embed`, or save one with save_cache")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if key != THUMBNAIL}
            drawn = THUMBNAIL in archive.files or PATH in archive.files
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz archive ({error}); write it again") from error
    missing = [key for key in ("image", "label", "class_names") if key not in arrays]
    if missing:
        raise ValueError(f"{path}: arrays {missing} are missing; it has {sorted(arrays)} (docs/prompts.md)")
    made_by = str(arrays["fingerprint"]) if "fingerprint" in arrays else ""
    if fingerprint and fingerprint != made_by:
        raise ValueError(f"{path} was made by {made_by!r}, expected {fingerprint!r}: fill the cache again")
    parts = arrays.get("split", np.full(len(arrays["label"]), "train"))
    mode = arrays.get("mode")
    splits = {}
    for name in dict.fromkeys(str(s) for s in parts):
        rows = parts == name
        splits[name] = Features(arrays["image"][rows].astype(np.float32), arrays["label"][rows].astype(np.int32),
                                None if mode is None else mode[rows].astype(np.int32))  # fmt: skip
    if "split" not in arrays:
        splits["test"] = splits["train"]
    levels = {k.removeprefix("level_"): tuple(str(v) for v in arrays[k]) for k in arrays if k.startswith("level_")}
    names = tuple(str(n) for n in arrays["class_names"])
    base = arrays["base"].astype(np.float32) if "base" in arrays else None
    about = str(arrays["about"]) if "about" in arrays else ""
    pictures = of_archive(path, parts) if drawn else None
    descriptions = tuple(str(d) for d in arrays.get("description", ()))
    modes = tuple(tuple(str(n) for n in own if str(n)) for own in arrays.get("mode_name", ()))
    cache = FeatureCache(path.stem, splits, base, names, levels, made_by, about, pictures, descriptions, modes)
    return check_cache(normalised(cache) if normalise else cache)


def save_cache(
    path: str | Path, cache: FeatureCache, dtype: type = np.float16, drawn: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write a cache as one archive; features as `dtype`. drawn: `thumbnail` or `path` of all rows, split by split."""
    parts = list(cache.splits.items())
    arrays = {
        "image": np.concatenate([f.image for _, f in parts]).astype(dtype),
        "label": np.concatenate([f.label for _, f in parts]),
        "split": np.concatenate([np.full(len(f.label), name) for name, f in parts]),
        "class_names": np.asarray(cache.class_names),
        "fingerprint": np.asarray(cache.fingerprint),
        "about": np.asarray(cache.about),
        **{f"level_{name}": np.asarray(values) for name, values in cache.levels.items()},
        **(drawn or {}),
    }
    if cache.base is not None:
        arrays["base"] = cache.base.astype(np.float32)
    if cache.descriptions:
        arrays["description"] = np.asarray(cache.descriptions)
    if cache.mode_names:
        most = max(map(len, cache.mode_names))
        arrays["mode_name"] = np.asarray([[*own, *[""] * (most - len(own))] for own in cache.mode_names])
    if all(f.mode is not None for _, f in parts):
        arrays["mode"] = np.concatenate([np.asarray(f.mode) for _, f in parts])
    np.savez(path, **arrays)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- checking
def check_cache(cache: FeatureCache, *, train: str = "train", drop_empty_classes: bool = False) -> FeatureCache:
    """The cache, if what it holds can be learned from.

    drop_empty_classes: leave classes without an image in the split `train` out (labels are renumbered) instead of
    raising. Raises ValueError for rows that are not finite, zero or not of unit length, widths that differ, labels out
    of range, duplicate class names, levels of another length and classes without training image.
    """
    count = len(cache.class_names)
    repeated = sorted({n for n in cache.class_names if cache.class_names.count(n) > 1}) if count < 20_000 else []
    if len(set(cache.class_names)) != count:
        raise ValueError(f"{cache.name}: class names repeat: {repeated[:5]}; give each class a name of its own.")
    for name, values in cache.levels.items():
        if len(values) != count:
            raise ValueError(f"{cache.name}: level {name!r} names {len(values)} classes, expected {count}.")
    for name, features in cache.splits.items():
        _check_rows(f"{cache.name}/{name}", "image", features.image)
        labels = np.unique(features.label)
        if len(features.label) != len(features.image):
            raise ValueError(f"{cache.name}/{name}: {len(features.image)} images but {len(features.label)} labels.")
        wrong = labels[(labels < 0) | (labels >= count)]
        if wrong.size:
            raise ValueError(f"{cache.name}/{name}: labels {wrong[:5].tolist()} lie outside 0..{count - 1}.")
        if cache.base is not None and cache.base.shape != (count, features.image.shape[1]):
            raise ValueError(
                f"{cache.name}/{name}: image features have shape {features.image.shape}, base has {cache.base.shape}, "
                f"expected [{count}, {features.image.shape[1]}]; features come from different models?"
            )
    if cache.base is not None:
        _check_rows(cache.name, "base", cache.base)
    empty = np.flatnonzero(np.bincount(cache.split(train).label, minlength=count) == 0)
    if empty.size and not drop_empty_classes:
        names = [cache.class_names[c] for c in empty[:5]]
        raise ValueError(f"{cache.name}: {empty.size} classes have no image in {train!r}, first {names}; set "
                         "data.drop_empty_classes=True to leave them out.")  # fmt: skip
    return _without(cache, set(empty.tolist())) if empty.size else cache


def warn_small_classes(cache: FeatureCache, count: int, train: str = "train") -> int:
    """How many classes have fewer than `count` = K training images; one warning names them."""
    sizes = np.bincount(cache.split(train).label, minlength=len(cache.class_names))
    small = np.flatnonzero(sizes < count)
    if small.size:
        warnings.warn(
            f"{small.size} classes have fewer than K = {count} training images (first: {cache.class_names[small[0]]!r} "
            f"with {sizes[small[0]]}): their sub-prompts beyond that start from noise.",
            stacklevel=2,
        )
    return int(small.size)


def normalised(cache: FeatureCache) -> FeatureCache:
    """Image and base rows divided by their norms (zero and non-finite rows stay and are found by `check_cache`)."""

    def unit(rows: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
        return (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)

    splits = {name: f._replace(image=unit(f.image)) for name, f in cache.splits.items()}
    return cache._replace(splits=splits, base=None if cache.base is None else unit(cache.base))


def _check_rows(where: str, what: str, rows: np.ndarray) -> None:
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"{where}: {what} features must be [N, D] with N > 0, got {rows.shape}.")
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if bad.size:
        raise ValueError(f"{where}: {bad.size} {what} rows are zero or not finite, first {bad[:5].tolist()}.")
    if np.any(np.abs(norms - 1.0) > NORM_TOLERANCE):
        raise ValueError(f"{where}: {what} features: norms {np.min(norms):.3g}..{np.max(norms):.3g}, expected 1; set "
                         "data.normalise=True.")  # fmt: skip


def _without(cache: FeatureCache, dropped: set[int]) -> FeatureCache:
    kept = np.asarray([c for c in range(len(cache.class_names)) if c not in dropped])
    number = np.full(len(cache.class_names), -1, np.int32)
    number[kept] = np.arange(len(kept))
    splits, rows_of = {}, {}
    for name, f in cache.splits.items():
        rows = rows_of[name] = np.flatnonzero(number[f.label] >= 0)
        splits[name] = Features(f.image[rows], number[f.label[rows]], None if f.mode is None else f.mode[rows])
    draw = cache.pictures
    return cache._replace(
        splits=splits,
        pictures=None if draw is None else lambda split, rows: draw(split, rows_of[split][rows]),
        descriptions=tuple(cache.descriptions[int(c)] for c in kept) if cache.descriptions else (),
        mode_names=tuple(cache.mode_names[int(c)] for c in kept) if cache.mode_names else (),
        base=None if cache.base is None else cache.base[kept],
        class_names=tuple(cache.class_names[int(c)] for c in kept),
        levels={k: tuple(v[int(c)] for c in kept) for k, v in cache.levels.items()},
    )


# --------------------------------------------------------------------------------------- what classes look like
def class_means(features: Features, classes: int) -> np.ndarray:
    """Mean feature of each class [C,D] float32: one pass over the rows."""
    order = np.argsort(features.label, kind="stable")
    sizes = np.bincount(features.label, minlength=classes)
    present = np.flatnonzero(sizes)
    starts = np.concatenate([[0], np.cumsum(sizes)])[present]
    sums = np.add.reduceat(features.image[order].astype(np.float64), starts, axis=0)
    means = np.zeros((classes, features.image.shape[1]))
    means[present] = sums / sizes[present, None]
    return means.astype(np.float32)


BASES = ("text", "text_shifted", "class_mean", "gap")


def with_base(cache: FeatureCache, kind: str = "text", *, train: str = "train", seed: int = 0) -> FeatureCache:
    """The cache with another base feature of each class.

    'text'          as it is.
    'text_shifted'  unit(base_c - mean_c base_c + mean image): the modality gap removed.
    'class_mean'    unit(class mean of the images): for sets without a text tower.
    'gap'           unit(0.8 nu + 0.35 mu + 0.35 unit(class mean - mu)), mu the mean image's direction, nu a random unit
                    vector orthogonal to it: class means behind a synthetic modality gap, to reproduce failures.

    Raises ValueError for an unknown kind and for 'text...' without a base.
    """
    if kind not in BASES:
        raise ValueError(f"base: expected one of {list(BASES)}, got {kind!r}{suggest(kind, BASES)}.")
    if kind.startswith("text") and cache.base is None:
        raise ValueError(f"{cache.name} has no text features; use base='class_mean', or fill the cache with `base`.")
    if kind == "text":
        return cache
    features = cache.split(train)
    means = class_means(features, len(cache.class_names))
    overall = features.image.mean(axis=0, dtype=np.float64)
    if kind == "text_shifted":
        base = np.asarray(cache.base, np.float64)
        return cache._replace(base=_unit(base - base.mean(axis=0) + overall))
    if kind == "class_mean":
        return cache._replace(base=_unit(means))
    mu = overall / np.linalg.norm(overall)
    nu = np.random.Generator(np.random.PCG64(seed)).normal(size=len(mu))
    nu -= (nu @ mu) * mu
    nu /= np.linalg.norm(nu)
    return cache._replace(base=_unit(0.8 * nu + 0.35 * mu + 0.35 * _unit(means - overall)))


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
