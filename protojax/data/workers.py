"""Training batches read by other processes (Grain), in the same order and with the same contents as without them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from protojax.api import Source

START_AFTER = 12  # batches in a row: the passes before training read a few from the start and then begin again
STEPS = 2**31 - 2


class _Steps:
    """Random access by step, for Grain."""

    def __init__(self, batch: Callable[[int], dict[str, np.ndarray]]):
        self._batch = batch

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: Any) -> dict[str, np.ndarray]:
        return self._batch(int(step))

    def __repr__(self) -> str:
        return "batches by step"


def read_by_workers(source: Source, workers: int, ahead: int = 1) -> Source:
    """The same source, whose batches are made by `workers` processes while they are asked for one after another.

    Worker w makes the batches of steps w, w + workers, ...; each keeps `ahead` of them ready. `batch(step)` stays a
    function of the step: a step out of order, and the first few of a run of steps, are read in this process. Data in
    memory (embedded, npz) is copied into every worker; files, TFDS and packed copies are not.
    0 workers: `source` itself. Raises ValueError for a negative number.
    """
    if workers < 0:
        raise ValueError(f"system.workers must be 0 or more, got {workers}")
    return source if workers == 0 else source._replace(batch=_Ahead(source.batch, workers, ahead))


class _Ahead:
    def __init__(self, batch: Callable[[int], dict[str, np.ndarray]], workers: int, ahead: int):
        self._batch, self._workers, self._ahead = batch, workers, ahead
        self._lock = threading.Lock()
        self._iterator: Any = None
        self._next, self._row = -1, 0

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        with self._lock:
            if step != self._next:
                self._row = 0
                self.close()
            self._next, self._row = step + 1, self._row + 1
            if self._iterator is None and self._row > START_AFTER:
                self._iterator = self._begin(step)
            if self._iterator is not None:
                return {k: np.asarray(v) for k, v in next(self._iterator).items()}
        return self._batch(step)

    def _begin(self, step: int) -> Any:
        import grain  # takes a second, and most runs do not need it
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads its debugging flags
            flags.FLAGS.mark_as_parsed()
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._ahead)
        options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=self._ahead)
        steps = grain.MapDataset.source(_Steps(self._batch)).slice(slice(step, None))
        return iter(steps.to_iter_dataset(reading).mp_prefetch(options))

    def close(self) -> None:
        """Stop the worker processes."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __del__(self) -> None:
        self.close()
