"""Values put into a configuration by dotted key: what studies change, and flags that no typed flag can hold."""

from __future__ import annotations

import ast
import re
from typing import Any

import ml_collections


def find(config: ml_collections.ConfigDict, key: str) -> tuple[Any, str]:
    """(what holds the last part of 'method.optim.peak_lr', that part); what holds it may be no ConfigDict (None where
    the path ends early) or lack the part: `holds` says so."""
    *path, last = key.split(".")
    at: Any = config
    for part in path:
        at = at.get(part) if isinstance(at, ml_collections.ConfigDict) else None
    return at, last


def holds(at: Any, last: str) -> bool:
    """Whether `find` found a place."""
    return isinstance(at, ml_collections.ConfigDict) and last in at


def put(at: ml_collections.ConfigDict, last: str, value: object) -> None:
    """at[last] = value, of whatever type: a schedule may take the place of a number."""
    with at.unlocked():
        del at[last]
        at[last] = value


def with_schedules(config: ml_collections.ConfigDict, argv: list[str]) -> list[str]:
    """`argv` without the --config.KEY=VALUE that put a schedule in the place of a number, or a number in that of a
    schedule: they are put into `config` here, since a flag keeps the type of its default."""
    kept = []
    for argument in argv:
        found = re.fullmatch(r"--config\.([\w.]+)=(.*)", argument)
        if found is None or not _replaced(config, found[1], found[2]):
            kept.append(argument)
    return kept


def _replaced(config: ml_collections.ConfigDict, key: str, text: str) -> bool:
    """Whether this was such a value; what is no literal, or has no place, is left for absl to complain about."""
    at, last = find(config, key)
    if not holds(at, last):
        return False
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    if {_kind(at[last]), _kind(value)} != {"schedule", "number"}:
        return False
    put(at, last, value)
    return True


def _kind(value: object) -> str:
    from protojax.schedules import SHAPES, is_number

    if isinstance(value, tuple) and value and value[0] in SHAPES:
        return "schedule"
    return "number" if is_number(value) else ""
