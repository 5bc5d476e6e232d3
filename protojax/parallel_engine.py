"""The prototype engine over a mesh: which rows and which prototypes each device sweeps, and what it sends.

Rows and prototypes live on the same devices, all of them (axes ('data', 'proto') taken together):

- row sweep (log-sum-exp, attention): each device takes its rows against all prototypes, replicated in the dtype of the
  products; nothing else moves.
- column sweep (statistics, gradients of prototypes): the rows are gathered, each device owns K / devices prototypes and
  keeps their sums, so that the EM state is stored once and never all-reduced.
- keys split (the column half of Sinkhorn): rows stay, partial log-sum-exps of K numbers are combined.
- block losses: rows stay; column sums (K numbers) are added over devices, probabilities are never gathered.

For N rows and K prototypes of width D with b-byte operands an E-step then sends K D b + K 4 bytes (prototypes and bias)
plus N (P + D) b' + 2 N 4 (rows, their normalisers and weights) instead of an all-reduce of 2 K D 4.

`engaged(mesh)` splits every operation of `protojax.ops` traced inside it; the differentiation rules sit above the
sweeps and need no rule of their own. `sharded_lse` and its kin are the same as plain functions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from protojax.ops import kernels
from protojax.ops.block import block_consistency
from protojax.ops.checks import product_dtype
from protojax.ops.lse import attend, lse, soft_cross_entropy
from protojax.ops.moments import accumulate
from protojax.ops.sweeps import Prepare, Tiling
from protojax.ops.transport import balanced_potentials

Array = jax.Array


@dataclass(frozen=True)
class MeshEngine:
    """Splits sweeps over every device of `mesh` (see `kernels.Engine`)."""

    mesh: Mesh

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.mesh.axis_names)

    def _map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _divides(self, what: str, length: int) -> None:
        if length % self.devices:
            raise ValueError(
                f"{what} = {length} does not divide over {self.devices} devices; use a multiple of {self.devices} "
                f"({length // self.devices * self.devices or self.devices} or "
                f"{(length // self.devices + 1) * self.devices}), or fewer devices"
            )

    def replicated(self, array: Array) -> Array:
        return lax.with_sharding_constraint(array, NamedSharding(self.mesh, P()))

    def _whole(self, array: Array, operand: Any) -> Array:
        """`array` everywhere, cast before it is gathered: the wire carries the dtype of the products."""
        if array.dtype != operand:
            # Without the barrier the compiler gathers first and casts afterwards.
            array = lax.optimization_barrier(array.astype(operand))
        return self.replicated(array)

    def row_sweep(
        self,
        queries: Array,
        prototypes: Array,
        bias: Array,
        values: Array | None,
        weights: Array | None,
        options: Tiling,
    ) -> tuple[Array, Array | None, Array | None]:
        alone = options._replace(engine=None, keys_split=False)
        rows, whole = P(self.axes), P()
        if options.keys_split:
            return self._keys_split(queries, prototypes, bias, alone), None, None
        self._divides("the number of rows", queries.shape[0])
        operand = product_dtype(options.matmul_dtype, queries, prototypes)
        attention = values is prototypes

        def sweep(queries, prototypes, bias, values, weights):
            values = prototypes if attention else values
            return kernels.row_sweep(queries, prototypes, bias, values, weights, alone)

        prototypes = self._whole(prototypes, operand)
        values = None if values is None or attention else self._whole(values, operand)
        return self._map(sweep, (rows, whole, whole, whole, whole), rows)(queries, prototypes, bias, values, weights)

    def _keys_split(self, queries: Array, keys: Array, bias: Array, alone: Tiling) -> Array:
        """LSE over keys that are spread over devices: partial results of one number a query are combined."""
        self._divides("the number of rows", keys.shape[0])

        def sweep(queries, keys, bias):
            part, _, _ = kernels.row_sweep(queries, keys, bias, None, None, alone)
            top = lax.pmax(part, self.axes)
            shift = jnp.where(top == -jnp.inf, jnp.zeros((), top.dtype), top)
            return shift + jnp.log(lax.psum(jnp.exp(part - shift), self.axes))

        return self._map(sweep, (P(), P(self.axes), P(self.axes)), P())(queries, keys, bias)

    def column_sweep(
        self, queries: Array, prototypes: Array, bias: Array, lse: Array, rows: Any, prepare: Prepare, options: Tiling
    ) -> tuple[Array, Array]:
        self._divides("the number of rows", queries.shape[0])
        self._divides("the number of prototypes", prototypes.shape[0])
        operand = product_dtype(options.matmul_dtype, queries, prototypes)
        leaves, structure = jax.tree.flatten(rows)
        # Rows that are the queries themselves travel once.
        same = [leaf is queries for leaf in leaves]
        others = [leaf for leaf, is_query in zip(leaves, same, strict=True) if not is_query]
        if not any(same):
            queries = queries.astype(operand)
        alone = options._replace(engine=None)

        def sweep(queries, prototypes, bias, lse, others):
            gather = lambda array: lax.all_gather(array, self.axes, axis=0, tiled=True)  # noqa: E731
            queries, lse, others = jax.tree.map(gather, (queries, lse, others))
            rest = iter(others)
            rows = jax.tree.unflatten(structure, [queries if is_query else next(rest) for is_query in same])
            return kernels.column_sweep(queries, prototypes, bias, lse, rows, prepare, alone)

        split = P(self.axes)
        return self._map(sweep, split, split)(queries, prototypes.astype(operand), bias, lse, others)

    def _block_specs(self, student: Any, teacher: Any) -> tuple[Any, Any, Any, Any]:
        rows = P(None, self.axes)
        sides = [type(side)(rows, *[P()] * (len(side) - 1)) for side in (student, teacher)]
        return sides[0], sides[1], P(self.axes), P()

    def block_sums(self, function: Callable[..., Any], student: Any, teacher: Any, share: Array, blocks: Array) -> Any:
        self._divides("the number of images", share.shape[0])
        total = lambda *arguments: lax.psum(function(*arguments), self.axes)  # noqa: E731
        return self._map(total, self._block_specs(student, teacher), P())(student, teacher, share, blocks)

    def block_bars(
        self,
        function: Callable[..., Any],
        student: Any,
        teacher: Any,
        share: Array,
        blocks: Array,
        consistency_bar: Array,
        slopes: Array,
    ) -> dict[str, Array]:
        def bars(*arguments):
            found = function(*arguments)
            return found.pop("views"), lax.psum(found, self.axes)

        specs = (*self._block_specs(student, teacher), P(), P())
        views, rest = self._map(bars, specs, (P(None, self.axes), P()))(
            student, teacher, share, blocks, consistency_bar, slopes
        )
        return {"views": views, **rest}


@contextlib.contextmanager
def engaged(mesh: Mesh) -> Iterator[None]:
    """Operations of `protojax.ops` traced inside are split over all devices of `mesh` as this module says.

    Rows are expected first-axis sharded over all axes, statistics come back sharded over K; other placements are moved
    there. Raises ValueError, while tracing, for numbers of rows or prototypes that do not divide over the devices."""
    with kernels.split_by(MeshEngine(mesh) if mesh.size > 1 else None):
        yield


def _within(mesh: Mesh, function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def split(*arguments: Any, **more: Any) -> Any:
        with engaged(mesh):
            return function(*arguments, **options, **more)

    return split


def sharded_lse(mesh: Mesh, **options: Any) -> Callable[..., Array]:
    """`ops.lse` with rows over all devices; gradients of prototypes come back sharded over K."""
    return _within(mesh, lse, options)


def sharded_attend(mesh: Mesh, **options: Any) -> Callable[..., tuple[Array, Array]]:
    """`ops.attend` with rows over all devices (values and forward only: its backward pass is left to the compiler)."""
    return _within(mesh, attend, options)


def sharded_soft_cross_entropy(mesh: Mesh, **options: Any) -> Callable[..., Array]:
    """`ops.soft_cross_entropy` with rows over all devices."""
    return _within(mesh, soft_cross_entropy, options)


def sharded_accumulate(mesh: Mesh, **options: Any) -> Callable[..., Any]:
    """`ops.accumulate`: normalisers row by row, statistics [K, ...] sharded over K and stored once."""
    return _within(mesh, accumulate, options)


def sharded_block_consistency(mesh: Mesh, **options: Any) -> Callable[..., tuple[Array, Array]]:
    """`ops.block_consistency` with images over all devices; only K column sums are added up."""
    return _within(mesh, block_consistency, options)


def sharded_balanced_potentials(mesh: Mesh, **options: Any) -> Callable[..., Array]:
    """`ops.balanced_potentials` with rows over all devices; each iteration combines K numbers."""
    return _within(mesh, balanced_potentials, options)
