"""The data set that is installed with the package: Grocery Store photographs, 64x64, 81 fine and 43 coarse classes.

M. Klasson, C. Zhang, H. Kjellström, WACV 2019; MIT (assets/GROCERY_LICENSE.txt, assets/README.md for the changes).
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import NamedTuple

import numpy as np

from protojax.data.npz import open_npz
from protojax.data.records import Records

SPLITS = ("train", "test")
_ASSET = importlib.resources.files("protojax.data") / "assets" / "grocery.npz"


class Hierarchy(NamedTuple):
    """class_to_coarse int64 [81]: the coarse class of each fine one. descriptions [81]: a product text a fine class."""

    class_to_coarse: np.ndarray
    descriptions: tuple[str, ...]


@functools.cache
def open_embedded(split: str) -> Records:
    """The split `train` (2,936 photographs) or `test` (2,485): image uint8 [64,64,3], labels 'fine' and 'coarse'.

    Photographs are decoded once, when first asked for, and kept (36 and 31 MB). Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"embedded has no split {split!r}; it has: {', '.join(SPLITS)}")
    with _ASSET.open("rb") as file:
        return open_npz(file, split, on_corrupt="error", name="embedded")


@functools.cache
def hierarchy() -> Hierarchy:
    """What relates and describes the classes of the embedded photographs."""
    with _ASSET.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return Hierarchy(
            archive["class_to_coarse"].astype(np.int64), tuple(str(text) for text in archive["class_descriptions"])
        )
