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


def flat_items(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {'a.b': leaf}, leaves of any kind as they are."""
    out: dict[str, Any] = {}
    for k, v in value.items():
        out |= flat_items(v, f"{prefix}{k}.") if isinstance(v, Mapping) else {f"{prefix}{k}": v}
    return out


def histograms(value: Any, prefix: str) -> dict[str, dict[str, Any]]:
    """'a/b' -> arguments of TensorBoard's raw histogram, for every {upper limit: count} in a nested dict: one whose
    last limit is 'inf', as `evals.audit.usage_histogram` has. Sums are those of the bins' limits."""
    if not isinstance(value, Mapping):
        return {}
    if "inf" not in value:
        return {k: v for name, inner in value.items() for k, v in histograms(inner, f"{prefix}/{name}").items()}
    limits = [float(limit) for limit in value if limit != "inf"]
    limits.append(10.0 * max(limits))
    counts = [float(n) for n in value.values()]
    total = [sum(n * limit**power for n, limit in zip(counts, limits, strict=True)) for power in (0, 1, 2)]
    bins = {"bucket_limits": limits, "bucket_counts": counts, "min": 0.0, "max": limits[-1]}
    return {prefix: {**bins, "num": total[0], "sum": total[1], "sum_squares": total[2]}}


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
        history: list[dict[str, Any]] | None = None,
    ):
        """step: that of the checkpoint that the run resumes from; None: a new run, whose file starts empty. history:
        the records so far, where the file of another process holds them."""
        self.path = workdir / "metrics.jsonl"
        self.main = main
        self.records = (
            []
            if step is None
            else [r for r in (read_records(self.path) if history is None else history) if r["step"] <= step]
        )
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
            binned = histograms(record.get("metrics", {}), kind)
            for name, value in numbers.items():
                if name.rpartition("/")[0] not in binned:
                    self._board.add_scalar(name, value, step)
            for name, bins in binned.items():
                self._board.add_histogram_raw(name, **bins, global_step=step)
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


STARVING = 0.1  # of the time of a lap


class Meter:
    """Images a second of training alone: compilation, evaluation and saving are left out by `start`."""

    def __init__(self) -> None:
        self.images = self.seconds = self.waited = 0.0
        self._last: float | None = None
        self._share, self._warned = 0.0, False

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, images: int, waited: float, lag: float = 0.0) -> tuple[float, float]:
        """After `images` images: (images/s of this lap, share of it that the device waited for input). Starts the next.

        waited: seconds that the host waited for batches; lag: seconds that it then waited for the device to catch up.
        Dispatch is asynchronous: a host that waits while the device still has work costs nothing, so the device stood
        idle for max(0, waited - lag) at most.
        """
        waited = max(0.0, waited - lag)
        now = time.perf_counter()
        seconds = now - (self._last if self._last is not None else now)
        self._last = now
        self.images += images
        self.seconds += seconds
        self.waited += waited
        self._share = waited / seconds if seconds > 0 else 0.0
        return (images / seconds, self._share) if seconds > 0 else (0.0, 0.0)

    def starving(self) -> str:
        """What to say, once, when the device waited for input for more than STARVING of the last lap; else ''."""
        if self._warned or self._share <= STARVING:
            return ""
        self._warned = True
        return (
            f"the device waits for data {self._share:.0%} of the time: more decoding threads (data.source.workers), "
            "reading processes (system.workers), more prefetch (system.prefetch) or a packed copy (data.source.packed) "
            "make reading faster (docs/data.md)"
        )

    @property
    def rate(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0
