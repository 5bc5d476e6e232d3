"""Orbax folders, as other projects write them: every array by its path in the tree, read when it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from protojax.audit.directories import not_finite
from protojax.audit.files import load_features, load_prototypes, open_tensors
from protojax.audit.tensors import FileError
from protojax.cli import main
from tests.audit.writers import BFLOAT16, rows


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """A tree of arrays below runs/10/state, as a checkpoint manager lays it out; the path is relative."""
    monkeypatch.chdir(tmp_path)
    tree = {
        "teacher": {"prototypes": {"weight": rows(0, 20, 6).astype(BFLOAT16)}, "mlp": [rows(1, 6, 8), rows(2, 8, 6)]},
        "features": rows(3, 50, 6),
        "step": np.int32(10),
    }
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "runs" / "10" / "state", tree)
    return Path("runs/10")


def test_an_orbax_folder_is_audited_from_any_path(saved, capsys):
    expected = rows(0, 20, 6).astype(BFLOAT16).astype(np.float32)
    for path in (saved, saved / "state", saved.resolve()):
        found = load_prototypes(path)
        np.testing.assert_array_equal(found.rows, expected)
        assert (found.format, found.key, found.dtype) == ("Orbax checkpoint", "teacher.prototypes.weight", "bfloat16")
    np.testing.assert_array_equal(open_tensors(saved).tensors["teacher.mlp.1"].read(), rows(2, 8, 6))
    np.testing.assert_array_equal(load_features(saved), rows(3, 50, 6))
    assert main(["audit", str(saved), f"--features={saved}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prototypes"], result["rows"], result["key"]) == (20, 50, "teacher.prototypes.weight")
    assert not_finite(saved) == []


def test_a_damaged_orbax_folder_is_refused(saved):
    for path in sorted(saved.rglob("*")):
        if path.is_file() and path.name not in ("_METADATA", "_CHECKPOINT_METADATA", "_sharding"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for read in (load_prototypes, not_finite):
        with pytest.raises(FileError, match="truncated or damaged"):
            read(saved)
    for path in saved.rglob("_METADATA"):
        path.write_text("{")
    for read in (load_prototypes, not_finite):
        with pytest.raises(FileError, match="truncated or damaged"):
            read(saved)
    with pytest.raises(FileError, match="a folder without a checkpoint: expected one that holds _METADATA"):
        not_finite(Path("."))
