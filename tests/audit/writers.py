"""Checkpoint files of other projects, written without them: a small pickle assembler and PyTorch's two containers."""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Name:
    """A global: module and name."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """REDUCE of a function (a Name, or anything else) with arguments; state: BUILD afterwards."""

    function: Any
    arguments: tuple = ()
    state: Any = None


@dataclass(frozen=True)
class Persistent:
    identity: tuple


STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage",
            "float64": "DoubleStorage"}  # fmt: skip


def opcodes(value: Any) -> bytes:
    """Protocol 2, without memo."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(k) + opcodes(v) for k, v in value.items()) + b"u"
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Persistent):
        return opcodes(value.identity) + b"Q"
    if isinstance(value, Call):
        made = opcodes(value.function) + opcodes(value.arguments) + b"R"
        return made if value.state is None else made + opcodes(value.state) + b"b"
    if isinstance(value, bytes):  # opcodes as they are
        return value
    raise TypeError(value)


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


class Saver:
    """Collects storages while a state dict is built: `tensor` for each array, then `zip` or `legacy`."""

    def __init__(self) -> None:
        self.storages: list[np.ndarray] = []

    def storage(self, array: np.ndarray) -> Persistent:
        self.storages.append(np.ascontiguousarray(array).reshape(-1))
        key, kind = str(len(self.storages) - 1), Name("torch", STORAGES[array.dtype.name])
        return Persistent(("storage", kind, key, "cpu", array.size))

    def tensor(self, array: np.ndarray) -> Call:
        strides = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides)
        return self.view(self.storage(array), 0, array.shape, strides)

    @staticmethod
    def view(storage: Persistent, offset: int, shape: tuple, strides: tuple) -> Call:
        hooks = Call(Name("collections", "OrderedDict"))
        return Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, hooks))

    def zip(self, path: Path, value: Any, name: str = "archive") -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}/data.pkl", pickled(value))
            archive.writestr(f"{name}/byteorder", "little")
            for key, data in enumerate(self.storages):
                archive.writestr(f"{name}/data/{key}", data.tobytes())
            archive.writestr(f"{name}/version", "3\n")
        return path

    def legacy(self, path: Path, value: Any) -> Path:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        keys = [str(i) for i in range(len(self.storages))]
        parts = [pickled(v) for v in (0x1950A86A20F9469CFC6C, 1001, system, value, keys)]
        parts += [struct.pack("<q", data.size) + data.tobytes() for data in self.storages]
        path.write_bytes(b"".join(parts))
        return path


def safetensors(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    at = 0
    for name, array in arrays.items():
        end = at + array.nbytes
        header[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in arrays.values()))
    return path


def rows(seed: int, count: int, width: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(dtype)


BFLOAT16 = ml_dtypes.bfloat16
