"""A user's pictures with captions: a folder with a captions file, or a TFDS data set with captions."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protojax.data import decode
from protojax.data.pairs import Pairs, Texts, distinct
from protojax.data.pairs_text import LONGEST, hashed_texts
from protojax.data.records import image_shapes

FILES = ("captions.csv", "captions.jsonl", "captions.parquet", "metadata.csv", "metadata.jsonl")
PATHS, CAPTIONS = ("path", "file_name", "file", "image", "filename"), ("caption", "text", "captions", "description")


def open_captions(
    root: str,
    split: str,
    *,
    canvas: int = 64,
    text: str = "hashed",
    vocabulary: int = 8000,
    longest: int = LONGEST,
    holdout_fraction: float = 0.1,
    captions_file: str | None = None,
    on_corrupt: decode.OnCorrupt = "skip",
    cache: bool = True,
) -> Pairs:
    """Images below the folder `root` and a captions file in it: CSV (with a header), JSON lines or Parquet, columns
    path and caption, and split where there is one; several rows of one path are several captions of one image.

    Without a split column, 'test' is `holdout_fraction` of the images, by a hash of their path, and 'train' the rest.
    canvas: images are decoded to uint8 [canvas,canvas,3]. text: 'hashed' (`pairs_text`), 'bpe' (a byte-pair tokenizer
    of `vocabulary` trained on the training captions, for a text tower that is trained too), or the path of a
    tokenizer.json. longest: positions; longer captions are cut, keeping the end token. Damaged images are named and
    skipped ('error': fatal).

    Raises ValueError for a missing file or column, empty captions, images that do not exist, and unknown splits.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"no such folder: {root}; data.root must hold the images and a captions file")
    table = folder / captions_file if captions_file else _found(folder)
    rows = list(read_rows(table))
    if not rows:
        raise ValueError(f"{table} holds no rows")
    _check_captions(rows, table)
    grouped = _by_split(rows, holdout_fraction, table)
    if split not in grouped:
        raise ValueError(f"{table} has no split {split!r}; it has: {', '.join(sorted(grouped))}")
    images: dict[str, list[str]] = {}
    for path, caption, _ in grouped[split]:
        images.setdefault(path, []).append(caption)
    files = list(images)
    missing = [f for f in files if not (folder / f).is_file()]
    if missing:
        raise ValueError(
            f"{table} names {len(missing)} images that do not exist below {root}, the first is {missing[0]!r}"
        )
    name = f"{folder.name}/{split}"
    captions, caption_rows = distinct([images[f] for f in files], name)
    texts = texts_of(captions, text, vocabulary, longest, [row[1] for row in grouped.get("train", rows)])
    reader = decode.ImageReader(
        lambda row: decode.decode(folder / files[row], canvas, canvas), lambda row: files[row], len(files),
        (canvas, canvas), on_corrupt=on_corrupt, cache=cache,
    )  # fmt: skip
    return Pairs(name, len(files), image_shapes(canvas, canvas), reader, caption_rows, texts, problems=reader.problems)


def texts_of(captions: Sequence[str], text: str, vocabulary: int, longest: int, corpus: Sequence[str]) -> Texts:
    """Texts by the hashed tower, or as token ids of a tokenizer trained on `corpus` or read from a file."""
    if text == "hashed":
        return hashed_texts(captions, longest=longest)
    from protojax.data.tokenizer import load_tokenizer, token_texts, train_tokenizer

    tokenizer = train_tokenizer(corpus, vocabulary) if text == "bpe" else load_tokenizer(text)
    return token_texts(captions, tokenizer, longest)


def read_rows(table: Path) -> Iterable[tuple[str, str, str]]:
    """(path, caption, split or '') of every row of a captions file. Raises ValueError for missing columns."""
    return _columns(table_rows(table), table)


def table_rows(table: Path) -> list[Mapping[str, Any]]:
    """The rows of a CSV (with a header), JSON lines or Parquet file. Raises ValueError for a missing or other file."""
    if not table.is_file():
        raise ValueError(f"no such file: {table}")
    if table.suffix == ".csv":
        with table.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    elif table.suffix in (".jsonl", ".json"):
        with table.open(encoding="utf-8") as file:
            return [_json(line, i, table) for i, line in enumerate(file, 1) if line.strip()]
    elif table.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError(f"{table}: reading Parquet needs pyarrow: pip install pyarrow, or save CSV") from None
        return parquet.read_table(table).to_pylist()
    else:
        raise ValueError(f"{table}: expected .csv, .jsonl or .parquet")


def _json(line: str, number: int, table: Path) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{table}, line {number}: not JSON ({error})") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"{table}, line {number}: expected an object with path and caption")
    return row


def _columns(rows: Sequence[Mapping[str, Any]], table: Path) -> Iterable[tuple[str, str, str]]:
    names = set().union(*(set(row) for row in rows)) if rows else set()
    path = next((n for n in PATHS if n in names), None)
    caption = next((n for n in CAPTIONS if n in names), None)
    if not rows:
        return
    if path is None or caption is None:
        raise ValueError(f"{table} needs the columns 'path' and 'caption'; it has {sorted(map(str, names))}")
    for row in rows:
        values = row.get(caption) or ""
        for value in values if isinstance(values, list) else [values]:
            yield str(row.get(path) or ""), str(value), str(row.get("split") or "")


def _check_captions(rows: Sequence[tuple[str, str, str]], table: Path) -> None:
    for what, column in (("path", 0), ("caption", 1)):
        empty = [i for i, row in enumerate(rows, 1) if not row[column].strip()]
        if empty:
            raise ValueError(f"{table}: {len(empty)} rows have no {what}, the first are rows {empty[:5]}")


def _by_split(
    rows: Sequence[tuple[str, str, str]], fraction: float, table: Path
) -> dict[str, list[tuple[str, str, str]]]:
    named = [row for row in rows if row[2]]
    if named and len(named) < len(rows):
        raise ValueError(
            f"{table}: {len(rows) - len(named)} rows have no split and others do: fill the column, or drop it"
        )
    out: dict[str, list[tuple[str, str, str]]] = {}
    for row in rows:
        out.setdefault(row[2] or ("test" if _share(row[0]) < fraction else "train"), []).append(row)
    return out


def _share(path: str) -> float:
    """A number in [0, 1) of the path's hash: an image is on the same side whatever is added beside it."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little") / 2**64


def _found(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} holds no captions file; expected one of {', '.join(FILES)}")


def open_tfds_captions(
    dataset: str,
    split: str,
    *,
    root: str | Path | None = None,
    canvas: int = 64,
    caption_key: str = "captions/text",
    image_key: str = "image",
    text: str = "hashed",
    vocabulary: int = 8000,
    longest: int = LONGEST,
    corpus_split: str = "train",
) -> Pairs:
    """A prepared TFDS set with images and captions, such as 'coco_captions': five captions an image, one drawn each
    step. caption_key: path of the caption feature, one string or a list. text: as `open_captions`; a 'bpe' tokenizer is
    trained on `corpus_split`. Captions are read once, images when needed. Raises ValueError when the set is not
    prepared as ArrayRecord or lacks a feature."""
    import tensorflow_datasets as tfds  # half a second, and most runs do not need it

    data_dir = str(root) if root is not None else None
    builder = tfds.builder(dataset, data_dir=data_dir)
    if split not in builder.info.splits and "[" not in split:
        raise ValueError(f"{dataset} in {data_dir} has no split {split!r}; it has: {', '.join(builder.info.splits)}")
    keep = {image_key: tfds.decode.SkipDecoding()}
    source = builder.as_data_source(split=split, decoders=keep)
    captions, rows = distinct([caption_strings(e, caption_key) for e in source], f"{dataset}/{split}")
    corpus: Sequence[str] = captions
    if text == "bpe" and split != corpus_split:
        other = builder.as_data_source(split=corpus_split, decoders=keep)
        corpus = [c for e in other for c in caption_strings(e, caption_key)]
    texts = texts_of(captions, text, vocabulary, longest, corpus)
    reader = decode.ImageReader(
        lambda row: decode.decode(bytes(source[row][image_key]), canvas, canvas), lambda row: f"{dataset}[{row}]",
        len(source), (canvas, canvas), cache=False,
    )  # fmt: skip
    return Pairs(f"{dataset}/{split}", len(source), image_shapes(canvas, canvas), reader, rows, texts,
                 problems=reader.problems)  # fmt: skip


def caption_strings(example: Mapping[str, Any], key: str) -> list[str]:
    """The captions of one example at a path such as 'captions/text'. Raises ValueError when there is no such
    feature."""
    value: Any = example
    for name in key.split("/"):
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"no caption feature {key!r}; the example has {sorted(map(str, example))}")
        value = value[name]
    values = value if isinstance(value, list | tuple | np.ndarray) and not isinstance(value, bytes) else [value]
    return [v.decode() if isinstance(v, bytes) else str(v) for v in np.atleast_1d(np.asarray(values, object))]
