"""A folder of weights as Hugging Face lays it out: config.json and safetensors, in one file or in shards.

Files are read by `protojax.audit`: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protojax.audit.arrays import read_safetensors
from protojax.audit.files import open_tensors
from protojax.audit.tensors import FileError, Tensor
from protojax.models.pretrained.config import ImageTextConfig, read_config
from protojax.models.pretrained.tensors import check_tensors, expected_tensors, to_variables

SINGLE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


class Weights(NamedTuple):
    """variables: {'image', 'text', 'logit_scale', 'logit_bias'}, float32. digest: of the config and every number."""

    config: ImageTextConfig
    variables: dict[str, Any]
    digest: str


def open_weights(folder: str | Path) -> Weights:
    """The towers of a folder, whatever floating-point type it stores, as float32.

    Raises ValueError for a missing folder or file, another architecture, files that are cut off, and tensors that are
    missing, have no place, or have another shape than config.json says.
    """
    folder = check_folder(folder)
    config = read_config(read_json(folder, "config.json"))
    tensors = _tensors(folder)
    check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()})
    digest = hashlib.blake2b(repr(config).encode(), digest_size=4)

    def read(name: str) -> np.ndarray:
        values = tensors[name].read()
        if values.dtype.kind != "f":
            raise ValueError(
                f"{folder}: {name} holds {values.dtype}, expected floating-point numbers: take the weights before they "
                "were quantised"
            )
        return np.asarray(values, np.float32)

    for name in sorted(expected_tensors(config)):
        digest.update(np.ascontiguousarray(read(name)).tobytes())
    return Weights(config, to_variables(config, read), digest.hexdigest())


def check_folder(folder: str | Path) -> Path:
    """The folder with ~ expanded. Raises ValueError when it is missing or a file."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(
            f"--weights={folder} {what}; expected a folder that holds config.json, {SINGLE} and the tokenizer's files, "
            "as `huggingface-cli download MODEL --local-dir FOLDER` makes it"
        )
    return path


def read_json(folder: Path, name: str, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object of the folder; {} when it is missing and optional. Raises ValueError otherwise."""
    path = folder / name
    if not path.is_file():
        if optional:
            return {}
        raise ValueError(f"{folder} holds no {name}; it holds {_held(folder)}. Copy it from the page of the model")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected an object; download it again")
    return found


def _held(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE).tensors
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / PICKLED).is_file():
        return open_tensors(folder / PICKLED).tensors
    raise ValueError(f"{folder} holds no weights: expected {SINGLE}, {INDEX} with its shards, or {PICKLED}; it holds "
                     f"{_held(folder)}")  # fmt: skip


def _sharded(folder: Path) -> dict[str, Tensor]:
    """The tensors of all shards that the index names."""
    places = read_json(folder, INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{folder / INDEX} has no 'weight_map' of tensor names and files; download it again")
    shards = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise FileError(f"{folder / INDEX} names {file!r}, which is no file of this folder")
        if not (folder / file).is_file():
            raise ValueError(f"{folder / INDEX} names {file}, which is missing: download all shards")
        shards[file] = read_safetensors(folder / file).tensors
    lost = [name for name, file in places.items() if name not in shards[file]]
    if lost:
        raise ValueError(
            f"{places[lost[0]]} lacks {lost[0]}, which {INDEX} places there ({len(lost)} such): the shards are of "
            "another version than the index; download both again"
        )
    return {name: shards[file][name] for name, file in places.items()}
