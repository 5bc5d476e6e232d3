"""Cold and cached compile time of the engine's programs, each in a fresh process.

python benchmarks/compile.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.carp import port, streamed
from benchmarks.em import materialised
from benchmarks.em import streamed as streamed_em
from benchmarks.lse import materialised_loss, streamed_loss

ROWS, WIDTH = 1024, 128


def programs(count: int) -> dict[str, tuple]:
    shape = jax.ShapeDtypeStruct
    rows, table = shape((ROWS, WIDTH), jnp.float32), shape((count, WIDTH), jnp.float32)
    em = (rows, table, shape((WIDTH,), jnp.float32), shape((count,), jnp.float32))
    views = [shape((v, ROWS // 8, WIDTH), jnp.float32) for v in (8, 2)]
    block = (*views, table, shape((count,), jnp.int32))
    return {
        "loss, streamed": (streamed_loss, (rows, rows, table)),
        "loss, materialised": (materialised_loss, (rows, rows, table)),
        "E-step, streamed": (streamed_em("tied"), em),
        "E-step, materialised": (materialised("tied"), em),
        "block losses, streamed": (streamed(512), block),
        "block losses, materialised": (port(512), block),
    }


def child(cache: str, count: int) -> None:
    """Prints seconds to trace, lower and compile each program, with the persistent cache at `cache`."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.block_until_ready(jnp.zeros(1) + 1.0)  # the backend's own start
    taken = {}
    for name, (function, shapes) in programs(count).items():
        start = time.perf_counter()
        jax.jit(function).lower(*shapes).compile()
        taken[name] = time.perf_counter() - start
    print(json.dumps(taken))


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--child", help=common.argparse.SUPPRESS)
    given = options.parse_args()
    count = 1024 if given.tiny else 65_536 if given.full else 16_384
    if given.child:
        child(given.child, count)
        return
    report = common.Report("compile", given)
    with tempfile.TemporaryDirectory() as cache:
        size = ["--tiny"] if given.tiny else ["--full"] if given.full else []
        command = [sys.executable, "-m", "benchmarks.compile", "--child", cache, *size]
        cold, cached = (
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout)
            for _ in range(2)
        )
    for name, seconds in cold.items():
        report.add(case=name, K=count, cold_s=seconds, cached_s=cached[name], cached_over_cold=cached[name] / seconds)
    report.table()


if __name__ == "__main__":
    main()
