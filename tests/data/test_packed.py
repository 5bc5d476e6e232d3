"""A packed copy gives the same records, goes on where it stopped, and notices what does not belong to it."""

from __future__ import annotations

import errno
import json
import os
import pickle
import time

import numpy as np
import pytest
from PIL import Image

from protojax.data import make_source, open_records, packed
from protojax.data.records import from_arrays


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Eleven small files, one of them damaged; chunks of four."""
    monkeypatch.setattr(packed, "CHUNK", 4)
    rng = np.random.default_rng(0)
    for i in range(11):
        folder = tmp_path / "photos" / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        shape = (8 + i, 12, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (tmp_path / "photos" / "train" / "class0" / "04.png").write_bytes(b"not an image")
    return {"root": tmp_path / "photos", "canvas": 6, "fit": "whole"}, tmp_path / "packed"


def same(one, other) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[k], other[k]) for k in one)


def test_the_copy_gives_the_same_batches_also_in_another_process(photos):
    options, folder = photos
    plain = open_records("image_folder", "train", **options)
    copy = open_records("image_folder", "train", **options, packed=folder)
    again = open_records("image_folder", "train", **options, packed=folder)  # from the files alone
    for records in (copy, again, copy._replace(read=pickle.loads(pickle.dumps(copy.read)))):
        for remainder in ("wrap", "pad"):
            a, b = (
                make_source(r, batch_size=4, shuffle=remainder == "wrap", remainder=remainder) for r in (plain, records)
            )
            assert all(same(a.batch(step), b.batch(step)) for step in range(6))
    assert (folder / "photos-train.images").stat().st_size == 11 * 6 * 6 * 3
    assert not list(folder.glob("*.lock"))


def test_an_interrupted_build_goes_on(photos):
    options, folder = photos
    records = open_records("image_folder", "train", **options)
    asked: list[int] = []

    def until(count: int):
        def read(rows):
            if len(asked) >= count:
                raise KeyboardInterrupt
            asked.append(int(rows[0]))
            return records.read(rows)

        return records._replace(read=read)

    with pytest.raises(KeyboardInterrupt):
        packed.pack(until(2), folder, progress=False)
    assert set(json.loads((folder / "photos-train.json").read_text())["chunks"]) == {"0", "1"}
    copy = packed.pack(until(9), folder, progress=False)
    assert asked == [0, 4, 8]  # nothing is decoded twice
    assert same(copy.take(np.arange(11)), records.take(np.arange(11)))


def test_a_dead_builders_lock_is_taken_over_and_a_living_one_is_waited_for(photos, monkeypatch):
    options, folder = photos
    folder.mkdir()
    lock = folder / "photos-train.lock"
    lock.touch()
    with pytest.raises(TimeoutError, match="another process has not finished packing"):
        packed.pack(open_records("image_folder", "train", **options), folder, wait=0.0)
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    monkeypatch.setattr(packed.time, "sleep", lambda seconds: None)
    assert open_records("image_folder", "train", **options, packed=folder).size == 11


def test_other_data_and_changed_bytes_are_refused(photos):
    options, folder = photos
    open_records("image_folder", "train", **options, packed=folder)
    with pytest.raises(ValueError, match=r"packed from other data \(different: content\)"):
        open_records("image_folder", "train", **{**options, "canvas": 7}, packed=folder)
    path = folder / "photos-train.images"
    data = bytearray(path.read_bytes())
    data[5 * 108] ^= 1
    path.write_bytes(bytes(data))
    copy = open_records("image_folder", "train", **options, packed=folder)
    copy.take(np.arange(4))
    with pytest.raises(ValueError, match=r"changed on disk \(images 4 and following\); delete photos-train\.\*"):
        copy.take(np.array([7]))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_loses_nothing(photos, monkeypatch, code):
    options, folder = photos
    records = open_records("image_folder", "train", **options)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))
        replace(source, target)

    monkeypatch.setattr(packed.os, "replace", failing)
    with pytest.raises(OSError, match=r"cannot pack photos/train .*the copy takes 0\.00 GB, .*packed so far is kept"):
        packed.pack(records, folder, progress=False)
    monkeypatch.setattr(packed.os, "replace", replace)
    assert len(json.loads((folder / "photos-train.json").read_text())["chunks"]) == 1
    assert same(packed.pack(records, folder, progress=False).take(np.arange(11)), records.take(np.arange(11)))


def test_bytes_needed():
    assert packed.bytes_needed(from_arrays("a", np.zeros((5, 4, 3, 3), np.uint8), {})) == 5 * 36
