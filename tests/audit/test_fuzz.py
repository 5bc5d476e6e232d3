"""Thousands of mutated files: either a tensor comes back or a FileError, nothing else, and nothing runs."""

from __future__ import annotations

import numpy as np
import pytest

from protojax.audit import layers
from protojax.audit.files import open_tensors
from protojax.audit.tensors import FileError
from tests.audit.test_readers import FORMATS, save
from tests.audit.writers import pickled, rows

MUTANTS = 600
# Opcodes that do the most: a mutation that places one of them reaches further than a random byte.
LOUD = b"\x80\x93\x81\x92RbcioQPtauesd}](0122q\x94h.\x8a\x8b\x95\x97\x82X\x8d"


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    kind = rng.integers(5)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(out)))
        if kind == 0:
            out[at] = int(rng.integers(256))
        elif kind == 1:
            out[at] = LOUD[int(rng.integers(len(LOUD)))]
        elif kind == 2:
            out[at : at + 4] = (
                rng.integers(0, 256, 4, np.uint8).tobytes() if rng.random() < 0.5 else b"\xff\xff\xff\x7f"
            )
        elif kind == 3:
            del out[at : at + int(rng.integers(1, 30))]
        else:
            out[at:at] = out[int(rng.integers(len(out))) :][: int(rng.integers(1, 40))]
        if not out:
            return b"\x80"
    return bytes(out)


@pytest.mark.parametrize("kind", [*FORMATS, "npy"])
def test_mutated_files_give_tensors_or_a_file_error(kind, tmp_path):
    rng = np.random.default_rng(FORMATS.index(kind) if kind in FORMATS else 9)
    path = tmp_path / "base.npy"
    if kind == "npy":
        np.save(path, rows(0, 6, 4))
    else:
        save(kind, path, {"teacher.prototypes.weight": rows(0, 6, 4), "student.other": rows(1, 3, 3)})
    base, outcomes = path.read_bytes(), {"read": 0, "refused": 0}
    for _ in range(MUTANTS):
        path.write_bytes(mutated(base, rng))
        try:
            tensors = open_tensors(path).tensors
            layers.rows_of(tensors, layers.find(tensors))
            outcomes["read"] += 1
        except FileError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > MUTANTS / 4


def test_deep_and_growing_pickles_end(tmp_path):
    """Nesting a million deep, and a list that holds itself many times over, neither recurse nor grow."""
    deep = b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b"."
    wide = b"\x80\x02](" + b"q\x01" + b"".join(b"](h\x01h\x01e\x71\x01" for _ in range(60)) + b"e."
    keys = b"\x80\x02}(" + b"(" * 5000 + b"t" * 5000 + b"K\x01u."
    magic = pickled(0x1950A86A20F9469CFC6C) + pickled(1001) + pickled({})
    for body in (deep, wide, keys):
        path = tmp_path / "bomb.pth"
        path.write_bytes(magic + body + pickled([]))
        with pytest.raises(FileError, match=r"no matrix|truncated|nested so deep"):
            layers.find(open_tensors(path).tensors)
