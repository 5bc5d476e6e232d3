"""Everything to run on a GPU or TPU, in one command: kernels against float32 on the device, then the tables.

    python -m benchmarks.accelerator --out docs/results/NAME

Without an accelerator it says so and stops; `--smoke` runs all of it at tiny sizes anywhere, kernels interpreted.
Targets (docs/results): E-step with statistics at N = 4096, K = 65,536, D = 256 in at most 0.8 ms on an H200; loss with
gradient at least 3 times XLA's autodiff in float32 and 73% of the run's matmul rate."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from protojax.ops import kernels
from protojax.ops.lse import soft_cross_entropy
from protojax.ops.moments import accumulate


def check_kernels(smoke: bool) -> None:
    """Loss, gradients and statistics by the device's kernels against the portable path with float32 operands."""
    path = {"tpu": "pallas_tpu", "cpu": "pallas_tpu_interpret"}.get(jax.default_backend(), "mosaic_gpu")
    number, count, widths = (100, 700, (40,)) if smoke else (1000, 5000, (64, 200, 256))
    for width in widths:
        rows = common.unit_rows(0, number, width) * 8.0
        table = common.unit_rows(1, count, width)
        bias = jnp.asarray(np.random.default_rng(2).normal(size=count), jnp.float32)

        def everything(rows, table, bias, policy):
            def loss(*student):
                entropy = soft_cross_entropy(*student, -rows, table, bias, matmul_dtype=policy)
                return jnp.mean(entropy)

            every = jnp.ones(rows.shape[:1], bool)
            statistics = accumulate(rows, table, bias, rows, every, second="spherical", matmul_dtype=policy)
            return jax.value_and_grad(loss, (0, 1, 2))(rows, table, bias), statistics

        with kernels.using(path):
            found = jax.jit(everything, static_argnums=3)(rows, table, bias, jnp.bfloat16)
        with kernels.using("scan"):
            expected = jax.jit(lambda *a: everything(*a, jnp.float32))(rows, table, bias)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        worst = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in pairs)
        print(f"{path}, D = {width}: largest relative difference from float32 {worst:.1e}")
        if not worst < 2e-2:
            sys.exit(f"{path} is wrong at D = {width}; nothing was timed")


def main() -> None:
    smoke, arguments = "--smoke" in sys.argv[1:], [a for a in sys.argv[1:] if a != "--smoke"]
    if jax.default_backend() == "cpu" and not smoke:
        sys.exit("no accelerator here: the kernels are tested in interpret mode by tests/ops/test_kernels.py")
    check_kernels(smoke)
    size = ["--tiny", "--repeats=2"] if smoke else ["--full"]
    codes = [
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *size, *arguments], check=False).returncode
        for name in ("lse", "em", "carp", "scale", "compile")
    ]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
