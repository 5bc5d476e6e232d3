"""What a command line calls data: a source with options, or the path of a folder or archive."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from protojax.config import Component, Data
from protojax.data import registry
from protojax.data.folder import SUFFIXES

_OPTIONS = re.compile(r"^(?P<source>.+?):(?P<options>[A-Za-z_]+=.*)$", re.DOTALL)
_TEXT = ("root", "train_split", "test_split", "subset", "annotations")  # never read as Python literals


def parse_data(text: str) -> Data:
    """SOURCE, SOURCE:key=value,key=value, or the path of a folder of images or of an .npz archive, with or without
    options.

    SOURCE: as `config.data.source.name` ('embedded', 'image_folder', 'npz', 'synthetic', 'tfds:NAME'). Keys: its
    options, and `root`, `train_split`, `test_split`. Values are Python literals or plain text. A folder with images
    outside class folders is read without labels. Raises ValueError for what is neither, or for an option without a
    value; unknown options are named when the data are opened.
    """
    match = _OPTIONS.match(text)
    source, options = (match["source"], _options(match["options"], text)) if match else (text, {})
    if not (source in registry.SPLITS or source.startswith("tfds:")):
        path = Path(source).expanduser()
        if not path.exists():
            known = ", ".join(registry.SPLITS)
            raise ValueError(
                f"--data={text}: {source!r} is neither a source ({known}) nor the path of a folder of images or of an "
                ".npz archive."
            )
        source = "image_folder" if path.is_dir() else "npz"
        options = {"root": str(path), **options}
    if source == "image_folder" and "annotations" not in options and _loose_images(options.get("root")):
        options = {"labels": "none", **options}
    data = {k: options.pop(k) for k in ("root", "train_split", "test_split") if k in options}
    return dataclasses.replace(Data(), source=Component(source, options), **data)


def default_split(data: Data) -> str:
    """The split that is embedded when none is named: all of a folder or archive, else the training split."""
    whole = data.source.name in ("image_folder", "npz") and not data.source.options.get("holdout_fraction")
    return registry.WHOLE if whole else data.train_split


def _options(text: str, given: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in re.split(r",(?=[A-Za-z_]+=)", text):
        key, _, value = part.partition("=")
        if not value:
            raise ValueError(f"--data={given}: option {key!r} has no value; write key=value,key=value.")
        try:
            found[key] = value if key in _TEXT else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _loose_images(root: Any) -> bool:
    """Whether images stand directly in a folder, not in class folders."""
    path = Path(str(root)).expanduser()
    if root is None or not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return any(e.is_file() and e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".") for e in entries)
