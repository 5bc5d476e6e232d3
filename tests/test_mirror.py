"""A run is copied to another place and goes on from there: the machine gone, a copy cut short, a copy damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from protojax import mirror as mirror_lib
from protojax import running
from protojax.checkpoint import Checkpoints
from protojax.mirror import COMPLETE, Mirror, MirrorError, following
from tests.toy import toy_config

URL = "s3://bucket/run"


class Store(MemoryFileSystem):
    """An object store in memory under the address of a real one; `refuse` makes writes of these names fail."""

    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refuse = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("s3://"))

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if "w" in mode and self.refuse and self.refuse in path:
            raise PermissionError(f"AccessDenied: {path}")
        return super()._open(path, mode, **more)


@pytest.fixture
def store(monkeypatch):
    """The fake in the place of S3, for epath and for us."""
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Store)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Store.clear_instance_cache()
    Store.store, Store.pseudo_dirs, Store.refuse = {}, [""], ""
    yield Store(skip_instance_cache=True)
    backend.fsspec_backend._get_filesystem.cache_clear()


def state(seed: int) -> dict[str, jax.Array]:
    return {"w": jax.random.normal(jax.random.key(seed), (300,))}


def save(workdir: Path, mirror: Mirror, *steps: int) -> None:
    saved = Checkpoints(workdir / "checkpoints", written=mirror.later)
    for step in steps:
        saved.save(step, state(step), {})
        saved.wait()
    saved.close()


def there(store: Store) -> list[str]:
    return sorted(name.removeprefix("/bucket/run/") for name in store.store)


def complete(store: Store) -> list[int]:
    return [int(n.split("/")[1].removesuffix(COMPLETE)) for n in there(store) if n.endswith(COMPLETE)]


def restored(workdir: Path, step: int) -> np.ndarray:
    found = Checkpoints(workdir / "checkpoints", read_only=True)
    try:
        return np.asarray(found.restore(step, jax.eval_shape(lambda: state(0)))["w"])
    finally:
        found.close()


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("left", ["nothing", "a file", "an empty folder"])
def test_a_checkpoint_may_go_while_it_is_copied(tmp_path, store, monkeypatch, left, newer):
    """Old checkpoints are removed when newer ones are complete: then no half copy stays, nothing is said, and the newer
    one is copied. If there is none, the loss is said."""
    said: list[str] = []
    folder = tmp_path / "checkpoints"
    for step in (1, 2) if newer else (1,):
        for name in ("a", "b"):
            (folder / str(step) / "d").mkdir(parents=True, exist_ok=True)
            (folder / str(step) / "d" / name).write_text("x")
    copy = mirror_lib._copy

    def racing(source, target):
        if folder / "1" in Path(source).parents:
            if left == "nothing":
                shutil.rmtree(folder / "1", ignore_errors=True)
            else:
                for name in ("a", "b") if left == "an empty folder" else ("a",):
                    (folder / "1" / "d" / name).unlink(missing_ok=True)
        copy(source, target)

    monkeypatch.setattr(mirror_lib, "_copy", racing)
    mirror = Mirror(URL, tmp_path, said.append)
    for step in (1, 2) if newer else (1,):
        mirror.later(folder / str(step))
    mirror._wait()
    mirror.close()
    if newer:
        assert (said, complete(store)) == ([], [2])
        assert not [name for name in there(store) if name.startswith("checkpoints/1")]
    else:
        assert len(said) == 1
        assert "FileNotFoundError" in said[0]
        assert complete(store) == []


def test_files_beside_checkpoints_are_found_without_entering_these(tmp_path, monkeypatch):
    """A checkpoint may be deleted while the files are listed."""
    names = ("checkpoints/1/state/x", "best/2/state", ".tmp-fetch/1", "damaged-1/state", "metrics.jsonl", "config.tmp",
             "tensorboard/events", "tensorboard/deep/events", "report.html")  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    entered, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(Path(path).name) or scan(path))
    assert mirror_lib._besides(tmp_path) == [
        "metrics.jsonl", "report.html", "tensorboard/deep/events", "tensorboard/events"
    ]  # fmt: skip
    assert entered == [tmp_path.name, "tensorboard", "deep"]


def test_what_is_copied_comes_back_on_an_empty_machine_and_old_copies_go(tmp_path, store):
    said: list[str] = []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 0}\n')
    with following(URL, tmp_path / "a", said.append) as mirror:
        save(tmp_path / "a", mirror, 1, 2, 3)
        (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 3}\n')
    assert complete(store) == [2, 3]
    assert {n.split("/")[1] for n in there(store) if n.startswith("checkpoints/")} == {
        "2",
        "3",
        f"2{COMPLETE}",
        f"3{COMPLETE}",
    }
    with following(URL, tmp_path / "b", said.append):
        np.testing.assert_array_equal(restored(tmp_path / "b", 3), state(3)["w"])
        assert (tmp_path / "b" / "metrics.jsonl").read_text() == '{"step": 3}\n'
    assert said == [f"fetched the checkpoint of step 3 from {URL}"]
    with following(URL, tmp_path / "b", said.append):  # nothing newer is there
        pass
    assert len(said) == 1


def test_a_copy_that_was_cut_short_does_not_count_and_is_made_again(tmp_path, store):
    with following(URL, tmp_path / "a", print) as mirror:
        save(tmp_path / "a", mirror, 1, 2)
    store.rm_file(f"/bucket/run/checkpoints/2{COMPLETE}")
    with following(URL, tmp_path / "b", print):
        assert Checkpoints(tmp_path / "b" / "checkpoints", read_only=True).steps() == [1]
    with following(URL, tmp_path / "a", print):
        pass
    assert 2 in complete(store)


def test_a_damaged_copy_is_passed_over_and_none_at_all_is_an_error(tmp_path, store):
    with following(URL, tmp_path / "a", print) as mirror:
        save(tmp_path / "a", mirror, 1, 2)

    def damage(step: int) -> None:
        name = next(n for n in there(store) if n.startswith(f"checkpoints/{step}/") and "/d/" in n)
        store.pipe_file(f"/bucket/run/{name}", b"short")

    said: list[str] = []
    damage(2)
    with following(URL, tmp_path / "b", said.append):
        np.testing.assert_array_equal(restored(tmp_path / "b", 1), state(1)["w"])
    assert f"the copy {URL}/checkpoints/2 is damaged" in said[0]
    assert not [p for p in (tmp_path / "b").iterdir() if p.name.startswith(".fetching")]
    damage(1)
    match = rf"no checkpoint below {URL}/checkpoints can be read, though \[2, 1\] are"
    with pytest.raises(MirrorError, match=match), following(URL, tmp_path / "c", print):
        pass


def test_what_cannot_be_copied_is_told_tried_again_and_an_error_at_the_end(tmp_path, store):
    said: list[str] = []
    with following(URL, tmp_path / "a", said.append) as mirror:
        Store.refuse = "/checkpoints/1"
        save(tmp_path / "a", mirror, 1)
        while not said:
            time.sleep(0.01)
        Store.refuse = ""
    assert f"not copied to {URL} (PermissionError: AccessDenied" in said[0]
    assert complete(store) == [1]  # in the end
    match = r"is complete, but its copy in s3://bucket/run is not .*same command copies"
    with pytest.raises(MirrorError, match=match), following(URL, tmp_path / "a", said.append) as mirror:  # noqa: PT012
        Store.refuse = "/checkpoints/2"
        save(tmp_path / "a", mirror, 2)
    np.testing.assert_array_equal(restored(tmp_path / "a", 2), state(2)["w"])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://bucket/run", r"needs a package: pip install gcsfs"),
        ("s3://bucket/run", r"could not be reached \(PermissionError.*see that the bucket exists"),
        ("xy://bucket/run", r"could not be reached"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_before_training(tmp_path, store, url, message):
    Store.refuse = "bucket"
    with pytest.raises(MirrorError, match=message):
        running.train_config(toy_config(run__mirror=url), tmp_path / "w", say=lambda text: None)
    assert not (tmp_path / "w" / "checkpoints").exists()


KILLED = """
import sys
from pathlib import Path
from protojax import running
from tests.toy import toy_config
config = toy_config(method__steps=40, run__checkpoint_every=0.1, run__mirror=sys.argv[2])
running.train_config(config, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_another_machine_goes_on_where_a_killed_one_was_bit_for_bit(tmp_path):
    """kill -9, the workdir gone with the machine: resumed from the mirror, a folder here, with the same records."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a"), str(tmp_path / "mirror")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (tmp_path / "mirror" / "checkpoints" / f"8{COMPLETE}").exists():
            time.sleep(0.02)
        process.kill()
    shutil.rmtree(tmp_path / "a")
    said: list[str] = []
    config = toy_config(method__steps=40, run__checkpoint_every=0.1, run__mirror=str(tmp_path / "mirror"))
    running.train_config(config, tmp_path / "b", say=said.append)
    assert said[0].startswith("fetched the checkpoint of step")
    running.train_config(toy_config(method__steps=40, run__checkpoint_every=0.1), tmp_path / "whole", say=said.append)

    def losses(workdir: Path) -> dict[int, float]:
        lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return {r["step"]: r["metrics"]["loss/total"] for r in lines if r["kind"] == "train"}

    assert losses(tmp_path / "b") == losses(tmp_path / "whole")
    mirrored = json.loads((tmp_path / "mirror" / "files" / "summary.json").read_text())
    assert mirrored["steps"] == 40
