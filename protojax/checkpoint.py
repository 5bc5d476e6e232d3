"""Checkpoints: the only file that knows Orbax.

A checkpoint is a plain tree of arrays (sharded, written asynchronously, restored onto any mesh) and a JSON record with
the configuration that made it and a checksum of every array. A restored array whose checksum differs is refused, and
the checkpoint before it is tried: the last good one always survives.

The state of the best evaluation lies in a folder of its own, beside the newest ones: nothing resumes from it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from protojax import distributed
from protojax.api import PyTree
from protojax.config import suggest
from protojax.metrics import flat_items, flatten
from protojax.parallel import path_of

NEWEST, BEST = "checkpoints", "best"  # folders of a run


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


def steps_below(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first, by their names: Orbax gives a checkpoint its name
    when it is complete. [] where there is no folder."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the storage library's warnings from the user."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Checkpoints:
    """Numbered checkpoints below one directory.

    best: {'metric', 'step', 'value'} of the state in the folder `best`; None where there is none."""

    def __init__(
        self,
        directory: Path,
        keep: int = 2,
        read_only: bool = False,
        best: str = "",
        written: Callable[[Path], None] | None = None,
    ):
        """keep: how many stay. read_only: for a reader, which must neither make a folder nor tidy up what a running
        job is just writing. best: the metric whose highest evaluation `offer` keeps beside them; '': none. written:
        told of the folder of each checkpoint whose writing has begun; the folder is there when it is complete."""
        self.directory = Path(os.path.abspath(directory))
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        with _quiet() if read_only else contextlib.nullcontext():  # it warns that what is read only is read only
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                create=False,
                read_only=read_only,
                enable_async_checkpointing=not read_only,
                cleanup_tmp_directories=not read_only,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._metric, self.best, self._written = best, None, written
        self._best = Checkpoints(self.directory.parent / BEST, keep=1, written=written) if best else None
        if self._best is not None and (steps := self._best.steps()):
            known: dict[str, Any] = self._best.record(steps[-1])["best"]
            self.best = known if known["metric"] == best else None

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
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(safe), record=ocp.args.JsonSave(record))
        with self._writing():
            self._manager.save(step, args=arguments)
        if self._written is not None:
            self._written(self.directory / str(step))

    def offer(self, step: int, state: PyTree, record: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """Keep this state in `best` when its evaluation is the highest so far (of equal ones the first). Step 0 is a
        control and never kept. Raises ValueError for an evaluation without that metric."""
        if self._best is None:
            return
        numbers, path = flat_items(metrics), self._metric.replace("/", ".")
        value = numbers.get(path)
        if path not in numbers or not isinstance(value, int | float | None):
            known = flatten(metrics)
            raise ValueError(
                f"run.best: an evaluation has no number {self._metric!r}{suggest(self._metric, known)}; it has "
                f"{', '.join(known)}"
            )
        better = step > 0 and value is not None and (self.best is None or value > self.best["value"])
        if not distributed.all_ok(better):  # writing is a matter of all processes, whose last bits may differ
            return
        assert value is not None
        # Orbax writes no step below its newest. A newer one is of a future that this run resumed from before, and in
        # which that state was not as good as this one.
        self.forget_best(step)
        self.best = {"metric": self._metric, "step": step, "value": float(value)}
        self._best.save(step, state, {**record, "best": self.best})

    def forget_best(self, since: int = 0) -> None:
        """Delete what `best` holds of this step or later: all of it, when a new run begins."""
        if self._best is None:
            return
        self._best.wait()
        for step in self._best.steps():
            if step >= since:
                self._best._manager.delete(step)
                self.best = None

    def wait(self) -> None:
        """Until what was begun is written. Raises OSError when it could not be."""
        with self._writing():
            self._manager.wait_until_finished()
        if self._best is not None:
            self._best.wait()

    def close(self) -> None:
        self._manager.close()
        if self._best is not None:
            self._best.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What Orbax says of a failed write (in any type), as an OSError that says what is left and what to do."""
        try:
            yield
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            free = shutil.disk_usage(self.directory).free / 1e9
            raise OSError(
                f"a checkpoint could not be written below {self.directory} ({reason[:300]}); {free:.2f} GB are free. "
                f"Complete checkpoints are intact: {self.steps() or 'none'}. Make room or make the folder writable, "
                "then give the same command again: it resumes from the newest."
            ) from error

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
