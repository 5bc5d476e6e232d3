"""Checkpoints: the only file that knows Orbax.

A checkpoint is a plain tree of arrays (sharded, written asynchronously, restored onto any mesh) and a JSON record with
the configuration that made it and a checksum of every array. A restored array whose checksum differs is refused, and
the checkpoint before it is tried: the last good one always survives.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from protojax import distributed
from protojax.api import PyTree
from protojax.parallel import path_of


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another configuration."""


def checksums(tree: PyTree) -> dict[str, int]:
    """path -> sum of the array's 32-bit words modulo 2^32: the same for every sharding, one pass on the device."""
    host = jax.device_get(_checksums(tree))
    return {path_of(p): int(v) for p, v in jax.tree_util.tree_leaves_with_path(host)}


@jax.jit
def _checksums(tree: PyTree) -> PyTree:
    def one(x: jax.Array) -> jax.Array:
        width = x.dtype.itemsize * 8
        words = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        if x.dtype != jnp.bool_:
            words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}"))
        flat = words.astype(jnp.uint32).reshape(-1)
        weights = jnp.arange(flat.size, dtype=jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
        return jnp.sum(flat * weights, dtype=jnp.uint32)

    return jax.tree.map(one, tree)


@jax.jit
def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def check_writable(directory: Path) -> None:
    """Create the directory and write a byte. Raises PermissionError or OSError with what to do."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise type(error)(
            error.errno, f"workdir {directory} cannot be written ({error.strerror}); choose another with --workdir"
        ) from None


class Checkpoints:
    """Numbered checkpoints below one directory."""

    def __init__(self, directory: Path, keep: int = 2, read_only: bool = False):
        """keep: how many stay. read_only: for a reader, which must neither make a folder nor tidy up what a running
        job is just writing."""
        self.directory = Path(os.path.abspath(directory))
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=False,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: PyTree, record: Mapping[str, Any]) -> None:
        """Begin to write; returns when the arrays may change again. Raises OSError when the last write failed."""
        if step in self.steps():
            return
        # On the CPU backend the writer may read device memory itself, which the next (donating) step reuses.
        safe = _copy(state) if jax.default_backend() == "cpu" else state
        record = {**record, "step": step, "checksums": checksums(state)}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(safe), record=ocp.args.JsonSave(record))
        )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def record(self, step: int) -> dict[str, Any]:
        """The JSON record of a checkpoint. Raises CheckpointError when it cannot be read."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        except Exception as error:
            raise CheckpointError(self._damaged(step, error)) from error

    def restore(self, step: int, shapes: PyTree, shardings: PyTree | None = None) -> PyTree:
        """Arrays of a checkpoint, laid out as `shardings` says (None: replicated on the default device).

        shapes: a tree of ShapeDtypeStruct. Raises CheckpointError when a file is missing or damaged, or a checksum
        differs.
        """
        if shardings is None:
            mesh = jax.make_mesh((1,), ("all",), devices=jax.devices()[:1])
            shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), shapes)
        wanted = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
        expected = self.record(step)["checksums"]
        try:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
            state = self._manager.restore(step, args=arguments)["state"]
        except Exception as error:
            raise CheckpointError(self._damaged(step, error)) from error
        found = checksums(state)
        wrong = [name for name in expected if found.get(name) != expected[name]]
        if wrong or len(found) != len(expected):
            raise CheckpointError(self._damaged(step, f"the contents of {wrong[:3] or 'the tree'} changed on disk"))
        return state

    def restore_latest(
        self, shapes: PyTree, shardings: PyTree, accept: Any, warn: Any
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """(step, state, record) of the newest good checkpoint; None when there is none at all.

        accept(record) raises when the checkpoint is not this run's. warn(text) is told of every damaged one that was
        passed over; those are renamed to `damaged-STEP`, never deleted. Raises CheckpointError when all are damaged.
        """
        steps = self.steps()
        last: CheckpointError | None = None
        for step in reversed(steps):
            try:
                record = self.record(step)
                accept(record)
                return step, self._restored_everywhere(step, shapes, shardings), record
            except CheckpointError as error:
                if "damaged" not in str(error):
                    raise
                last = error
                warn(f"{error} Trying the checkpoint before it.")
                self._set_aside(step)
        if last is not None:
            raise CheckpointError(f"no checkpoint below {self.directory} can be read; the last problem: {last}")
        return None

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self.directory.parent / f"damaged-{step}"
            shutil.rmtree(target, ignore_errors=True)
            shutil.move(str(self.directory / str(step)), str(target))
        distributed.barrier(f"set-aside-{step}")
        self._manager.reload()

    def _restored_everywhere(self, step: int, shapes: PyTree, shardings: PyTree) -> PyTree:
        """`restore`, which on several processes fails on all of them where it fails on one."""
        state, problem = None, None
        try:
            state = self.restore(step, shapes, shardings)
        except CheckpointError as error:
            problem = error
        if distributed.all_ok(problem is None):
            return state
        raise problem or CheckpointError(self._damaged(step, "another process could not read it"))

    def _damaged(self, step: int, error: Any) -> str:
        text = str(error).strip().splitlines() or [type(error).__name__]
        return f"checkpoint {self.directory / str(step)} is damaged or incomplete: {text[0][:300]}."
