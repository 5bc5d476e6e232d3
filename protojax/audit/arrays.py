"""NumPy's .npy and .npz, and safetensors: headers are checked before a byte of data is believed."""

from __future__ import annotations

import json
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from protojax.audit.tensors import DTYPES, FileError, Tensor, TensorFile, check_size, plain, reading

_LARGEST_HEADER = 100 * 2**20  # the format's own limit
_SAFE_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ numpy
def read_npy(path: Path) -> TensorFile:
    """One array, named 'array'. Raises FileError for objects (pickles) and for a file that is cut off."""
    with reading(path, ".npy"), path.open("rb") as file:
        shape, _, kind = _npy_header(file, path.name)
        size = check_size(shape, path.name) * kind.itemsize
        there = path.stat().st_size - file.tell()
        if there < size:
            raise FileError(f"{path} is cut off: its header promises {size} bytes, {there} are there.")
    return TensorFile("NumPy array", {"array": Tensor(shape, kind.name, partial(_read_npy, path))})


def _read_npy(path: Path) -> np.ndarray:
    with reading(path, ".npy"):
        return plain(np.load(path, allow_pickle=False))


def read_npz(path: Path) -> TensorFile:
    """The arrays of an archive by name. Raises FileError for encrypted members, objects, and damage."""
    tensors = {}
    with reading(path, ".npz"), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise FileError(f"{path} is encrypted: unpack it with its password first.")
            if not info.filename.endswith(".npy"):
                continue
            with archive.open(info) as file:
                try:
                    shape, _, kind = _npy_header(file, info.filename)
                except FileError:
                    continue  # an array of objects beside the numbers: it is not read
            check_size(shape, info.filename)
            read = partial(_read_member, path, info.filename)
            tensors[info.filename.removesuffix(".npy")] = Tensor(shape, kind.name, read)
    return TensorFile("NumPy archive", tensors)


def _read_member(path: Path, member: str) -> np.ndarray:
    with reading(path, ".npz"), zipfile.ZipFile(path) as archive, archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise FileError(f"{path}: {member} is longer than its header says.")
        return plain(array)


def _npy_header(file: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of an .npy file at its beginning."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise FileError(f"{name}: .npy version {version} is not known.")
    # Version 3 differs from 2 in the encoding of field names alone, and structured arrays are refused anyway.
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, order, kind = reader(file)
    if kind.hasobject:
        raise FileError(f"{name} holds Python objects (a pickle), which are never loaded; save plain numbers.")
    if kind.names or kind.kind not in "biufc":
        raise FileError(f"{name} holds {kind}, expected an array of numbers.")
    return shape, order, kind


# ------------------------------------------------------------------------------------------------ safetensors
def read_safetensors(path: Path) -> TensorFile:
    """8 bytes of length, a JSON header, raw numbers. Raises FileError where the header does not fit the file."""
    with reading(path, "safetensors"), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise FileError(f"{path} is cut off or no safetensors file: a header of {length} bytes in {size}.")
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise FileError(f"{path}: the header is no JSON object.")
        tensors = {
            name: _safe_tensor(path, name, entry, 8 + length, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    return TensorFile("safetensors", tensors)


def _safe_tensor(path: Path, name: str, entry: Any, start: int, size: int) -> Tensor:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    count = check_size(shape, name)
    dtype = _SAFE_DTYPES.get(entry["dtype"], str(entry["dtype"]))
    kind = DTYPES.get(dtype)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (begin, end)) or not 0 <= begin <= end:
        raise FileError(f"{path}: {name} has the offsets {begin!r} and {end!r}.")
    if start + end > size:
        raise FileError(f"{path} is cut off: {name} ends at byte {start + end} of {size}.")
    if kind is not None and end - begin != count * kind.itemsize:
        raise FileError(f"{path}: {name} {list(shape)} of {dtype} has {end - begin} bytes of data.")
    return Tensor(shape, dtype, partial(_read_safe, path, name, shape, dtype, start + begin), (begin, end))


def _read_safe(path: Path, name: str, shape: tuple[int, ...], dtype: str, begin: int) -> np.ndarray:
    if dtype not in DTYPES:
        raise FileError(f"{path}: {name} holds {dtype}, which is not read; save it as float32.")
    with reading(path, "safetensors"):
        count = check_size(shape, name)
        data = np.fromfile(path, DTYPES[dtype], count, offset=begin)
        return plain(data.reshape(shape))
