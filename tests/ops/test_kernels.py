"""Every kernel, interpreted on the CPU, equals the portable path; and the gate that chooses between them."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from protojax.ops import kernels
from protojax.ops.block import block_consistency
from protojax.ops.lse import attend, lse, soft_cross_entropy
from protojax.ops.moments import accumulate

# Ragged: two row blocks, two prototype blocks, a width that is no multiple of 128.
N, K, D = 300, 700, 40


def arrays(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    made = scale * rng.normal(size=(N, D)), rng.normal(size=(K, D)), rng.normal(size=K)
    return tuple(jnp.asarray(a, jnp.float32) for a in made)


def both(function, *arguments):
    """(kernel's results, portable results) as trees of numpy arrays."""
    with kernels.using("pallas_tpu_interpret"):
        found = jax.jit(lambda *a: function(*a))(*arguments)
    with kernels.using("scan"):
        expected = jax.jit(lambda *a: function(*a))(*arguments)
    return jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected)


def agree(found, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.max(np.abs(b)))))


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["random", "peaked"])
def test_cross_entropy_and_its_gradients(scale):
    student, teacher = arrays(0, scale), arrays(1, scale)

    def losses(*student):
        return jax.value_and_grad(lambda *s: jnp.mean(soft_cross_entropy(*s, *teacher)), (0, 1, 2))(*student)

    agree(*both(losses, *student), tolerance=1e-4)


@pytest.mark.parametrize("second", ["diag", "spherical"])
def test_statistics_with_masked_rows(second):
    queries, prototypes, bias = arrays(0)
    mask = jnp.arange(N) % 3 != 0
    features = jnp.where(mask[:, None], queries, jnp.nan)

    def statistics(queries, prototypes):
        return accumulate(queries, prototypes, bias, features, mask, second=second)

    agree(*both(statistics, jnp.where(mask[:, None], queries, jnp.inf), prototypes))


def test_excluded_prototypes_and_bfloat16_operands():
    queries, prototypes, bias = arrays(0)
    bias = jnp.where(jnp.arange(K) % 2 == 0, bias, -jnp.inf)

    def outputs(queries, prototypes):
        halved = lse(queries, prototypes, bias, matmul_dtype=jnp.bfloat16)
        return halved, attend(queries, prototypes, jnp.full((K,), -jnp.inf, jnp.float32))

    (halved, empty), (expected, _) = both(outputs, queries, prototypes)
    agree(halved, expected)
    assert np.all(empty[0] == -np.inf)
    assert not np.any(empty[1])


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["random", "peaked"])
def test_block_losses_and_gradient(scale):
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(scale * rng.normal(size=(v, 150, D)), jnp.float32) for v in (3, 2))
    books = [(jnp.asarray(rng.normal(size=(512, D)), jnp.float32), jnp.zeros(512, jnp.float32)) for _ in range(2)]
    order, mask = jnp.asarray(rng.permutation(512)), jnp.arange(150) < 140
    student = student.at[:, 140:].set(jnp.nan)

    def losses(student, teacher):
        run = lambda s, w: block_consistency(s, teacher, *books, mask, order, block=128, student_temperature=0.7)[w]  # noqa: E731
        return [jax.value_and_grad(run)(student, which) for which in (0, 1)]

    agree(*both(losses, student, teacher), tolerance=1e-4)


def programs():
    """The engine's programs with their argument shapes: loss with every gradient, statistics, block losses."""
    shape = jax.ShapeDtypeStruct
    rows, table, bias = shape((512, 128), jnp.bfloat16), shape((2048, 128), jnp.bfloat16), shape((2048,), jnp.float32)
    views = [shape((v, 256, 128), jnp.bfloat16) for v in (3, 2)]

    def loss(*student):
        return jax.value_and_grad(lambda *s: jnp.mean(soft_cross_entropy(*s, *student)), (0, 1, 2))(*student)

    def statistics(queries, prototypes, bias):
        every = jnp.ones(queries.shape[:1], bool)
        return accumulate(queries, prototypes, bias, queries, every, second="spherical")

    def blocks(student, teacher, prototypes, bias):
        book, every = (prototypes, bias), jnp.ones(student.shape[1:2], bool)
        return jax.grad(lambda s: sum(block_consistency(s, teacher, book, book, every, jnp.arange(2048))))(student)

    return {
        "loss": (loss, (rows, table, bias), 4),
        "statistics": (statistics, (rows, table, bias), 2),
        "blocks": (blocks, (*views, table, bias), 2),
    }


@pytest.mark.parametrize("name", ["loss", "statistics", "blocks"])
def test_programs_lower_to_tpu_kernels(name):
    function, arguments, calls = programs()[name]
    with kernels.using("pallas_tpu"):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == calls


@pytest.mark.parametrize("name", ["loss", "statistics"])
def test_programs_lower_to_hopper_kernels(name):
    function, arguments, calls = programs()[name]
    with kernels.using("mosaic_gpu"):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == calls


def test_hopper_kernels_in_the_gpu_interpreter():
    """Ragged sizes, bfloat16 operands: the same rounding as the portable path up to that of the weights (2^-8)."""
    queries, prototypes, bias = (a[: {N: 130, K: 200}[a.shape[0]]] for a in arrays(0))
    mask = jnp.arange(130) % 3 != 0

    def results(queries, prototypes, bias):
        bf16 = jnp.bfloat16
        outputs = attend(queries, prototypes, bias, matmul_dtype=bf16)
        entropy = soft_cross_entropy(queries, prototypes, bias, -queries, prototypes[::-1], bias, matmul_dtype=bf16)
        return (
            outputs,
            entropy,
            accumulate(queries, prototypes, bias, queries, mask, second="spherical", matmul_dtype=bf16),
        )

    expected = results(queries, prototypes, bias)
    with kernels.using("mosaic_gpu_interpret"):
        if not hasattr(plgpu, "InterpretGPUParams"):  # JAX 0.10
            with pytest.raises(RuntimeError, match="no interpreter for Mosaic GPU kernels"):
                results(queries, prototypes, bias)
            return
        found = results(queries, prototypes, bias)
    (lse_found, mean_found), entropy, (moments, normaliser) = found
    agree((lse_found, normaliser, moments.count), (expected[0][0], expected[2][1], expected[2][0].count), 1e-5)
    agree((mean_found, entropy, moments), (expected[0][1], expected[1], expected[2][0]), 2.0**-8)


def test_hopper_kernels_refuse_wide_rows():
    wide = jnp.ones((4, 300), jnp.float32)
    with kernels.using("mosaic_gpu"), pytest.raises(ValueError, match="widths up to 256, got 320"):
        jax.eval_shape(lse, wide, wide, wide[:, 0])


def test_gate_takes_the_portable_path_on_cpu_and_says_so_once(caplog):
    kernels._log_once.cache_clear()
    queries, prototypes, bias = arrays(0)
    with caplog.at_level(logging.INFO, "protojax.ops.kernels"):
        for _ in range(2):
            assert kernels.plan(queries, prototypes, bias, 2048, None, None).path == "scan"
    assert [r.getMessage() for r in caplog.records] == [
        "prototype sweeps run as scan on cpu: the portable path is this platform's"
    ]


@pytest.mark.parametrize(
    ("platform", "sizes", "operand", "total", "expected", "why"),
    [
        ("tpu", (4096, 65_536, 256), "bfloat16", "float32", "pallas_tpu", "fits"),
        ("tpu", (64, 65_536, 256), "bfloat16", "float32", "scan", "too few rows"),
        ("tpu", (4096, 65_536, 2048), "bfloat16", "float32", "scan", "wider than 1024"),
        ("tpu", (4096, 65_536, 256), "float64", "float64", "scan", "float32"),
        ("gpu", (4096, 65_536, 256), "float32", "float32", "scan", "take bfloat16"),
        ("gpu", (4096, 65_536, 512), "bfloat16", "float32", "scan", "up to 256"),
        ("gpu", (4096, 256, 256), "bfloat16", "float32", "scan", "too few rows or prototypes"),
        ("gpu", (4096, 65_536, 256), "bfloat16", "float32", "mosaic_gpu", "fits"),
    ],
)
def test_gate_by_device_and_size(monkeypatch, platform, sizes, operand, total, expected, why):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(kernels, "_partitioned", lambda: False)
    monkeypatch.setattr(kernels, "_hopper", lambda: True)
    path, reason = kernels.choose(*sizes, jnp.dtype(operand), jnp.dtype(total))
    assert path == expected
    assert why in reason


def test_gate_falls_back_when_kernels_do_not_import(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(kernels, "_partitioned", lambda: False)
    monkeypatch.setattr(kernels, "_module", lambda path: ImportError("moved"))
    path, reason = kernels.choose(4096, 65_536, 256, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
    assert path == "scan"
    assert "does not import" in reason
    assert "moved" in reason
    with pytest.raises(RuntimeError, match="'pallas_tpu' is not available with JAX"), kernels.using("pallas_tpu"):
        pass


def test_kernels_wait_for_shard_map_when_there_are_devices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    path, reason = kernels.choose(4096, 65_536, 256, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
    assert path == "scan"
    assert "shard_map" in reason


def test_unknown_path_is_refused():
    with pytest.raises(ValueError, match=r"kernel path must be one of scan, .* got 'triton'"), kernels.using("triton"):
        pass
