"""What a detector is; the tables that hold them are in `detectors.py` and in one file a workload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from protojax.evals.history import History

SEVERITIES = ("error", "warning", "notice")


class Threshold(NamedTuple):
    """A number that a detector compares with, and why it is this one."""

    value: float
    reason: str


class Detector(NamedTuple):
    """id: snake_case, the same everywhere. reads: prefixes of the metric names that `check` looks at. check(history,
    thresholds by name) -> numbers for the evidence sentence (and 'severity' where it is not the usual one), or None.
    evidence: a format string over those numbers."""

    id: str
    severity: str
    thresholds: Mapping[str, Threshold]
    reads: tuple[str, ...]
    check: Callable[[History, Mapping[str, float]], dict[str, Any] | None]
    evidence: str
    cause: str
    advice: str
