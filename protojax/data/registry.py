"""Data sets by name: the one place that maps `data.source.name` to code."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from protojax.data.embedded import open_embedded
from protojax.data.folder import open_image_folder
from protojax.data.npz import open_npz
from protojax.data.packed import pack
from protojax.data.records import Records, concatenate, holdout
from protojax.data.synthetic import open_synthetic
from protojax.data.tfds_source import open_tfds

# None: the splits are those of the files. A data set in one piece has the split 'all' (see `holdout_fraction`).
SPLITS: Mapping[str, tuple[str, ...] | None] = {
    "embedded": ("train", "test"),
    "npz": None,
    "image_folder": None,
    "synthetic": ("train", "test"),
    "tfds:NAME": None,
}
_OPEN: Mapping[str, Callable[..., Records]] = {
    "embedded": open_embedded,
    "npz": open_npz,
    "image_folder": open_image_folder,
    "synthetic": open_synthetic,
}
_NEEDS_ROOT = ("npz", "image_folder")
WHOLE = "all"


def open_records(
    name: str,
    split: str,
    *,
    root: str | Path | None = None,
    holdout_fraction: float = 0.0,
    holdout_seed: int = 0,
    packed: str | Path | None = None,
    **options: Any,
) -> Records:
    """The split `split` ('train', 'test', or several as in 'train+val') of the data set `name`.

    name: 'embedded', 'synthetic', 'npz' (root: an archive), 'image_folder' (root: a folder) or 'tfds:NAME' (root: its
    data_dir, optional). options: the keyword arguments of the function that opens it (`open_npz`, ...).
    holdout_fraction: for a set in one piece: its 'test' is this fraction of each class, 'train' the rest.
    packed: a folder for a decoded, memory-mapped copy, made at the first use (`packed.pack`).

    Raises ValueError for an unknown name or option (with the nearest known one), a missing root, and what the opening
    function raises.
    """
    opener, bound = _opener(name)
    accepted = [k for k, p in inspect.signature(opener).parameters.items() if p.kind is p.KEYWORD_ONLY and k != "root"]
    for option in options:
        if option not in accepted:
            raise ValueError(f"data set {name!r} has no option {option!r}{_nearest(option, accepted)}")
    if name in _NEEDS_ROOT:
        if root is None or not str(root):
            raise ValueError(f"data set {name!r} needs data.root, the path of your {_what(name)}")
        bound = (str(Path(root).expanduser()),)
    elif root is not None and str(root):
        if not name.startswith("tfds:"):
            raise ValueError(f"data set {name!r} is built in and reads no files; unset data.root ({root})")
        options = {**options, "root": Path(root).expanduser()}

    def one(part: str) -> Records:
        if not part:
            raise ValueError(f"empty split in {split!r}; write one such as 'train', or several as 'train+val'")
        found = opener(*bound, part, **options)
        return pack(found, packed) if packed else found

    if holdout_fraction:
        if split not in ("train", "test"):
            raise ValueError(f"with holdout_fraction the splits are 'train' and 'test', got {split!r}")
        records = holdout(one(WHOLE), holdout_fraction, holdout_seed)[0 if split == "train" else 1]
    else:
        parts = [one(part.strip()) for part in split.split("+")]
        records = parts[0] if len(parts) == 1 else concatenate(parts)
    return records


def _opener(name: str) -> tuple[Callable[..., Records], tuple[str, ...]]:
    """The function that opens `name`, and its leading arguments before the split."""
    if name.startswith("tfds:") and name != "tfds:":
        return open_tfds, (name.removeprefix("tfds:"),)
    if name not in _OPEN:
        known = [*_OPEN, "tfds:NAME"]
        raise ValueError(f"unknown data set {name!r}{_nearest(name, known)}")
    return _OPEN[name], ()


def _nearest(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"


def _what(name: str) -> str:
    return ".npz archive" if name == "npz" else "folder of images"
