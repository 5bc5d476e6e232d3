"""Small pictures of the images behind frozen features, read when a report is drawn and not before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

THUMBNAIL, PATH = "thumbnail", "path"
SIDE = 64
BLANK = 205  # the grey of a picture that is not there


def of_archive(path: Path, parts: np.ndarray) -> Callable[[str, np.ndarray], np.ndarray]:
    """pictures(split, rows) of a feature cache that holds `thumbnail` [N,h,w,3] or `path` [N]. parts [N]: its splits.

    Files that cannot be opened become grey tiles, with one warning: a report must not fail for a picture.
    """
    parts = np.asarray(parts).astype(str)

    def pictures(split: str, rows: np.ndarray) -> np.ndarray:
        chosen = (np.arange(len(parts)) if split not in parts else np.flatnonzero(parts == split))[rows]
        with np.load(path, allow_pickle=False) as archive:
            if THUMBNAIL in archive.files:
                return np.asarray(archive[THUMBNAIL][chosen], np.uint8)
            files = [path.parent / str(name) for name in archive[PATH][chosen]]
        found = [opened(file) for file in files]
        if missing := [file for file, image in zip(files, found, strict=True) if image is None]:
            warnings.warn(f"{len(missing)} pictures of {path} cannot be opened, first {missing[0]}", stacklevel=2)
        blank = np.full((SIDE, SIDE, 3), BLANK, np.uint8)
        return np.stack([blank if image is None else image for image in found])

    return pictures


def opened(file: Path) -> np.ndarray | None:
    """The middle of a picture as uint8 [64,64,3]; None where it cannot be read."""
    try:
        with Image.open(file) as image:
            return middle(image)
    except OSError:
        return None


def middle(image: Image.Image) -> np.ndarray:
    """The middle of a picture as uint8 [64,64,3]."""
    return np.asarray(ImageOps.fit(image.convert("RGB"), (SIDE, SIDE)))
