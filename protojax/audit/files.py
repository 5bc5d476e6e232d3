"""From a path to prototypes or features, whatever wrote the file: told by its contents, never by its name."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protojax.audit import arrays, directories, layers, torchfile
from protojax.audit.tensors import FileError, TensorFile, reading

_KNOWN = "NumPy (.npy, .npz), safetensors, PyTorch (.pth, .pt) and Orbax folders are read"
_FOREIGN = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?)"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"GGUF", "a GGUF file"),
    (b"<!DO", "an HTML page: the download failed"),
    (b"<htm", "an HTML page: the download failed"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
)


class Prototypes(NamedTuple):
    """rows [K,D] float32 or float64, as the file has them (not unit). layout: whose checkpoint, or how it was found."""

    rows: np.ndarray
    format: str
    key: str
    layout: str
    dtype: str
    weight_norm: bool


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a file or an Orbax folder. Raises FileError for a file that is none of the known formats."""
    path = Path(path)
    if not path.exists():
        raise FileError(f"no file {path}.")
    if path.is_dir():
        return directories.read_orbax(path)
    with reading(path, "file"), path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise FileError(f"{path} is empty.")
    if head[:6] == b"\x93NUMPY":
        return arrays.read_npy(path)
    if head[:4] == b"PK\x03\x04":
        with reading(path, "zip"), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        is_torch = any(n.rpartition("/")[2] == "data.pkl" for n in names)
        if not is_torch and not any(n.endswith(".npy") for n in names):
            raise FileError(f"{path} is a zip archive without arrays or a checkpoint. {_KNOWN}.")
        return torchfile.read_zip(path) if is_torch else arrays.read_npz(path)
    for magic, what in _FOREIGN:
        if head.startswith(magic):
            raise FileError(f"{path} is {what}. {_KNOWN}.")
    if head[257:262] == b"ustar":
        raise FileError(f"{path} is a tar archive (PyTorch before 0.1.10 wrote these, or unpack it first). {_KNOWN}.")
    if head[:1] == b"\x80":
        return torchfile.read_legacy(path)
    if head[8:9] == b"{":
        return arrays.read_safetensors(path)
    raise FileError(f"{path} begins with {head[:8]!r}, which is no format that is known. {_KNOWN}.")


def load_prototypes(path: str | Path, key: str | None = None) -> Prototypes:
    """The prototypes of a file, a run of protojax, or an Orbax folder; key: the tensor's name where it is not found.

    Raises layers.AmbiguousError with candidates, and FileError for anything that cannot be read.
    """
    path = Path(path)
    if path.is_dir() and key is None and directories.is_run(path):
        rows, name = directories.read_run(path)
        return Prototypes(rows, "run of protojax", name, "protojax", str(rows.dtype), False)
    file = open_tensors(path)
    candidate = layers.find(file.tensors) if key is None else layers.named(file.tensors, key)
    rows, normed = layers.rows_of(file.tensors, candidate)
    return Prototypes(rows, file.format, candidate.name, candidate.layout, candidate.dtype, normed)


def load_features(path: str | Path) -> np.ndarray:
    """Features [M,D] of a file with one matrix (or one named features, embeddings, image or array).

    Raises FileError where there is no such matrix, or several.
    """
    tensors = open_tensors(Path(path)).tensors
    matrices = {n: t for n, t in tensors.items() if len(t.shape) == 2 and t.dtype.startswith(("float", "bfloat"))}
    wanted: list[str] = [n for n in ("features", "embeddings", "image", "array") if n in matrices]
    chosen = wanted[:1] or list(matrices)
    if len(chosen) != 1:
        there = ", ".join(f"{n} {list(t.shape)}" for n, t in list(tensors.items())[:8])
        raise FileError(f"{path}: expected one matrix of features [rows, width] (or one named features), got {there}.")
    return matrices[chosen[0]].read()
