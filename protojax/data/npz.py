"""NumPy archives as records: plain image arrays, or JPEG files packed into one byte array.

Array names, for a split called `train` (docs/data.md):

    train_images [M,H,W,3] uint8 (or [M,H,W,1], [M,H,W])      or
    train_jpeg uint8 [bytes], train_offsets int64 [M+1]       image i = jpeg[offsets[i]:offsets[i+1]]
    train_labels [M]; train_coarse_labels [M], any train_<key>_labels [M]            optional
    class_names [C], coarse_names, <key>_names; or train_class_names of that split   optional
    <subset>_idx                                              optional: indices into train
    train_<key> [M] integers                                  optional: what 'train[key<=15]' chooses rows by
    images, labels, <key>_labels                              without a prefix: an archive with one split, 'all'
"""

from __future__ import annotations

import operator
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from protojax.data import decode
from protojax.data.records import Records, from_arrays, image_shapes, make_records, restrict
from protojax.data.records import subset as take_subset

SINGLE_SPLIT = "all"
_WHERE = re.compile(r"(?P<split>[^\[\]]+)\[(?P<key>\w+)(?P<sign><=|>=|==|!=|<|>)(?P<value>-?\d+)\]")
_SIGNS = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip


def open_npz(
    root: str | Path | IO[bytes],
    split: str,
    *,
    subset: str | None = None,
    on_corrupt: decode.OnCorrupt = "skip",
    cache: bool = True,
    name: str | None = None,
) -> Records:
    """One split of an .npz archive laid out as above. 'fine' are the labels in `<split>_labels`.

    subset: take only the training images listed in `<subset>_idx`, and of every split only the classes that
    occur among those, relabelled 0, 1, ... in the same way in every split. JPEG images are decoded on first use
    and kept (`cache`); `on_corrupt` says whether a damaged one is skipped or fatal.
    'SPLIT[key<=15]' (also >=, ==, !=, <, >) are the rows of SPLIT whose `SPLIT_key` is in that range, an array of one
    integer an image: one split of a file becomes two that share their classes, as Omniglot by the hand that drew.

    Raises ValueError for a missing or unreadable file, split, index list or array of the wrong shape or dtype.
    """
    name = name or (Path(root).stem if isinstance(root, str | Path) else "npz")
    with _open_archive(root) as archive:
        splits = _splits(archive.files)
        if where := _WHERE.fullmatch(split):
            if subset is not None:
                raise ValueError(f"{name}: a split with a condition ({split!r}) and a subset exclude one another")
            whole = open_npz(root, where["split"], on_corrupt=on_corrupt, cache=cache, name=name)
            return take_subset(whole, _where(archive, name, where, whole.size), f"{name}/{split}")
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(splits) or 'no images at all'}")
        records = _open_split(archive, f"{name}/{split}", split, on_corrupt, cache)
        if subset is None:
            return records
        indices, keep = _subset_classes(archive, name, subset)
    if split == "train":
        records = take_subset(records, indices)
    return restrict(records, {k: v for k, v in keep.items() if k in records.labels}, f"{name}:{subset}/{split}")


def _open_archive(root: str | Path | IO[bytes]) -> np.lib.npyio.NpzFile:
    if isinstance(root, str | Path) and not Path(root).is_file():
        raise ValueError(f"no such file: {root}; data.root must be the path of an .npz archive")
    try:
        archive = np.load(root, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{root} is not a readable .npz archive ({error}); copy or build it again") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{root} holds a single array; save images and labels together with np.savez")
    return archive


def _read(archive: np.lib.npyio.NpzFile, key: str, name: str) -> np.ndarray:
    try:
        return np.asarray(archive[key])
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: array {key!r} cannot be read ({error}); the archive is damaged") from error


def _splits(keys: list[str]) -> list[str]:
    found = [key.removesuffix(end) for key in keys for end in ("_images", "_jpeg") if key.endswith(end)]
    found = [s for s in dict.fromkeys(found) if s != "iconic"]  # product pictures of the Grocery Store set: no split
    return found + ([SINGLE_SPLIT] if {"images", "jpeg"} & set(keys) else [])


def _open_split(
    archive: np.lib.npyio.NpzFile, name: str, split: str, on_corrupt: decode.OnCorrupt, cache: bool
) -> Records:
    prefix = "" if split == SINGLE_SPLIT and f"{split}_images" not in archive.files else f"{split}_"
    labels = _labels(archive, prefix, name)
    classes = _classes(archive, prefix, labels, name)
    if f"{prefix}images" in archive.files:
        return from_arrays(name, _read(archive, f"{prefix}images", name), labels, classes)
    if f"{prefix}offsets" not in archive.files:
        raise ValueError(
            f"{name}: array '{prefix}jpeg' needs '{prefix}offsets' (int64, one more than images) beside it"
        )
    data, offsets = _read(archive, f"{prefix}jpeg", name), _read(archive, f"{prefix}offsets", name).astype(np.int64)
    return _packed(name, data, offsets, labels, classes, on_corrupt, cache)


def _packed(
    name: str,
    data: np.ndarray,
    offsets: np.ndarray,
    labels: Mapping[str, np.ndarray],
    classes: Mapping[str, tuple[str, ...]],
    on_corrupt: decode.OnCorrupt,
    cache: bool,
) -> Records:
    """Records over image i = data[offsets[i]:offsets[i+1]]; the first one that decodes sets the canvas."""
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"{name}: the packed images must be one uint8 vector, got {data.dtype} {data.shape}")
    if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] < 0 or np.any(np.diff(offsets) < 0):
        raise ValueError(f"{name}: offsets must be an ascending vector of one more entry than images")
    if offsets[-1] > len(data):
        raise ValueError(f"{name}: offsets end at {offsets[-1]}, but there are only {len(data)} bytes of images")
    size = len(offsets) - 1

    def contents(row: int) -> bytes:
        return data[offsets[row] : offsets[row + 1]].tobytes()

    canvas = decode.first_size(contents, size, name)
    reader = decode.ImageReader(
        lambda row: decode.decode(contents(row), *canvas),
        lambda row: f"{name}[{row}]",
        size,
        canvas,
        on_corrupt=on_corrupt,
        cache=cache,
    )
    return make_records(name, size, image_shapes(*canvas), reader, labels, classes, reader.problems)


def _labels(archive: np.lib.npyio.NpzFile, prefix: str, name: str) -> dict[str, np.ndarray]:
    longer = tuple(f"{split}_" for split in _splits(archive.files) if len(split) + 1 > len(prefix))
    labels = {}
    for key in archive.files:
        if key == f"{prefix}labels":
            labels["fine"] = _read(archive, key, name)
        elif key.startswith(prefix) and key.endswith("_labels") and not key.startswith(longer):
            # `longer`: train_mini_labels belongs to the split train_mini, it is not the label 'mini' of train
            labels[key.removeprefix(prefix).removesuffix("_labels")] = _read(archive, key, name)
    return dict(sorted(labels.items(), key=lambda item: item[0] != "fine"))


def _classes(
    archive: np.lib.npyio.NpzFile, prefix: str, labels: Mapping[str, np.ndarray], name: str
) -> dict[str, tuple[str, ...]]:
    classes = {}
    for key in labels:
        stem = "class_names" if key == "fine" else f"{key}_names"
        for candidate in (f"{prefix}{stem}", stem):
            if candidate in archive.files:
                classes[key] = tuple(str(c) for c in _read(archive, candidate, name))
                break
    return classes


def _where(archive: np.lib.npyio.NpzFile, name: str, where: re.Match[str], size: int) -> np.ndarray:
    """Rows of the split that fulfil its condition."""
    key = f"{where['split']}_{where['key']}"
    if key not in archive.files:
        prefix = f"{where['split']}_"
        known = [k.removeprefix(prefix) for k in archive.files if k.startswith(prefix)]
        raise ValueError(f"{name} has no array {key!r} to choose rows by; it has: {', '.join(known)}")
    values = _read(archive, key, name)
    if values.shape != (size,) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name}: {key!r} must hold one integer an image ({size}), got {values.dtype} {values.shape}")
    rows = np.flatnonzero(_SIGNS[where["sign"]](values, int(where["value"])))
    if not rows.size:
        raise ValueError(f"{name}: no image fulfils {where[0]!r}; {key} goes from {values.min()} to {values.max()}")
    return rows


def _subset_classes(archive: np.lib.npyio.NpzFile, name: str, subset: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The training indices of a subset, and for each label key the classes that occur among them."""
    key = f"{subset}_idx"
    if key not in archive.files:
        lists = [k.removesuffix("_idx") for k in archive.files if k.endswith("_idx")]
        raise ValueError(f"{name} has no index list {subset!r}; it has: {', '.join(lists) or 'none'}")
    labels = _labels(archive, "train_", name)
    if "fine" not in labels:
        raise ValueError(f"{name}: the index list {subset!r} needs 'train_labels' to tell which classes it holds")
    indices = _read(archive, key, name).astype(np.int64)
    size = len(labels["fine"])
    if not indices.size or np.min(indices) < 0 or np.max(indices) >= size:
        raise ValueError(f"{name}: the index list {subset!r} must hold indices in 0..{size - 1} of the train split")
    return indices, {k: np.unique(values[indices]) for k, values in labels.items()}
