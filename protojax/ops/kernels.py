"""Which program runs a sweep."""

from __future__ import annotations

from typing import Any

import jax

from protojax.ops import sweeps
from protojax.ops.sweeps import Prepare, Tiling

Array = jax.Array


def streams_rows(queries: Array, prototypes: Array) -> bool:
    return True


row_sweep = sweeps.row_sweep
column_sweep = sweeps.column_sweep


def accumulate_sweep(
    queries: Array, prototypes: Array, bias: Array, rows: Any, prepare: Prepare, options: Tiling
) -> tuple[Array, Array, Array]:
    return sweeps.complete_sweep(queries, prototypes, bias, rows, prepare, options)
