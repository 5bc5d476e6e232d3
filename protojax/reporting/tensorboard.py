"""TensorBoard files, written without TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from tensorboardX import SummaryWriter

HISTOGRAM_BINS = 64


class SupportsArray(Protocol):
    """Anything NumPy turns into an array."""

    def __array__(self) -> np.ndarray: ...


class TensorBoardWriter:
    """Scalars and histograms of one run, for `tensorboard --logdir`.

    Args:
      directory: folder of the event files, made where it is missing.
      purge_step: after resuming, records from this step on are hidden, so that no step shows twice.
      enabled: False makes every call do nothing (processes other than the first).

    Raises:
      ValueError: the folder cannot be written.
    """

    def __init__(self, directory: str | Path, purge_step: int | None = None, enabled: bool = True) -> None:
        self._writer: SummaryWriter | None = None
        if not enabled:
            return
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        except OSError as error:
            raise ValueError(
                f"cannot write TensorBoard files to {directory} ({error.strerror}): "
                "choose a --workdir that can be written."
            ) from error

    def scalars(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Write every number of a nested mapping under its path ('knn/fine/20'); what is no number is left out."""
        if self._writer is None:
            return
        for name, value in values.items():
            path = f"{prefix}/{name}" if prefix else str(name)
            if isinstance(value, Mapping):
                self.scalars(step, value, path)
            elif isinstance(value, int | float | np.number) and not isinstance(value, bool):
                self._writer.add_scalar(path, float(value), step)

    def histogram(self, step: int, name: str, values: SupportsArray) -> None:
        """Write the distribution of the finite entries of an array; nothing where there is none."""
        if self._writer is None:
            return
        flat = np.asarray(values, dtype=np.float64).ravel()
        flat = flat[np.isfinite(flat)]
        if flat.size:
            self._writer.add_histogram(name, flat, step, bins=HISTOGRAM_BINS)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the file; later calls do nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
