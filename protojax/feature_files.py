"""Features on disk: what `protojax embed` writes and other programs read.

npz: `backbone` float32 [M,F], `image` float32 [M,D], `positions` int64 [M] (where in the split), for each label key
`labels_KEY` int64 [M] and `classes_KEY` (names in label order), `protocol` (its hash) and `about` (JSON text:
checkpoint, source, protocol). Parquet: the same as columns, a vector a row; `protocol`, `about` and `classes_KEY` are
in the metadata of the schema, under 'protojax.'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from protojax.api import FeatureBank, SourceSpec

SUFFIXES = (".npz", ".parquet")


def check_target(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raises ValueError for another suffix, a missing folder, or Parquet without pyarrow: before any computing."""
    if path.suffix not in suffixes:
        raise ValueError(f"--out={path}: expected a name that ends in {' or '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise ValueError(f"--out={path}: there is no folder {path.parent}; make it first.")
    if path.suffix == ".parquet":
        _pyarrow()


def write(path: Path, bank: FeatureBank, spec: SourceSpec, about: Mapping[str, Any]) -> None:
    """The file, as its suffix says. about: JSON types, with the protocol's record under 'protocol'."""
    check_target(path)
    columns: dict[str, np.ndarray] = {"positions": bank.positions}
    columns |= {f"labels_{key}": values for key, values in bank.labels.items()}
    columns |= {"backbone": bank.backbone, "image": bank.image}
    texts = {"protocol": about["protocol"]["hash"], "about": json.dumps(about, sort_keys=True)}
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {**columns, **{k: np.array(v) for k, v in texts.items()}}
        arrays |= {f"classes_{key}": np.array(spec.classes[key], np.str_) for key in bank.labels}
        with path.open("wb") as file:
            np.savez(file, **arrays)
        return
    pyarrow, parquet = _pyarrow()
    texts |= {f"classes_{key}": json.dumps(list(spec.classes[key])) for key in bank.labels}
    fields = {name: _column(pyarrow, values) for name, values in columns.items()}
    table = pyarrow.table(fields).replace_schema_metadata({f"protojax.{k}": v for k, v in texts.items()})
    parquet.write_table(table, path)


def _column(pyarrow: Any, values: np.ndarray) -> Any:
    if values.ndim == 1:
        return pyarrow.array(values)
    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            "writing Parquet needs pyarrow, which is not installed: pip install pyarrow, or write --out=features.npz."
        ) from None
    return pyarrow, parquet
