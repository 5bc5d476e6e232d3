"""Every kernel, interpreted on the CPU, equals the portable path; and the gate that chooses between them."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    with pytest.raises(ValueError, match="kernel path must be one of scan, .* got 'triton'"), kernels.using("triton"):
        pass
