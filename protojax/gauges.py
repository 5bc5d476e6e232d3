"""What a run says about its use of the devices: share of their peak arithmetic, memory, and a profile on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

from protojax import flops

PROFILE_FROM = 10  # the first steps compile and warm up


class Gauges:
    """count() -> operations of one step (called once, where a peak is known). profile: steps to trace (0: none)."""

    def __init__(self, workdir: Path, batch_size: int, count: Callable[[], float], profile: int = 0):
        self._batch_size, self._count = batch_size, count
        self._folder, self._profile = workdir / "profile", profile
        self._until: int | None = None
        self._operations: float | None = None
        peaks = [flops.peak(d) for d in jax.devices()]
        self._peak = None if None in peaks else float(sum(p for p in peaks if p is not None))

    def read(self, rate: float) -> dict[str, float]:
        """'mfu': operations of the step x steps a second / peak of all devices; 'device_memory_gb': the fullest local
        device's peak. Each only where it is known (neither on CPU)."""
        out = {}
        if self._peak is not None:
            if self._operations is None:
                self._operations = self._count()
            out["mfu"] = self._operations * rate / self._batch_size / self._peak
        used = [
            s["peak_bytes_in_use"] for d in jax.local_devices() if (s := d.memory_stats()) and "peak_bytes_in_use" in s
        ]
        if used:
            out["device_memory_gb"] = max(used) / 1e9
        return out

    def step(self, at: int) -> None:
        """After the dispatch that led to step `at`: begins and ends the trace below WORKDIR/profile."""
        if self._profile == 0:
            return
        if self._until is None and at >= PROFILE_FROM:
            jax.profiler.start_trace(str(self._folder))
            self._until = at + self._profile
        elif self._until is not None and at >= self._until:
            self.close()

    def close(self) -> None:
        """End a trace that is still going on."""
        if self._until is not None and self._profile:
            jax.profiler.stop_trace()
            self._profile = 0
