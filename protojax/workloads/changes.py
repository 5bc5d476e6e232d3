"""How the arms of any workload are written: a change of a ConfigDict, and what is made of changes."""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

Change = Callable[[ml_collections.ConfigDict], None]


def options(group: str, **values: object) -> Change:
    """Sets keys of a group of the configuration: options('method.optim', peak_lr=0.1)."""

    def change(c: ml_collections.ConfigDict) -> None:
        at = c
        for name in group.split("."):
            at = at[name]
        for key, value in values.items():
            at[key] = value

    return change


def together(*changes: Change) -> Change:
    """One after the other; none of them: the default."""

    def change(c: ml_collections.ConfigDict) -> None:
        for one in changes:
            one(c)

    return change
