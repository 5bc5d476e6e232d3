"""Checkpoints: what is written comes back on any mesh; damage is seen, named, and never takes the last good one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import parallel
from protojax.checkpoint import CheckpointError, Checkpoints, check_writable, checksums


def tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "estimator": {"components": {"mean": jnp.asarray(rng.standard_normal((8, 3)), jnp.float32)}},
        "params": {"w": jnp.asarray(rng.standard_normal((3, 5)), jnp.bfloat16)},
        "step": jnp.int32(seed),
    }


def placed(mesh, value):
    shapes = jax.eval_shape(lambda: value)
    shardings = parallel.state_shardings(mesh, shapes)
    return shapes, shardings, jax.device_put(value, shardings)


def same(a, b) -> bool:
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize(("data", "proto", "devices"), [(2, 2, 4), (1, 1, 1), (1, 8, 8)])
def test_restored_onto_another_mesh(tmp_path: Path, data, proto, devices):
    value = tree(3)
    _, _, state = placed(parallel.make_mesh(4, 2), value)
    saved = Checkpoints(tmp_path)
    saved.save(3, state, {"fingerprint": {}})
    saved.close()
    mesh = parallel.make_mesh(data, proto, devices=jax.devices()[:devices])
    shapes, shardings, _ = placed(mesh, value)
    again = Checkpoints(tmp_path)
    restored = again.restore(3, shapes, shardings)
    assert same(restored, value)
    assert jax.tree.leaves(jax.tree.map(lambda r, s: r.sharding == s, restored, shardings)) == [True] * 3
    again.close()


def test_a_reader_is_not_told_that_it_only_reads(tmp_path: Path, caplog):
    _, _, state = placed(parallel.make_mesh(1, 1, devices=jax.devices()[:1]), tree(3))
    saved = Checkpoints(tmp_path)
    saved.save(3, state, {"fingerprint": {}})
    saved.close()
    level = logging.getLogger("absl").level
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(tmp_path, read_only=True).steps() == [3]
    assert [record.getMessage() for record in caplog.records] == []
    assert logging.getLogger("absl").level == level


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import jax
import jax.numpy as jnp
from protojax.checkpoint import Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes beyond the limit fail with an error, as on a full disk
state = {"w": jax.random.normal(jax.random.key(0), (300_000,))}
saved = Checkpoints(Path(sys.argv[1]))
saved.save(1, state, {})
saved.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    saved.save(2, state, {})
    saved.wait()
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
again = Checkpoints(Path(sys.argv[1]))
step, found, _ = again.restore_latest(jax.eval_shape(lambda: state), None, lambda record: None, print)
assert step == 1 and jnp.array_equal(found["w"], state["w"])
again.save(2, state, {})
again.close()
print("then", again.steps())
"""


def test_a_disk_that_is_full_while_saving_loses_nothing(tmp_path: Path):
    """In a process of its own: the limit on file sizes belongs to a process."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")], capture_output=True, text=True, timeout=120,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"a checkpoint could not be written below {tmp_path / 'c'}" in done.stdout
    assert "GB are free. Complete checkpoints are intact: [1]. Make room" in done.stdout
    assert done.stdout.strip().endswith("then [1, 2]")


def test_checksum_sees_a_flipped_bit_a_swap_and_no_sharding():
    value = tree(1)
    base = checksums(value)
    _, _, sharded = placed(parallel.make_mesh(4, 2), value)
    assert checksums(sharded) == base
    flipped = np.asarray(value["estimator"]["components"]["mean"]).copy()
    flipped.view(np.uint32)[5, 1] ^= 1
    changed = {**value, "estimator": {"components": {"mean": jnp.asarray(flipped)}}}
    assert checksums(changed)["estimator/components/mean"] != base["estimator/components/mean"]
    swapped = np.asarray(value["estimator"]["components"]["mean"])[::-1]
    changed = {**value, "estimator": {"components": {"mean": jnp.asarray(swapped)}}}
    assert checksums(changed)["estimator/components/mean"] != base["estimator/components/mean"]


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if (p.is_file() and "ocdbt" in str(p)) or "/d/" in str(p)),
               key=lambda p: p.stat().st_size)  # fmt: skip


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_set_aside_and_the_last_good_one_survives(tmp_path: Path, damage):
    shapes, shardings, first = placed(parallel.make_mesh(), tree(1))
    _, _, second = placed(parallel.make_mesh(), tree(2))
    saved = Checkpoints(tmp_path / "c", keep=2)
    saved.save(1, first, {"fingerprint": {}})
    saved.save(2, second, {"fingerprint": {}})
    saved.close()
    victims = [p for p in (tmp_path / "c" / "2" / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert victims, "the layout of checkpoints changed"
    for path in victims:
        data = bytearray(path.read_bytes())
        if damage == "remove":
            path.unlink()
            continue
        data = data[: len(data) // 2] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 255])
        path.write_bytes(bytes(data))
    told: list[str] = []
    again = Checkpoints(tmp_path / "c")
    step, state, _ = again.restore_latest(shapes, shardings, lambda record: None, told.append)
    assert step == 1
    assert same(state, first)
    assert len(told) == 1
    assert "damaged or incomplete" in told[0]
    assert (tmp_path / "damaged-2").is_dir()
    again.close()


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path: Path):
    shapes, shardings, state = placed(parallel.make_mesh(), tree(1))
    saved = Checkpoints(tmp_path / "c")
    saved.save(1, state, {"fingerprint": {}})
    saved.close()
    for path in (tmp_path / "c" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    again = Checkpoints(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"no checkpoint below .* can be read"):
        again.restore_latest(shapes, shardings, lambda record: None, lambda text: None)
    assert (tmp_path / "damaged-1").is_dir()
    again.close()


def test_none_is_not_an_error(tmp_path: Path):
    shapes, shardings, _ = placed(parallel.make_mesh(), tree(1))
    empty = Checkpoints(tmp_path)
    assert empty.restore_latest(shapes, shardings, lambda record: None, lambda text: None) is None
    empty.close()


def test_unwritable_workdir_is_named(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match=r"workdir .*file/run cannot be written .*choose another with --workdir"):
        check_writable(blocked / "run")
