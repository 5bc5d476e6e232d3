"""PyTorch's two checkpoint formats, read without PyTorch.

Zip (since 1.6): `NAME/data.pkl` refers to storages `NAME/data/KEY`, raw bytes. Legacy: five pickles (magic number,
protocol, system, the object, the keys of its storages), then each storage as a 64-bit count and raw bytes. Pickles are
read by `pickles`, which executes nothing. Storages are read one tensor at a time, when asked for.
"""

from __future__ import annotations

import math
import mmap
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protojax.audit.pickles import Global, Record, read_pickle
from protojax.audit.tensors import DTYPES, FileError, Tensor, TensorFile, check_size, plain, reading

_MAGIC = 0x1950A86A20F9469CFC6C
_LARGEST_PICKLE = 2**28  # the structure of a checkpoint, without its numbers
_MOST_TENSORS = 1_000_000
_LONGEST_NAME = 2000
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
# The parts of a pickled module that hold tensors, and leave no trace in their names.
_MODULE_PARTS = ("_parameters", "_buffers", "_modules")


class _Storage(NamedTuple):
    """dtype: of its elements. size: elements. begin: first element of a legacy view of another storage."""

    key: str
    dtype: str
    size: int
    begin: int


class _View(NamedTuple):
    """A tensor as a strided view of a storage, in elements."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------- formats
def read_zip(path: Path) -> TensorFile:
    """The tensors of a zip checkpoint. Raises FileError for anything that is not a whole one."""
    with reading(path, "PyTorch zip"), zipfile.ZipFile(path) as archive:
        if any(info.flag_bits & 1 for info in archive.infolist()):
            raise FileError(f"{path} is encrypted: unpack it with its password first, then audit what is inside.")
        pickles = [n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise FileError(f"{path} holds {len(pickles)} objects named data.pkl, expected the one of torch.save.")
        prefix = pickles[0].removesuffix("data.pkl")
        info = archive.getinfo(pickles[0])
        if info.file_size > _LARGEST_PICKLE:
            raise FileError(f"{path}: its data.pkl of {info.file_size:,} bytes is too large for a checkpoint's.")
        value = read_pickle(_Cursor(archive.read(info)), _rebuild, _persistent)
        order = f"{prefix}byteorder"
        big = order in archive.namelist() and archive.read(order) == b"big"
    return TensorFile("PyTorch checkpoint (zip)", _named(value, partial(_read_zip_view, path, prefix, big)))


def read_legacy(path: Path) -> TensorFile:
    """The tensors of a checkpoint from before PyTorch 1.6, or of `_use_new_zipfile_serialization=False`."""
    with reading(path, "PyTorch legacy"), path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(memory)
        if read_pickle(cursor, _rebuild, _persistent) != _MAGIC:
            raise FileError(
                f"{path} is a pickle, but not one that torch.save wrote. Save the prototypes as .npy, .npz or "
                ".safetensors."
            )
        read_pickle(cursor, _rebuild, _persistent)  # the protocol
        system = read_pickle(cursor, _rebuild, _persistent)
        storages: dict[str, _Storage] = {}
        value = read_pickle(cursor, _rebuild, partial(_persistent, seen=storages))
        keys = read_pickle(cursor, _rebuild, _persistent)
        big = isinstance(system, dict) and system.get("little_endian") is False
        where = _legacy_places(cursor, keys, storages, big)
        named = _named(value, partial(_read_legacy_view, path, memory, where, big))
    return TensorFile("PyTorch checkpoint (legacy)", named)


class _Cursor:
    """Reading from bytes or mapped memory: never more than there is, whatever length a file claims."""

    def __init__(self, data: Any):
        self._data, self._at = data, 0

    def tell(self) -> int:
        return self._at

    def read(self, count: int) -> bytes:
        if count < 0:
            raise ValueError("a negative length")
        part = bytes(self._data[self._at : min(self._at + count, len(self._data))])
        self._at += len(part)
        return part

    def readline(self) -> bytes:
        end = self._data.find(b"\n", self._at)
        return self.read((len(self._data) if end < 0 else end + 1) - self._at)


# --------------------------------------------------------------------------------------- what pickles refer to
def _persistent(identity: Any, seen: dict[str, _Storage] | None = None) -> Any:
    """('storage', type, key, device, count[, view]) -> a storage."""
    if isinstance(identity, tuple) and len(identity) > 1 and identity[0] == "module":  # a class with its source text
        return identity[1]
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        return Record(None, identity)
    _, kind, key, _, count = identity[:5]
    view = identity[5] if len(identity) > 5 else None
    name = kind.name if isinstance(kind, Global) else ""
    if not isinstance(key, str) or not isinstance(count, int) or count < 0:
        raise ValueError("a storage without a key or a size")
    begin = view[1] if isinstance(view, tuple) and len(view) == 3 else 0
    whole = _Storage(key, _STORAGES.get(name, name or "unknown"), count, 0)
    if seen is not None:
        seen[key] = whole
    return whole._replace(begin=begin, size=view[2]) if isinstance(view, tuple) and len(view) == 3 else whole


def _rebuild(function: Global, arguments: tuple) -> Any:
    """The constructors of torch that a state dict holds, as data; NotImplemented for all others."""
    if function.module == "torch" and function.name == "Size":
        return tuple(arguments[0])
    if function.module not in ("torch._utils", "torch._tensor"):
        return NotImplemented
    if function.name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, _Storage):
            return Record(function, arguments)
        dtype = storage.dtype
        if function.name == "_rebuild_tensor_v3" and len(arguments) > 6 and isinstance(arguments[6], Global):
            dtype = arguments[6].name
        return _View(storage, dtype, offset, tuple(shape), tuple(strides))
    if function.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return arguments[0]
    if function.name == "_rebuild_from_type_v2" and isinstance(arguments[0], Global):
        return _rebuild(arguments[0], tuple(arguments[2]))
    return NotImplemented


def _named(root: Any, read: Callable[[_View, str], np.ndarray]) -> dict[str, Tensor]:
    """Every tensor of a nested value by its path, in order. Shared parts are walked once a container."""
    found: dict[str, Tensor] = {}
    left: list[tuple[str, Any]] = [("", root)]
    walked: set[int] = set()
    while left:
        path, value = left.pop()
        if isinstance(value, _View):
            check_size(value.shape, path or "tensor")
            name = path or "tensor"
            identity = (value.storage.key, value.storage.begin, value.offset, value.shape, value.strides)
            found[name] = Tensor(value.shape, value.dtype, partial(read, value, name), identity)
            if len(found) > _MOST_TENSORS:
                raise FileError(f"more than {_MOST_TENSORS:,} tensors; this is no checkpoint.")
            continue
        inside = _inside(value)
        if len(path) > _LONGEST_NAME:
            raise FileError(
                f"an object is nested so deep that its name has {len(path)} letters; this is no checkpoint."
            )
        if inside and id(value) not in walked:
            walked.add(id(value))
            left.extend((_joined(path, key), item) for key, item in reversed(inside))
    return found


def _inside(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Record):
        state: dict[Any, Any] = value.state if isinstance(value.state, dict) else {}
        pairs = [pair for pair in value.items if isinstance(pair, tuple) and len(pair) == 2]
        return [*state.items(), *pairs]
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _joined(path: str, key: Any) -> str:
    name = key if isinstance(key, str) else str(key) if isinstance(key, int) else "?"
    if name in _MODULE_PARTS:
        return path
    return f"{path}.{name}" if path else name


# --------------------------------------------------------------------------------------------------- storages
def _legacy_places(cursor: _Cursor, keys: Any, storages: Mapping[str, _Storage], big: bool) -> dict[str, int]:
    """key -> position of its first byte. The counts in the file must be those of the pickle."""
    places = {}
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.dtype not in DTYPES:
            raise FileError(f"storage {key!r} has an unknown type; what follows it cannot be found.")
        count = int.from_bytes(cursor.read(8), "big" if big else "little")
        size = count * DTYPES[storage.dtype].itemsize
        if count != storage.size:
            raise FileError(f"storage {key!r} should hold {storage.size} numbers and says {count}.")
        places[key] = cursor.tell()
        cursor._at += size
    return places


def _read_zip_view(path: Path, prefix: str, big: bool, view: _View, name: str) -> np.ndarray:
    kind = _checked(view, name)
    member = f"{prefix}data/{view.storage.key}"
    with reading(path, "PyTorch zip"), zipfile.ZipFile(path) as archive:
        if member not in archive.NameToInfo:
            raise FileError(f"{path}: {name} refers to {member}, which is missing.")
        whole = view.storage.size * kind.itemsize
        if view.dtype != view.storage.dtype:  # an untyped storage counts bytes
            whole = view.storage.size
        with archive.open(member) as file:
            data = file.read(whole + 1)  # read to its end, so that its checksum is compared
        if len(data) != whole:
            raise FileError(f"{path}: {member} holds {len(data)} bytes or more, expected {whole}.")
    return _strided(data, view, kind, big)


def _read_legacy_view(
    path: Path, memory: Any, where: Mapping[str, int], big: bool, view: _View, name: str
) -> np.ndarray:
    kind = _checked(view, name)
    with reading(path, "PyTorch legacy"):
        if view.storage.key not in where:
            raise FileError(f"{path}: {name} refers to a storage that is missing.")
        begin = where[view.storage.key] + view.storage.begin * kind.itemsize
        whole = view.storage.size * kind.itemsize
        data = memory[begin : begin + whole]
        if len(data) != whole:
            raise FileError(f"{path} is cut off: {name} needs {whole} bytes from {begin} on, {len(data)} are there.")
    return _strided(data, view, kind, big)


def _checked(view: _View, name: str) -> np.dtype:
    """The numpy type of a view that lies inside its storage. Raises FileError otherwise."""
    if view.dtype not in DTYPES:
        raise FileError(f"{name} holds {view.dtype}, which is not read (quantised or packed): save it as float32.")
    kind = DTYPES[view.dtype]
    storage = view.storage.size
    if view.dtype != view.storage.dtype:
        storage //= kind.itemsize
    bad = [n for n in (view.offset, *view.strides) if isinstance(n, bool) or not isinstance(n, int) or n < 0]
    if bad or len(view.strides) != len(view.shape):
        raise FileError(
            f"{name}: offset {view.offset!r} and strides {view.strides!r} are no view; the file is damaged."
        )
    count = math.prod(view.shape)
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    if count and (last >= storage or count > storage):
        raise FileError(f"{name} of shape {list(view.shape)} does not fit its storage of {storage} numbers.")
    return kind


def _strided(data: bytes, view: _View, kind: np.dtype, big: bool) -> np.ndarray:
    if big and kind.itemsize > 1:
        words = np.frombuffer(data, f">u{min(kind.itemsize, 8)}")
        data = words.astype(words.dtype.newbyteorder("<")).tobytes()
    flat = np.frombuffer(data, kind)[view.offset :]
    steps = tuple(s * kind.itemsize for s in view.strides)
    if 0 in view.shape:
        return plain(np.empty(view.shape, kind))
    return plain(np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, view.shape, steps)))
