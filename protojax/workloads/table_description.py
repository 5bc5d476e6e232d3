"""`table.json` of a run: columns, statistics and categories of its training table; without them the inputs of its model
cannot be prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from protojax import metrics
from protojax.data import tables
from protojax.data.tables import Preparation, Table

FILE = "table.json"


def write(workdir: Path, train: Table, preparation: Preparation | None) -> None:
    """The description of the training split in a run's folder."""
    known = {
        "preparation": None if preparation is None else preparation.plain(),
        "categories": list(train.categories),
        "columns": {k: str(v[0]) if v.dtype.kind not in "fiub" else 0.0 for k, v in train.columns.items()},
        "graph": {k: list(v.shape[1:]) for k, v in train.graph.items()},
        "image": None if train.images is None else list(train.images.shape[1:]),
        "mean_target": train.targets.mean(axis=0).tolist(),
    }
    metrics.write_json(Path(workdir) / FILE, known)


def read(workdir: Path) -> dict[str, Any]:
    """What `write` left, the preparation ready for use. Raises FileNotFoundError when it is missing."""
    path = Path(workdir) / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: without it the inputs of this model cannot be prepared.")
    plain = json.loads(path.read_text())
    plain["preparation"] = None if plain["preparation"] is None else tables.read_preparation(plain["preparation"])
    return plain
