"""Numbers on their way out: (sum, count) accumulators on the device, records on disk, rates.

The step adds to an accumulator that stays on the device; the host reads it once every `log_every` steps. Records go
to `metrics.jsonl` (one JSON object a line, flushed) and to TensorBoard; a resumed run drops the lines after the step
that it resumes from, so that the file always tells one history.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from protojax.api import Metrics, PyTree


class NotFiniteError(FloatingPointError):
    """Loss or gradient became NaN or infinite."""


def zeros(shapes: PyTree) -> PyTree:
    """An empty accumulator for the given shapes of Metrics."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def add(accumulator: Metrics, new: Metrics) -> Metrics:
    """Sums of sums and of counts."""
    return jax.tree.map(jnp.add, accumulator, new)


def means(host: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """name -> sum / count, for what was counted at all."""
    return {k: float(s) / float(c) for k, (s, c) in sorted(host.items()) if float(c) > 0}


def plain(value: Any) -> Any:
    """Nested dict of numbers -> JSON types; non-finite numbers become null (JSON has no NaN)."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(value: Any, prefix: str = "") -> dict[str, float]:
    """Nested dict -> {'a/b': number}, numbers only (for TensorBoard)."""
    if isinstance(value, Mapping):
        out: dict[str, float] = {}
        for k, v in value.items():
            out.update(flatten(v, f"{prefix}/{k}" if prefix else str(k)))
        return out
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {}
    return {prefix: float(value)}


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(plain(value), indent=1) + "\n")
    os.replace(temporary, path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a torn last line (the process was killed while writing) is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records = []
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i + 1 == len(lines):
                break
            raise ValueError(f"{path}, line {i + 1}: not a JSON object ({error}); delete the line to go on.") from None
    return records


def evaluated(records: list[dict[str, Any]], at: int) -> dict[str, Any] | None:
    """Metrics of the last evaluation at step `at`, or None."""
    return next((r["metrics"] for r in reversed(records) if r["kind"] == "eval" and r["step"] == at), None)


class Writer:
    """Appends records to metrics.jsonl, TensorBoard and (extra) W&B. Writes on the first process only."""

    def __init__(
        self,
        workdir: Path,
        *,
        step: int | None = None,
        tensorboard: bool = True,
        wandb: Any = None,
        main: bool = True,
    ):
        """step: that of the checkpoint that the run resumes from; None: a new run, whose file starts empty."""
        self.path = workdir / "metrics.jsonl"
        self.main = main
        self.records = [] if step is None else [r for r in read_records(self.path) if r["step"] <= step]
        self._wandb = wandb
        self._board: Any = None
        if not main:
            return
        text = "".join(json.dumps(r) + "\n" for r in self.records)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, self.path)
        self._file = self.path.open("a", buffering=1)
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step or 0)

    def write(self, kind: str, step: int, **fields: Any) -> dict[str, Any]:
        """Append {'kind', 'step', **fields}; numbers below `metrics` also go to TensorBoard."""
        record = plain({"kind": kind, "step": step, **fields})
        self.records.append(record)
        if not self.main:
            return record
        self._file.write(json.dumps(record) + "\n")
        numbers = {f"{kind}/{k}": v for k, v in flatten(record.get("metrics", {})).items()}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        return record

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        if self._board is not None:
            self._board.add_histogram(name, values, step)

    def last(self, kind: str) -> dict[str, Any] | None:
        return next((r for r in reversed(self.records) if r["kind"] == kind), None)

    def close(self) -> None:
        if self.main:
            self._file.close()
        if self._board is not None:
            self._board.close()


class Meter:
    """Images a second of training alone: compilation, evaluation and saving are left out by `pause`."""

    def __init__(self) -> None:
        self.images = self.seconds = self.waited = 0.0
        self._last: float | None = None

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, images: int, waited: float) -> tuple[float, float]:
        """After `images` images: (images/s of this lap, share of it spent waiting for input). Starts the next lap."""
        now = time.perf_counter()
        seconds = now - (self._last if self._last is not None else now)
        self._last = now
        self.images += images
        self.seconds += seconds
        self.waited += waited
        return (images / seconds, waited / seconds) if seconds > 0 else (0.0, 0.0)

    @property
    def rate(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0
