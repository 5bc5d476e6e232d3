"""Readers give the numbers that were written, in every format and dtype, and refuse what is not whole or not plain."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest

from protojax.audit.files import load_features, load_prototypes, open_tensors
from protojax.audit.tensors import FileError
from tests.audit.writers import BFLOAT16, Call, Name, Persistent, Saver, opcodes, pickled, rows, safetensors


def save(kind: str, path, arrays: dict[str, np.ndarray]):
    if kind == "safetensors":
        return safetensors(path, arrays)
    if kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **arrays)
        return path
    saver = Saver()
    state = {name: saver.tensor(array) for name, array in arrays.items()}
    return getattr(saver, kind)(path, {"state_dict": state, "epoch": 3})


FORMATS = ("zip", "legacy", "safetensors", "npz")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16], ids=lambda d: np.dtype(d).name)
def test_rows_come_back_as_they_were_written(kind, dtype, tmp_path):
    """Whatever the file is called. float16 and bfloat16 become float32, exactly."""
    if kind == "npz" and dtype is BFLOAT16:
        dtype = np.float32  # NumPy's own format has no bfloat16
    written = rows(0, 12, 5, dtype)
    path = save(kind, tmp_path / "checkpoint.bin", {"other": rows(1, 3, 4, dtype), "prototypes": written})
    found = load_prototypes(path)
    wide = np.float64 if dtype is np.float64 else np.float32
    assert found.rows.dtype == wide
    np.testing.assert_array_equal(found.rows, written.astype(wide))
    assert found.dtype == np.dtype(dtype).name


def test_npy_and_fortran_order(tmp_path):
    written = rows(0, 9, 4)
    np.save(tmp_path / "a.npy", np.asfortranarray(written))
    found = load_prototypes(tmp_path / "a.npy")
    np.testing.assert_array_equal(found.rows, written)
    assert found.layout == "the only matrix in the file"


def test_views_of_a_storage_are_strided(tmp_path):
    """A transposed and an offset view of one storage, in both containers."""
    base = np.arange(40, dtype=np.float32)
    for kind in ("zip", "legacy"):
        saver = Saver()
        storage = saver.storage(base)
        state = {"turned": saver.view(storage, 0, (5, 8), (1, 5)), "late": saver.view(storage, 4, (4, 3), (8, 2))}
        tensors = open_tensors(getattr(saver, kind)(tmp_path / kind, state)).tensors
        np.testing.assert_array_equal(tensors["turned"].read(), base.reshape(8, 5).T)
        np.testing.assert_array_equal(tensors["late"].read(), base[4:36].reshape(4, 8)[:, :6:2])


def test_a_pickled_module_is_read_by_the_names_of_its_state_dict(tmp_path):
    """`torch.save(model)`: parameters, buffers and children lie in records of unknown classes, which are not needed."""
    saver = Saver()
    weight = rows(0, 6, 4)
    empty = Call(Name("collections", "OrderedDict"))
    layer = Call(Name("my.project", "Head"), (), {"_parameters": {"weight": saver.tensor(weight)}, "_buffers": empty})
    model = Call(Name("my.project", "Net"), (), {"_parameters": empty, "_modules": {"prototypes": layer}})
    found = load_prototypes(
        saver.zip(tmp_path / "model.pt", {"model": model, "args": Call(Name("argparse", "Namespace"))})
    )
    np.testing.assert_array_equal(found.rows, weight)
    assert (found.key, found.layout) == ("model.prototypes.weight", "SwAV")


def test_big_endian_checkpoints_are_turned(tmp_path):
    saver = Saver()
    written = rows(0, 6, 4)
    value = {"prototypes": saver.tensor(written)}
    saver.storages = [written.astype(">f4").reshape(-1)]
    path = tmp_path / "big.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled(value))
        archive.writestr("x/byteorder", "big")
        archive.writestr("x/data/0", saver.storages[0].tobytes())
    np.testing.assert_array_equal(load_prototypes(path).rows, written)


# ---------------------------------------------------------------------------------------------------- refused
OS_SYSTEM = Call(Name("posix", "system"), ("touch /tmp/protojax-was-here",))
MALICIOUS = {
    "REDUCE": OS_SYSTEM,
    "eval": Call(Name("builtins", "eval"), ("1+1",)),
    "old name": Call(Name("__builtin__", "exec"), ("pass",)),
    "dotted name": Call(Name("torch.serialization", "os.system"), ("true",)),
    "computed function": Call(Call(Name("my.lib", "getter"), ("system",)), ("true",)),
    "subprocess": Call(Name("subprocess", "Popen"), (["true"],)),
    "inside a tensor": {"prototypes": Call(Name("torch._utils", "_rebuild_tensor_v2"), (OS_SYSTEM, 0, (2, 2), (2, 1)))},
    "STACK_GLOBAL": opcodes("os") + opcodes("system") + b"\x93" + opcodes(("true",)) + b"R",
    "INST": b"(" + opcodes("true") + b"ios\nsystem\n",
    "OBJ": b"(" + opcodes(Name("os", "system")) + opcodes("true") + b"o",
    "NEWOBJ": opcodes(Name("subprocess", "Popen")) + opcodes(("true",)) + b"\x81",
    "import": Call(Name("importlib", "import_module"), ("os",)),
}


@pytest.mark.parametrize("name", MALICIOUS)
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused(name, kind, tmp_path, monkeypatch):
    import os
    import subprocess

    ran = []
    for module, function in ((os, "system"), (subprocess, "Popen")):
        monkeypatch.setattr(module, function, lambda *a, **k: ran.append(a))
    path = getattr(Saver(), kind)(tmp_path / "bad.pth", MALICIOUS[name])
    with pytest.raises(FileError, match=r"Nothing was run"):
        open_tensors(path)
    assert not ran


def test_unknown_classes_stay_records_and_setstate_is_not_called(tmp_path):
    """Configurations of OmegaConf, loggers of a project: neither imported nor built, whatever they are."""
    saver = Saver()
    config = Call(Name("omegaconf.dictconfig", "DictConfig"), (), {"_content": {"lr": 1.0}})
    state = {"prototypes": saver.tensor(rows(0, 4, 3)), "cfg": config, "log": Call(Name("no.such", "thing"), (1, 2))}
    assert list(open_tensors(saver.zip(tmp_path / "c.pth", state)).tensors) == ["prototypes"]


def test_extension_registry_and_out_of_band_buffers_are_refused(tmp_path):
    for opcode in (b"\x82\x01", b"\x97"):
        path = Saver().zip(tmp_path / "e.pth", opcode)
        with pytest.raises(FileError, match="belongs to no checkpoint"):
            open_tensors(path)


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def encrypted(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled({}))
    data = bytearray(path.read_bytes())
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + at] |= 1
    return write(path, bytes(data))


def with_view(path, view):
    saver = Saver()
    storage = saver.storage(np.zeros(12, np.float32))
    return saver.zip(path, {"prototypes": saver.view(storage, *view)})


def safe(path, **changes):
    entry = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]} | changes
    text = ('{"prototypes": ' + str(entry).replace("'", '"') + "}").encode()
    return write(path, struct.pack("<Q", len(text)) + text + bytes(48))


def archive_of(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "/", 1), data)
    return path


def objects(path):
    np.save(path, np.array([{}, 1], object), allow_pickle=True)
    return path


def huge_npy(path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 256)})
    return write(path, buffer.getvalue())


def lost_storage(path):
    kind = Name("torch", "FloatStorage")
    storage = Persistent(("storage", kind, "7", "cpu", 12))
    return Saver().zip(path, {"prototypes": Saver.view(storage, 0, (4, 3), (3, 1))})


def short_storage(path):
    saver = Saver()
    value = {"prototypes": saver.tensor(rows(0, 4, 3))}
    saver.storages[0] = saver.storages[0][:5]
    return saver.zip(path, value)


def quantised(path):
    storage = Persistent(("storage", Name("torch", "QInt8Storage"), "0", "cpu", 12))
    return Saver().zip(path, {"prototypes": Saver.view(storage, 0, (4, 3), (3, 1))})


BAD = {
    "no file": (lambda p: p, "no file"),
    "empty": (lambda p: write(p, b""), "is empty"),
    "a folder": (lambda p: p.mkdir() or p, "a folder without a checkpoint"),
    "html": (lambda p: write(p, b"<!DOCTYPE html>"), "an HTML page: the download failed"),
    "hdf5": (lambda p: write(p, b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "lfs": (lambda p: write(p, b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "tar": (lambda p: write(p, bytes(257) + b"ustar" + bytes(300)), "a tar archive"),
    "noise": (lambda p: write(p, b"\x01\x02\x03\x04" * 9), "no format that is known"),
    "plain pickle": (lambda p: write(p, pickled({"a": 1})), "not one that torch.save wrote"),
    "another zip": (lambda p: archive_of(p, readme="hello"), "a zip archive without arrays or a checkpoint"),
    "encrypted": (encrypted, "is encrypted"),
    "two pickles": (lambda p: archive_of(p, **{"a_data.pkl": b"", "b_data.pkl": b""}), "2 objects named data.pkl"),
    "objects": (objects, "holds Python objects"),
    "huge": (huge_npy, "would need 954 GiB"),
    "cut header": (lambda p: write(p, struct.pack("<Q", 999) + b"{}"), "is cut off or no safetensors"),
    "offsets outside": (lambda p: safe(p, data_offsets=[0, 4800]), "ends at byte"),
    "offsets backwards": (lambda p: safe(p, data_offsets=[48, 0]), "has the offsets"),
    "size of data": (lambda p: safe(p, shape=[4, 4]), "has 48 bytes of data"),
    "shape of -1": (lambda p: safe(p, shape=[-1, 3]), "is no shape"),
    "view outside": (lambda p: with_view(p, (4, (4, 3), (3, 1))), "does not fit its storage of 12"),
    "expanded view": (lambda p: with_view(p, (0, (400, 3), (0, 1))), "does not fit its storage of 12"),
    "negative stride": (lambda p: with_view(p, (11, (4, 3), (-3, 1))), "are no view"),
    "lost storage": (lost_storage, "is missing"),
    "short storage": (short_storage, "holds 20 bytes or more, expected 48"),
    "quantised": (quantised, "QInt8Storage, which is not read|no matrix"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_named(name, tmp_path):
    make, message = BAD[name]
    path = make(tmp_path / "given.npy" if name in ("objects", "huge") else tmp_path / "given")
    with pytest.raises(FileError, match=message):
        load_prototypes(path)


def test_a_file_cut_at_any_place_is_refused(tmp_path):
    """Every prefix of every format. A cut may leave a tensor whole in front of it, never a wrong one."""
    written = rows(0, 4, 3)
    for kind in FORMATS:
        whole = save(kind, tmp_path / kind, {"prototypes": written}).read_bytes()
        for end in range(1, len(whole), 7):
            path = write(tmp_path / "cut", whole[:end])
            with pytest.raises(FileError):
                load_prototypes(path)


def test_features_are_one_matrix(tmp_path):
    np.savez(tmp_path / "f.npz", features=rows(0, 5, 4), labels=np.arange(5), others=rows(1, 2, 4))
    np.testing.assert_array_equal(load_features(tmp_path / "f.npz"), rows(0, 5, 4))
    np.savez(tmp_path / "g.npz", first=rows(0, 5, 4), second=rows(1, 2, 4))
    with pytest.raises(FileError, match=r"expected one matrix of features .*first \[5, 4\], second \[2, 4\]"):
        load_features(tmp_path / "g.npz")
