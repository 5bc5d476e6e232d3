"""Labelled pictures for frozen towers: a folder, a table of paths, or any source of images, with fields of classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from protojax.config import Data, suggest
from protojax.data import decode, embedded, registry
from protojax.data.captions import CAPTIONS, PATHS, table_rows
from protojax.data.folder import SPLIT_NAMES, image_files
from protojax.data.naming import parse_data
from protojax.data.prompts_templates import own_fields
from protojax.data.records import Records, holdout, image_shapes, make_records

TABLES = (".csv", ".jsonl", ".parquet")
LABELS = ("label", "class", "category")
# What folders and tables call their splits -> what caches call them.
_CACHE_SPLITS = {"training": "train", "testing": "test", "valid": "val", "validation": "val", registry.WHOLE: "train"}
Prepare = Callable[[Image.Image], np.ndarray]


class Pictures(NamedTuple):
    """splits: name -> Records whose `image` is what `prepare` made of a picture; label: the key of the labels; fields:
    of the classes, for templates; captions, files: split -> one a picture, where they are known."""

    name: str
    splits: Mapping[str, Records]
    label: str
    class_names: tuple[str, ...]
    fields: Mapping[str, Sequence[str]]
    captions: Mapping[str, tuple[str, ...]] = {}
    files: Mapping[str, tuple[Path, ...]] = {}


def open_pictures(
    data: str, prepare: Prepare, side: int, *, label: str = "fine", splits: Sequence[str] = (), test_share: float = 0.0
) -> Pictures:
    """Pictures by what a command line calls them: a folder, a table (CSV, JSON lines, Parquet: path, label, optional
    split and caption; other columns that agree within each class become fields), or SOURCE:key=value as in `naming`.

    prepare: a Pillow image -> uint8 [side,side,3]. Files are opened for it in full; sources that store arrays hand over
    what they store. label: the key of the labels. splits: those to read; all of a folder or table, else the training
    and test split. test_share: of data in one piece, held out of each class as the split 'test'.

    Raises ValueError for missing files, labels or splits, and what the opening functions raise.
    """
    if not 0 <= test_share < 1:
        raise ValueError(f"test_share must lie in [0, 1), got {test_share}")
    path = Path(data).expanduser()
    if path.suffix in TABLES:
        pictures = _from_table(path, prepare, side, splits)
    else:
        pictures = _from_source(parse_data(data), prepare, side, label, splits)
    if test_share:
        if list(pictures.splits) != ["train"] or pictures.captions:
            raise ValueError(
                f"test_share: {data} has the splits {list(pictures.splits)} or captions; only labelled data in "
                "one piece are split"
            )
        kept, held = holdout(pictures.splits["train"], test_share, 0)
        pictures = pictures._replace(splits={"train": kept, "test": held}, files={})
    return pictures


def batches(records: Records, size: int, what: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rows, images, which could be read) of all records in order; the next batch is read while one is worked on."""
    parts = [np.arange(i, min(i + size, records.size)) for i in range(0, records.size, size)]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(records.read, parts[0])
        for i, rows in enumerate(tqdm(parts, desc=what, unit="batch", disable=None)):
            content, good = ahead.result()
            if i + 1 < len(parts):
                ahead = pool.submit(records.read, parts[i + 1])
            if good.any():
                yield rows, content["image"], good


# ----------------------------------------------------------------------------------------- folders and sources
def _from_source(data: Data, prepare: Prepare, side: int, label: str, splits: Sequence[str]) -> Pictures:
    name, options = data.source.name, dict(data.source.options)
    root = data.root or None
    if name == "image_folder":
        options |= {"prepare": prepare, "canvas": side}
        splits = splits or _folder_splits(Path(str(root)).expanduser(), options)
    splits = splits or ((data.train_split, data.test_split) if name != "npz" else (registry.WHOLE,))
    found, files = {}, {}
    for split in splits:
        target = _CACHE_SPLITS.get(split, split)
        records = registry.open_records(name, split, root=root, **options)
        if label not in records.labels:
            raise ValueError(
                f"{records.name} has no label {label!r}{suggest(label, records.labels)}; it has: "
                f"{', '.join(records.labels) or 'none'}. Sort files into a folder a class, or write a "
                "table (path, label)"
            )
        found[target] = records if name == "image_folder" else _converted(records, prepare, side)
        if name == "image_folder" and not {"annotations", "holdout_fraction"} & set(options):
            files[target] = tuple(image_files(Path(str(root)).expanduser(), split))
    if len(found) < len(splits):
        raise ValueError(f"splits {list(splits)}: two of them are one split of a cache; name those to read")
    first = next(iter(found.values()))
    names = first.classes[label]
    fields = {**own_fields(names), **_known(name, first, label)}
    return Pictures(first.name.split("/")[0], found, label, names, fields, {}, files)


def _folder_splits(root: Path, options: Mapping[str, Any]) -> tuple[str, ...]:
    if options.get("holdout_fraction"):
        return ("train", "test")
    if not root.is_dir():
        return (registry.WHOLE,)  # opening it says what is wrong
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name in SPLIT_NAMES)
    return tuple(sorted(found, key=lambda split: not split.startswith("train"))) or (registry.WHOLE,)


def _known(source: str, records: Records, label: str) -> dict[str, tuple[str, ...]]:
    """Fields that the source itself knows: the coarse class of each fine one, and descriptions of the embedded set."""
    if label != "fine":
        return {}
    fields = {}
    if "coarse" in records.labels:
        fine, coarse = records.labels["fine"], records.labels["coarse"]
        pairs = dict(zip(fine.tolist(), coarse.tolist(), strict=True))
        if len(pairs) == len(records.classes["fine"]):
            coarse_names = records.classes["coarse"]
            fields["coarse"] = tuple(coarse_names[pairs[c]].replace("_", " ") for c in range(len(pairs)))
    if source == "embedded":
        fields["description"] = embedded.hierarchy().descriptions
    return fields


def _converted(records: Records, prepare: Prepare, side: int) -> Records:
    """Records of arrays, each of which goes through `prepare`."""

    def read(rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        content, good = records.read(rows)
        images = np.stack([prepare(Image.fromarray(image)) for image in content["image"]])
        return {"image": images}, good

    return make_records(records.name, records.size, image_shapes(side, side), read, records.labels, records.classes,
                        records.problems)  # fmt: skip


# --------------------------------------------------------------------------------------------------- tables
def _from_table(path: Path, prepare: Prepare, side: int, splits: Sequence[str]) -> Pictures:
    rows = table_rows(path)
    if not rows:
        raise ValueError(f"{path} holds no rows; expected the columns path, label and, if you like, split and caption")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    place, label = _column(PATHS, columns, path), _column(LABELS, columns, path)
    caption = next((name for name in CAPTIONS if name in columns), None)
    for what in (place, label, *([caption] if caption else [])):
        empty = [i for i, row in enumerate(rows, 1) if not str(_text(row, what))]
        if empty:
            raise ValueError(f"{path}: {len(empty)} rows have no {what}, the first are rows {empty[:5]}")
    names = _sorted({_text(row, label) for row in rows})
    number = {name: c for c, name in enumerate(names)}
    where, whole = _row_splits(rows, path), len(set(_row_splits(rows, path))) == 1
    chosen = {_CACHE_SPLITS.get(s, s): s for s in (splits or dict.fromkeys(where))}
    unknown = [s for s in chosen.values() if s not in where]
    if unknown:
        raise ValueError(f"{path} has no split {unknown[0]!r}; it has: {', '.join(dict.fromkeys(where))}")
    found, captions, files = {}, {}, {}
    for target, split in chosen.items():
        own = [row for row, s in zip(rows, where, strict=True) if s == split]
        target = "train" if whole and not splits else target
        files[target] = tuple(path.parent / _text(row, place) for row in own)  # an absolute path stays as it is
        labels = np.asarray([number[_text(row, label)] for row in own], np.int64)
        found[target] = _table_records(f"{path.stem}/{split}", path, files[target], prepare, side, labels, names)
        if caption:
            captions[target] = tuple(_text(row, caption) for row in own)
    spare = [c for c in columns if c not in (place, label, "split", caption)]
    fields = {**own_fields(names), **_agreeing(rows, label, names, spare)}
    return Pictures(path.stem, found, "fine", tuple(names), fields, captions, files)


def _table_records(
    name: str, path: Path, files: Sequence[Path], prepare: Prepare, side: int, labels: np.ndarray, names: Sequence[str]
) -> Records:
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{path} names {len(missing)} images that do not exist, the first is {missing[0]}; paths are absolute or "
            f"relative to {path.parent}"
        )
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise ValueError(f"{path} names {twice} twice; keep one row an image")
    reader = decode.ImageReader(
        lambda row: decode.prepared(files[row], prepare), lambda row: str(files[row]), len(files), (side, side)
    )
    shapes = image_shapes(side, side)
    return make_records(name, len(files), shapes, reader, {"fine": labels}, {"fine": names}, reader.problems)


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else str(value).strip()


def _column(known: Sequence[str], columns: Sequence[str], path: Path) -> str:
    for name in known:
        if name in columns:
            return name
    raise ValueError(f"{path} has no column {known[0]!r} (or {', '.join(known[1:])}); it has: {', '.join(columns)}")


def _row_splits(rows: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    where = [_text(row, "split") for row in rows]
    blank = sum(not s for s in where)
    if blank == len(rows):
        return [registry.WHOLE] * blank
    if blank:
        raise ValueError(f"{path}: {blank} rows have no split and others do: fill the column, or drop it")
    return where


def _sorted(names: set[str]) -> list[str]:
    """By number where all are numbers, else as text."""
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _agreeing(
    rows: Sequence[Mapping[str, Any]], label: str, names: Sequence[str], columns: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Columns whose value is the same in all rows of a class."""
    fields = {}
    for column in columns:
        values: dict[str, set[str]] = {name: set() for name in names}
        for row in rows:
            values[_text(row, label)].add(_text(row, column))
        if all(len(found) == 1 for found in values.values()):
            fields[column] = tuple(next(iter(values[name])) for name in names)
    return fields
