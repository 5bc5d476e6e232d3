"""Folders of image files as records: root/split/class/*.jpg, root/class/*.jpg, or deeper (iNaturalist)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from protojax.data import decode
from protojax.data.annotations import read_annotations
from protojax.data.records import Records, make_records, subset

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SINGLE_SPLIT = "all"
# A folder of one of these names directly below the root is a split, not a class.
SPLIT_NAMES = ("train", "training", "train_mini", "val", "valid", "validation", "test", "testing")
Labels = Literal["folder", "none"]


def open_image_folder(
    root: str | Path,
    split: str,
    *,
    canvas: int = 256,
    labels: Labels = "folder",
    annotations: str | None = None,
    on_corrupt: decode.OnCorrupt = "skip",
    verify: bool = False,
    cache: bool = False,
    workers: int | None = None,
    fit: decode.Fit = "crop",
    prepare: Callable[[Image.Image], np.ndarray] | None = None,
) -> Records:
    """Image files (jpg, jpeg, png, webp, bmp), decoded when needed to uint8 [canvas,canvas,3].

    Layouts: root/split/class/.../file; or root/class/.../file, which has one split, 'all'. A class is a folder that
    holds image files; its name is the path below the split. When all classes lie two or more levels deep (iNaturalist
    2018: Aves/3019), the first level is the label 'coarse'. Class numbers follow the sorted names of the training split
    (the folder `train`, else the first one whose name starts with 'train', else the split itself), so that they agree
    between splits. Files are in the order of (class, path); names that start with a dot are ignored.

    annotations: instead, the split is the list in this JSON file, relative to the root, '{split}' standing for its name
    ('{split}2018.json'; see `read_annotations`); its file names are relative to the root too.

    canvas: pixels of the stored square. fit: 'crop' scales the short side to `canvas` and cuts out the centre; 'whole'
    keeps everything, with `extent` in the batch, for random crops of the original image (`decode.whole`). labels:
    'none' reads every file below the split and gives no labels. on_corrupt: 'skip' (see `Records.take`) or 'error'.
    verify: decode everything once now, so that damaged files are left out (or fatal) from the start. cache: keep
    decoded images in memory. workers: decoding threads. prepare: makes the stored square of an opened
    image, instead of `fit`.

    Raises ValueError when the root, split or images are missing, a class folder is empty, images stand outside class
    folders, or the split has a class that the training split lacks.
    """
    if labels not in ("folder", "none"):
        raise ValueError(f"labels must be 'folder' or 'none', got {labels!r}")
    if canvas < 1:
        raise ValueError(f"canvas must be at least 1 pixel, got {canvas}")
    root = Path(root)
    if annotations is None:
        base, files, label_arrays, classes = _from_folders(root, split, labels == "folder")
    else:
        _check_root(root)
        base = root
        listed = root / annotations.replace("{split}", split)
        files, label_arrays, classes = read_annotations(listed, with_labels=labels == "folder")
        if not (root / files[0]).is_file():
            raise ValueError(f"{listed} lists {files[0]!r}, which is not below {root}; unpack the images there")
    reader = decode.ImageReader(
        lambda row: (
            decode.prepared(base / files[row], prepare)
            if prepare
            else decode.decode(base / files[row], canvas, canvas, fit)
        ),
        lambda row: str(base / files[row]),
        len(files),
        (canvas, canvas),
        on_corrupt=on_corrupt,
        cache=cache,
        workers=workers,
        how=fit,
    )
    name = f"{root.name}/{split}"
    shapes = decode.content_shapes(canvas, canvas, fit)
    records = make_records(name, len(files), shapes, reader, label_arrays, classes, reader.problems)
    return _verified(records) if verify else records


def image_files(root: str | Path, split: str) -> list[Path]:
    """Files of a split in the order of its records (without `annotations`). Raises what `open_image_folder` does."""
    base, files, _, _ = _from_folders(Path(root), split, True)
    return [base / file for file in files]


def _from_folders(
    root: Path, split: str, with_labels: bool
) -> tuple[Path, list[str], dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """(folder of the split, its files relative to that, labels, class names)."""
    base, reference = _find(root, split)
    found = _scan(base)
    if not any(found.values()):
        raise ValueError(f"no images below {base}; looked for {', '.join(SUFFIXES)} files")
    if not with_labels:
        return base, sorted(file for names in found.values() for file in names), {}, {}
    names = _class_names(found, base)
    train_names = names if reference == base else _class_names(_scan(reference), reference)
    unknown = sorted(set(names) - set(train_names))
    if unknown:
        raise ValueError(
            f"{base} has {len(unknown)} classes that {reference} lacks, such as {unknown[0]!r}; "
            "class folders must have the same names in every split"
        )
    return (
        base,
        [file for c in names for file in found[c]],
        *_labels(names, train_names, [len(found[c]) for c in names]),
    )


def _check_root(root: Path) -> None:
    if not root.exists():
        raise ValueError(f"no such folder: {root}; point data.root at the folder that holds the images")
    if not root.is_dir():
        raise ValueError(
            f"{root} is a file; data.root must be a folder of images (use data.source.name 'npz' for an archive)"
        )


def _find(root: Path, split: str) -> tuple[Path, Path]:
    """(folder of the split, folder whose classes number the labels)."""
    _check_root(root)
    folders = sorted(e.name for e in os.scandir(root) if e.is_dir() and not _ignored(e.name))
    splits = [name for name in folders if name in SPLIT_NAMES]
    if split in folders and (splits or split != SINGLE_SPLIT):
        training = "train" if "train" in splits else next((s for s in splits if s.startswith("train")), split)
        return root / split, root / training
    if splits:
        raise ValueError(f"{root} has no split {split!r}; it has: {', '.join(splits)}")
    if split == SINGLE_SPLIT:
        return root, root
    if not folders:
        raise ValueError(f"no images below {root}: the folder holds no split, class or image folders")
    raise ValueError(
        f"{root} has no folder {split!r} and looks like root/class/file, which has one split, {SINGLE_SPLIT!r}; "
        "make folders train and test, or set a hold-out fraction (option holdout_fraction)"
    )


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _scan(base: Path) -> dict[str, list[str]]:
    """Folder below `base` ('' is `base`) -> its image files, paths relative to `base` with '/', sorted.

    Folders without images appear (empty) when they have no folders below them either.
    """
    found: dict[str, list[str]] = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        below, files = [], []
        with os.scandir(base / folder) as entries:
            for entry in entries:
                if _ignored(entry.name):
                    continue
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    below.append(path)
                elif entry.name.lower().endswith(SUFFIXES):
                    files.append(path)
        if files or (folder and not below):
            found[folder] = sorted(files)
        pending += below
    return found


def _class_names(found: dict[str, list[str]], base: Path) -> list[str]:
    """The sorted class folders; ValueError for images outside of them and for empty ones."""
    if found.get(""):
        raise ValueError(
            f"labels missing: {base / found[''][0]} is not in a class folder ({len(found[''])} such images); "
            "sort images into one folder a class, or set labels='none' to train without labels"
        )
    empty = sorted(name for name, files in found.items() if not files)
    if empty:
        raise ValueError(f"class {empty[0]!r} has no image in {base} ({len(empty)} such folders); remove or fill them")
    return sorted(found)


def _labels(
    names: list[str], train_names: list[str], sizes: list[int]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """Label arrays and class names for files in the order of `names`, numbered by `train_names`."""
    number = {name: i for i, name in enumerate(train_names)}
    labels = {"fine": np.repeat([number[name] for name in names], sizes)}
    classes = {"fine": tuple(train_names)}
    if all("/" in name for name in train_names):
        first = [name.split("/")[0] for name in train_names]
        coarse_names = sorted(set(first))
        to_coarse = np.array([coarse_names.index(name) for name in first])
        labels["coarse"], classes["coarse"] = to_coarse[labels["fine"]], tuple(coarse_names)
    return labels, classes


def _verified(records: Records, chunk: int = 1024) -> Records:
    """Without the images that cannot be decoded; ValueError when a class (or everything) is lost with them."""
    rows = np.arange(records.size)
    good = np.concatenate([records.read(rows[i : i + chunk])[1] for i in range(0, records.size, chunk)])
    if good.all():
        return records
    if not good.any():
        raise ValueError(f"{records.name}: none of its {records.size} images can be decoded: {records.problems()[0]}")
    for key, values in records.labels.items():
        lost = np.setdiff1d(values, values[good])
        if lost.size:
            raise ValueError(
                f"{records.name}: class {records.classes[key][lost[0]]!r} has no image that can be decoded; "
                f"damaged: {records.problems()[0]}"
            )
    return subset(records, np.flatnonzero(good), records.name)
