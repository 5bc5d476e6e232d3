"""Strict numerics for every test: 8 fake devices, no silent dtype or rank promotion, warnings are errors."""

from __future__ import annotations

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count=8"
# Most of the time of a test that trains is compiling, so XLA compiles the fast tier's programs with less effort
# (a smoke configuration's step in 4 s in place of 21). `make test-all` (PROTOJAX_TEST_COMPILE=full) and the commands at
# the end of .ci/run compile as users' runs do.
if os.environ.get("PROTOJAX_TEST_COMPILE", "quick") == "quick":
    _FLAG += " --xla_backend_optimization_level=0"
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones do not know it
        _FLAG += " --xla_cpu_use_fusion_emitters=false"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " " + _FLAG).strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Two cores, many small matmuls: one thread a worker is faster than oversubscription.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

_CACHE = os.environ.get("PROTOJAX_TEST_CACHE", os.path.join(os.path.dirname(__file__), "..", ".cache", "jax"))
jax.config.update("jax_compilation_cache_dir", os.path.abspath(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Float64 inside the test, for identities that hold to rounding only."""
    with jax.enable_x64(True):
        yield
