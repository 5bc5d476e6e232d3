"""Everything to run on a GPU or TPU, in one command: kernels against float64 on the device, then the tables.

    python benchmarks/accelerator.py --json docs/results/NAME.jsonl

Without an accelerator it says so and stops. Targets (docs/results): E-step with statistics at N = 4096, K = 65,536,
D = 256 in at most 0.8 ms on an H200; loss with gradient at least 3 times XLA's autodiff in float32."""

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


def check_kernels() -> None:
    """Loss, gradients and statistics by the device's kernels against the portable path with float32 operands."""
    path = {"tpu": "pallas_tpu"}.get(jax.default_backend(), "mosaic_gpu")
    for width in (64, 200, 256):
        rows = common.unit_rows(0, 1000, width) * 8.0
        table = common.unit_rows(1, 5000, width)
        bias = jnp.asarray(np.random.default_rng(2).normal(size=5000), jnp.float32)

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
    if jax.default_backend() == "cpu":
        sys.exit("no accelerator here: the kernels are tested in interpret mode by tests/ops/test_kernels.py")
    check_kernels()
    arguments = sys.argv[1:]
    codes = [
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--full", *arguments], check=False).returncode
        for name in ("lse", "em", "carp", "scale", "compile")
    ]
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
