"""Which program runs a sweep: the portable scan, Pallas on a TPU, or Mosaic GPU on a Hopper card. The only gate.

`plan` picks one path for a call from the platform, the sizes and the dtypes, and says so once in the log; every
operation then hands its options here. The portable path is the default on CPU, the reference of every kernel, and what
is left when a kernel's module does not import under the installed JAX or its sizes do not pay.

Kernels cannot be partitioned by the compiler: with several devices they run inside `jax.shard_map` only, and elsewhere
the portable path does. Splitting over devices happens here too, below the differentiation rules and so without any of
its own: an `Engine` (made by `parallel_engine`, which knows the mesh; nothing in `ops` names an axis) takes a sweep,
cuts its arrays and runs the sweep of one device on each.

Tests and benchmarks name a path themselves: `with kernels.using("pallas_tpu_interpret"): ...`, around the *tracing*
of a function; the environment variable PROTOJAX_KERNELS does the same for a process.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import DTypeLike

from protojax.ops import sweeps
from protojax.ops.checks import accumulation_dtype, positive, product_dtype
from protojax.ops.sweeps import Prepare, Tiling

Array = jax.Array
logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Runs a sweep split over devices; hashable. Its methods take the arguments of the functions below."""

    @property
    def devices(self) -> int: ...

    def row_sweep(self, queries, prototypes, bias, values, weights, options): ...

    def column_sweep(self, queries, prototypes, bias, lse, rows, prepare, options): ...

    def block_sums(self, function, student, teacher, share, blocks): ...

    def block_bars(self, function, student, teacher, share, blocks, consistency_bar, slopes): ...

    def replicated(self, array): ...


PATHS = ("scan", "pallas_tpu", "pallas_tpu_interpret", "mosaic_gpu", "mosaic_gpu_interpret")
_MODULES = {"pallas_tpu": "protojax.ops.pallas_tpu", "mosaic_gpu": "protojax.ops.mosaic_gpu"}
_engine: contextvars.ContextVar[Any] = contextvars.ContextVar("protojax_engine", default=None)
_products: contextvars.ContextVar[str | None] = contextvars.ContextVar("protojax_matmul_dtype", default=None)
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("protojax_kernel_path", default=None)


@contextlib.contextmanager
def using(path: str) -> Iterator[None]:
    """Every operation traced inside takes `path`, one of PATHS, whatever its sizes.

    Raises ValueError for an unknown path, RuntimeError where its kernels do not import under the installed JAX."""
    if path not in PATHS:
        raise ValueError(f"kernel path must be one of {', '.join(PATHS)}, got {path!r}")
    if path != "scan" and isinstance(_module(path), Exception):
        raise RuntimeError(f"kernel path {path!r} is not available with JAX {jax.__version__}: {_module(path)!r}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def split_by(engine: Engine | None) -> Iterator[None]:
    """Every operation traced inside is split over devices by `engine` (None: by the compiler)."""
    token = _engine.set(engine)
    try:
        yield
    finally:
        _engine.reset(token)


@contextlib.contextmanager
def products_in(matmul_dtype: DTypeLike | None) -> Iterator[None]:
    """The policy for every operation traced inside that names no `matmul_dtype` of its own and sums in float32.

    None: operands keep their dtype. Raises TypeError for another dtype than bfloat16, float32 or float64."""
    name = None if matmul_dtype is None else product_dtype(matmul_dtype).name
    token = _products.set(name)
    try:
        yield
    finally:
        _products.reset(token)


def policy(matmul_dtype: DTypeLike | None, total: Any) -> DTypeLike | None:
    """`matmul_dtype`, or that of the enclosing `products_in` where sums are float32."""
    return _products.get() if matmul_dtype is None and total == jnp.float32 else matmul_dtype


@functools.cache
def _module(path: str) -> ModuleType | Exception:
    """The kernels' module, or why it does not import: Pallas APIs move with every release of JAX."""
    try:
        return importlib.import_module(_MODULES[path.removesuffix("_interpret")])
    except Exception as error:
        return error


def _kernels(path: str) -> Any:
    return None if path == "scan" else _module(path)


@functools.cache
def _log_once(path: str, reason: str) -> None:
    logger.info("prototype sweeps run as %s on %s: %s", path, jax.default_backend(), reason)


def _hopper() -> bool:
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")


def _partitioned() -> bool:
    """Whether the compiler, not `shard_map`, may have to split the call over devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if _engine.get() is not None:
        return False
    if mesh.empty:
        return jax.device_count() > 1
    return any(kind != AxisType.Manual for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True) if size > 1)


def choose(rows: int, count: int, width: int, operand: Any, total: Any) -> tuple[str, str]:
    """(path, reason) for N rows, K prototypes, width D and the dtypes of products and sums, on the default device."""
    named = _forced.get() or os.environ.get("PROTOJAX_KERNELS", "auto")
    if named != "auto":
        return named, "asked for"
    platform = jax.default_backend()
    path = {"tpu": "pallas_tpu", "gpu": "mosaic_gpu", "cuda": "mosaic_gpu"}.get(platform, "scan")
    if path == "scan":
        return path, "the portable path is this platform's"
    if total != jnp.float32:
        return "scan", "kernels sum in float32"
    if _partitioned():
        return "scan", "kernels run inside shard_map only when there are several devices"
    if rows < 128 or count < 1024:
        return "scan", "too few rows or prototypes for a kernel to pay (128 and 1024)"
    if path == "mosaic_gpu" and not _hopper():
        return "scan", "the Mosaic GPU kernels are written for Hopper"
    if path == "mosaic_gpu" and (operand != jnp.bfloat16 or width > 256):
        return "scan", "the Mosaic GPU kernels take bfloat16 operands of width up to 256"
    if path == "pallas_tpu" and width > 1024:
        return "scan", "blocks wider than 1024 do not fit the TPU's vector memory"
    module = _module(path)
    if isinstance(module, Exception):
        return "scan", f"{path} does not import under JAX {jax.__version__}: {module!r}"
    return path, "kernel fits the device and the sizes"


def plan(
    queries: Array, prototypes: Array, bias: Array, tile: int, row_tile: int | None, matmul_dtype: DTypeLike | None
) -> Tiling:
    """Checked, hashable options of one call, its path among them."""
    total = accumulation_dtype(queries, prototypes, bias)
    matmul_dtype = policy(matmul_dtype, total)
    options = Tiling(
        positive("tile", tile),
        None if row_tile is None else positive("row_tile", row_tile),
        None if matmul_dtype is None else jnp.dtype(matmul_dtype).name,
    )
    operand = product_dtype(matmul_dtype, queries, prototypes)
    engine = current_engine()
    rows = queries.shape[0] // (1 if engine is None else engine.devices)
    path, reason = choose(rows, prototypes.shape[0], prototypes.shape[1], operand, total)
    _log_once(path, reason)
    return options._replace(path=path, engine=engine)


def current_engine() -> Any:
    """The engine of the enclosing `split_by`, or None."""
    return _engine.get()


def replicated(array: Array) -> Array:
    """`array` on every device, where an engine splits the work: gathered once instead of in every iteration."""
    engine = current_engine()
    return array if engine is None else engine.replicated(array)


def block_path(rows: int, block: int, width: int, operand: Any, total: Any) -> str:
    """The path of the block losses: Pallas on a TPU where blocks are whole tiles, the portable sweep elsewhere."""
    path, reason = choose(rows, max(block, 1024), width, operand, total)
    if not path.startswith("pallas_tpu") or block % 128 or width > 512:
        path, reason = "scan", "block losses have a kernel on TPUs, for blocks of a multiple of 128 and D up to 512"
    _log_once(path, reason)
    return path


def streams_rows(options: Tiling) -> bool:
    """Whether a caller may take a sweep apart into chunks of rows itself (the portable path)."""
    return options.path == "scan" and options.engine is None


def completes_rows(options: Tiling) -> bool:
    """Whether complete rows of logits are the better way to gather statistics: on a CPU."""
    return streams_rows(options) and jax.default_backend() == "cpu"


def row_sweep(
    queries: Array, prototypes: Array, bias: Array, values: Array | None, weights: Array | None, options: Tiling
) -> tuple[Array, Any, Any]:
    """`sweeps.row_sweep` by the engine and the path of `options`."""
    if options.engine is not None:
        return options.engine.row_sweep(queries, prototypes, bias, values, weights, options)
    kernels = _kernels(options.path)
    if kernels is None:
        return sweeps.row_sweep(queries, prototypes, bias, values, weights, options)
    interpret = options.path.endswith("_interpret")
    return kernels.row_sweep(queries, prototypes, bias, values, weights, options, interpret)


def column_sweep(
    queries: Array, prototypes: Array, bias: Array, lse: Array, rows: Any, prepare: Prepare, options: Tiling
) -> tuple[Array, Array]:
    """`sweeps.column_sweep` by the engine and the path of `options`."""
    if options.engine is not None:
        return options.engine.column_sweep(queries, prototypes, bias, lse, rows, prepare, options)
    kernels = _kernels(options.path)
    if kernels is None:
        return sweeps.column_sweep(queries, prototypes, bias, lse, rows, prepare, options)
    interpret = options.path.endswith("_interpret")
    return kernels.column_sweep(queries, prototypes, bias, lse, rows, prepare, options, interpret)


def block_kernels() -> ModuleType:
    """The Pallas kernels of the block losses; `block_path` has said that they are there."""
    return importlib.import_module("protojax.ops.pallas_block")
