"""Image-text data by name: the one place that maps `data.source.name` of the alignment workload to code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from protojax.data.pairs import Pairs
from protojax.data.pairs_nlvr import open_nlvr
from protojax.data.pairs_npz import open_emoji, open_emoji_styles, open_grocery, open_pairs_npz
from protojax.data.pairs_synthetic import open_synthetic_pairs
from protojax.data.registry import _nearest

OPEN: Mapping[str, Callable[..., Pairs]] = {
    "synthetic_pairs": open_synthetic_pairs,
    "emoji": open_emoji,
    "emoji_styles": open_emoji_styles,
    "grocery": open_grocery,
    "nlvr": open_nlvr,
    "pairs_npz": open_pairs_npz,
}
NEEDS_ROOT = ("emoji_styles", "nlvr", "pairs_npz", "captions", "tar_shards")
# Splits beside those of training and test, for evaluations of their own.
MORE_SPLITS: Mapping[str, tuple[str, ...]] = {
    "grocery": ("classes", "class_names"),
    "nlvr": ("dev_matching", "test_matching"),
}


def opener(name: str) -> tuple[Callable[..., Pairs], tuple[str, ...]]:
    """The function that opens `name`, and its leading arguments before the split. Raises ValueError for an unknown
    name."""
    if name in ("captions", "tar_shards") or name.startswith("tfds_captions:"):
        # They read image files and archives: not needed by the others.
        from protojax.data.captions import open_captions, open_tfds_captions
        from protojax.data.tar_shards import open_tar_shards

        if name.startswith("tfds_captions:"):
            return open_tfds_captions, (name.removeprefix("tfds_captions:"),)
        files: dict[str, Callable[..., Pairs]] = {"captions": open_captions, "tar_shards": open_tar_shards}
        return files[name], ()
    if name not in OPEN:
        known = [*OPEN, "captions", "tar_shards", "tfds_captions:NAME"]
        raise ValueError(f"unknown image-text data {name!r}{_nearest(name, known)}")
    return OPEN[name], ()


def open_pairs(name: str, split: str, *, root: str | Path | None = None, **options: Any) -> Pairs:
    """The split `split` of the image-text data `name`; `options` are the keyword arguments of the function behind it.

    Raises ValueError for an unknown name or option (with the nearest known one), a missing root, and what the opening
    function raises."""
    function, bound = opener(name)
    accepted = [k for k, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in accepted:
            raise ValueError(f"image-text data {name!r} has no option {option!r}{_nearest(option, accepted)}")
    if name in NEEDS_ROOT:
        if root is None or not str(root):
            raise ValueError(f"image-text data {name!r} needs data.root, the path of your files")
        bound = (str(Path(root).expanduser()),)
    elif root is not None and str(root):
        if not name.startswith("tfds_captions:"):
            raise ValueError(f"image-text data {name!r} is built in and reads no files; unset data.root ({root})")
        options = {**options, "root": Path(root).expanduser()}
    return function(*bound, split, **options)
