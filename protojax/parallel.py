"""Devices: one mesh with axes ('data', 'proto'), and where every array lives on it.

Batches are split on their first axis over *all* devices (P(('data', 'proto'))). Estimator arrays below `components`
(first axis K) and `memory` (first axis rows) are stored once, over all devices, where their first axis divides; all
else is replicated. The maths in `ops`, `estimators` and `objectives` names no axis: XLA partitions it.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ALL = ("data", "proto")

# Ordered: the first pattern found in a leaf's path decides. `None` = replicated.
RULES: tuple[tuple[str, P | None], ...] = (
    (r"^estimator/(.*/)?components/", P(ALL)),
    (r"^estimator/(.*/)?memory/", P(ALL)),
    (r".*", None),
)
# With system.fsdp, before those: encoder parameters wherever they occur (parameters, EMA, optimiser state).
FSDP_RULE = r"^(params|teacher|opt)/(.*/)?encoder/"
FSDP_SMALLEST = 2**14  # numbers: below, a copy on each device costs less than gathering


def fsdp_spec(shape: tuple[int, ...], devices: int) -> P | None:
    """The longest axis that divides over `devices` is split; None (a copy on each) for small or indivisible arrays."""
    fitting = [axis for axis, size in enumerate(shape) if size % devices == 0]
    if not fitting or int(np.prod(shape)) < FSDP_SMALLEST:
        return None
    longest = max(fitting, key=lambda axis: shape[axis])
    return P(*([None] * longest), ALL)


def make_mesh(data: int = -1, proto: int = 1, devices: list[Any] | None = None) -> Mesh:
    """Mesh of data x proto devices; -1 means what is left.

    Raises ValueError when the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    n = len(devices)
    if data == -1 and proto == -1:
        data, proto = n, 1
    if data == -1:
        data = n // max(proto, 1)
    if proto == -1:
        proto = n // max(data, 1)
    if data * proto != n:
        raise ValueError(
            f"system.data x system.proto must be the number of devices: got {data} x {proto}, there are {n} devices. "
            "Use -1 for one of them."
        )
    return jax.make_mesh((data, proto), ALL, axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def check_divisible(mesh: Mesh, **sizes: int) -> None:
    """Raise ValueError unless each size (a batch, K, a memory) divides over the mesh's devices."""
    n = mesh.size
    for name, size in sizes.items():
        if size % n:
            raise ValueError(
                f"{name} = {size} does not divide over {n} devices; use a multiple of {n} (for example "
                f"{max(n, round(size / n) * n)}) or fewer devices (config.system.data, config.system.proto)."
            )


def path_of(path: tuple[Any, ...]) -> str:
    """'estimator/components/mean' of a key path from jax.tree_util."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def state_shardings(mesh: Mesh, shapes: Any, fsdp: bool = False) -> Any:
    """A tree of NamedSharding for a tree of shapes, by RULES; fsdp: encoder parameters by FSDP_RULE.

    Raises ValueError for an array that is to be split and whose first axis does not divide over the devices.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_of(path)
        if fsdp and re.search(FSDP_RULE, name):
            return NamedSharding(mesh, fsdp_spec(leaf.shape, mesh.size) or P())
        spec = next(s for pattern, s in RULES if re.search(pattern, name))
        if spec is None or leaf.ndim == 0:
            return NamedSharding(mesh, P())
        if leaf.shape[0] % mesh.size:
            raise ValueError(
                f"{name} has {leaf.shape[0]} rows (prototypes, or rows of a memory), which do not divide over "
                f"{mesh.size} devices; use a multiple of {mesh.size} or fewer devices."
            )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def place_constants(mesh: Mesh, constants: Any) -> Any:
    """Seed and frozen arrays on every device. Every process holds the same ones."""
    return jax.device_put(constants, replicated(mesh))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows over all devices; `axis` is where the batch axis is (1 when steps are stacked in front)."""
    return NamedSharding(mesh, P(*([None] * axis), ALL))


def global_shapes(batch: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch of which every process holds equally many rows."""
    count = jax.process_count()
    return {
        k: jax.ShapeDtypeStruct((v.shape[0] * count, *v.shape[1:]), jax.dtypes.canonicalize_dtype(v.dtype))
        for k, v in batch.items()
    }


def to_device(mesh: Mesh, batch: dict[str, np.ndarray], axis: int = 0) -> dict[str, jax.Array]:
    """This process's rows -> global arrays, batch axis over all devices."""
    sharding = batch_sharding(mesh, axis)
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def to_host(tree: Any) -> Any:
    """Device arrays -> numpy, whatever their sharding (all processes get everything)."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)
