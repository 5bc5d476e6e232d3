"""The engine over 1, 2, 4 and 8 devices: difference from one device, bytes sent (read from the compiled program), time.

python benchmarks/scale.py          # 8 fake CPU devices
"""

from __future__ import annotations

import os
import re

if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and "host_platform_device_count" not in os.environ.get(
    "XLA_FLAGS", ""
):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import common
from protojax import parallel_engine
from protojax.ops.moments import accumulate
from protojax.parallel import ALL, make_mesh

WIDTHS = {"pred": 1, "bf16": 2, "f32": 4, "s32": 4, "f64": 8}
COLLECTIVE = re.compile(r"= (\(?[^=]*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(")


def bytes_sent(program) -> int:
    """Bytes of the results of all collectives of one device."""
    found = 0
    for shapes in COLLECTIVE.findall(program.as_text()):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            found += int(np.prod([int(n) for n in sizes.split(",") if n])) * WIDTHS[dtype]
    return found


def e_step(features, prototypes, bias, mask):
    return accumulate(features, prototypes, bias, features, mask, second="spherical", matmul_dtype=common.policy())


def main() -> None:
    options = common.parser(__doc__).parse_args()
    report = common.Report("scale", options)
    rows, count, width = (16_384, 65_536, 256) if options.full else (2048, 4096, 128)
    if options.tiny:
        rows, count, width = 256, 512, 16
    arrays = common.unit_rows(0, rows, width) * 5.0, common.unit_rows(1, count, width)
    arguments = (*arrays, jnp.zeros(count, jnp.float32), jnp.ones(rows, bool))
    expected = jax.tree.map(np.asarray, jax.jit(e_step)(*arguments))
    size = 4 if common.policy() is None else 2
    for devices in (n for n in (1, 2, 4, 8) if n <= jax.device_count()):
        mesh = make_mesh(devices, 1, jax.devices()[:devices])
        placed = [jax.device_put(a, NamedSharding(mesh, P(ALL))) for a in arguments]

        def split(*arguments, mesh=mesh):
            with parallel_engine.engaged(mesh):
                return e_step(*arguments)

        program = jax.jit(split).lower(*placed).compile()
        found = jax.tree.map(np.asarray, program(*placed))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        error = max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs)
        seconds = common.interleave([common.Contender("", program, [tuple(placed)])], options.repeats)
        budget = count * width * size + count * 4 + rows * width * 4 + 2 * rows * 4 if devices > 1 else 0
        report.add(
            case="E-step",
            devices=devices,
            N=rows,
            K=count,
            D=width,
            error=error,
            sent=bytes_sent(program),
            budget=budget,
            all_reduce_instead=count * (width + 2) * 4 if devices > 1 else 0,
            ms=1e3 * float(np.median(seconds[0])),
        )
    report.table()


if __name__ == "__main__":
    main()
