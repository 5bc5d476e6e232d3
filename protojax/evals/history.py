"""The numbers of a run as series, fed record by record: what detectors look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Point(NamedTuple):
    """One number of one record; value is NaN where the record holds null or a non-finite number."""

    step: int
    value: float


def flatten(value: Any, prefix: str = "") -> dict[str, float]:
    """Nested dict -> {'a/b': number}; null and non-finite become NaN, anything else that is no number is left out.

    A level named 'metrics' leaves no trace, so that records of a run and bare metrics read alike.
    """
    if isinstance(value, Mapping):
        found: dict[str, float] = {}
        for name, item in value.items():
            inner = prefix if name == "metrics" and not prefix else f"{prefix}/{name}" if prefix else str(name)
            found.update(flatten(item, inner))
        return found
    if value is None:
        return {prefix: math.nan}
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {}
    return {prefix: float(value) if math.isfinite(value) else math.nan}


class History:
    """Series of a run, appended to in order of step. `warmup_steps`: until then a loss at chance is no alarm."""

    def __init__(self, warmup_steps: int = 0):
        self.warmup_steps = warmup_steps
        self.step = 0
        self._series: dict[str, list[Point]] = {}
        self._finite: dict[str, list[Point]] = {}
        self._since: dict[tuple[str, str], tuple[int, int | None]] = {}

    def append(self, record: Mapping[str, Any]) -> set[str]:
        """Add a record {'step', ...} of metrics.jsonl; returns the names it held. Diagnoses and events hold none."""
        if record.get("kind", "train") not in ("train", "eval"):
            return set()
        self.step = max(self.step, int(record["step"]))
        numbers = flatten({k: v for k, v in record.items() if k not in ("kind", "step")})
        for name, value in numbers.items():
            point = Point(int(record["step"]), value)
            self._series.setdefault(name, []).append(point)
            if math.isfinite(value):
                self._finite.setdefault(name, []).append(point)
        return set(numbers)

    def names(self, prefix: str) -> list[str]:
        """Names of series that begin with `prefix`, sorted."""
        return sorted(name for name in self._series if name.startswith(prefix))

    def series(self, name: str) -> list[Point]:
        """Every point of a series, empty when there is none."""
        return self._series.get(name, [])

    def finite(self, name: str) -> list[Point]:
        """The finite points of a series."""
        return self._finite.get(name, [])

    def since(self, what: str, name: str, holds: Callable[[float], bool]) -> int | None:
        """Step since which a condition holds for every point of a series up to its last; None when it does not hold
        there. `what` names the condition, which must stay the same: each point is judged once."""
        seen, start = self._since.get((what, name), (0, None))
        points = self.series(name)
        for point in points[seen:]:
            start = None if not holds(point.value) else point.step if start is None else start
        self._since[what, name] = (len(points), start)
        return start

    def last(self, name: str) -> float | None:
        """Latest finite value, or None."""
        points = self.finite(name)
        return points[-1].value if points else None
