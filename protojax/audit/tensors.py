"""What every reader returns: named tensors that are read when they are asked for, and the one error of this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

LARGEST = 2**34  # bytes of one tensor as float32: above it the audit would not fit a workstation's memory


class FileError(ValueError):
    """A file that cannot be read, or whose prototypes cannot be found: what was expected, given, and what to do."""


class Tensor(NamedTuple):
    """shape; dtype: its name in the file; read() -> numpy array in a dtype that numpy computes with (bfloat16 and
    float8 become float32); identity: equal for two names of the same memory, None where that is not known."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    identity: Any = None


class TensorFile(NamedTuple):
    """format: in words. tensors: name -> Tensor, in the order of the file."""

    format: str
    tensors: Mapping[str, Tensor]


# What the formats call their element types: numpy's type of the same bytes (little-endian).
DTYPES: Mapping[str, Any] = {
    "float64": np.dtype("<f8"), "float32": np.dtype("<f4"), "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2), "int64": np.dtype("<i8"), "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"), "int8": np.dtype("i1"), "uint8": np.dtype("u1"), "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"), "uint64": np.dtype("<u8"), "bool": np.dtype("?"), "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
}  # fmt: skip


def plain(array: np.ndarray) -> np.ndarray:
    """The array in a dtype of numpy's own and in the machine's byte order: float8, float16, bfloat16 -> float32."""
    if array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat16", "float8", "float16")):
        return array.astype(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def check_size(shape: tuple[int, ...], name: str) -> int:
    """Number of elements. Raises FileError for a shape that is no shape, or too large to be read."""
    if len(shape) > 16 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
        raise FileError(f"{name}: {shape!r} is no shape; the file is damaged.")
    count = math.prod(shape)
    if 4 * count > LARGEST:
        raise FileError(
            f"{name}: {list(shape)} would need {4 * count / 2**30:,.0f} GiB; at most {LARGEST / 2**30:.0f} GiB are "
            "read. Save the prototypes alone, or a part of them, as .npy."
        )
    return count


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong while a damaged file is taken apart becomes a FileError that names the file."""
    try:
        yield
    except FileError as error:
        text = str(error)
        raise (error if str(path) in text else FileError(f"{path}: {text}")) from None
    except Exception as error:  # a mutated file can raise nearly anything in the standard library's parsers
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise FileError(
            f"{path}: truncated or damaged ({kind}: {what}). Download or copy it again and compare its size."
        ) from None
