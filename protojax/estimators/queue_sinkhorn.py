"""SwAV's prototypes: learned with the encoder, the teacher's assignments balanced over a queue of features."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from protojax.api import Array, Codebook, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common
from protojax.estimators.balanced import empty_memory, remember
from protojax.estimators.learned import head_prototypes, random_head


def queue_sinkhorn(
    components: int,
    *,
    queue: int | None = None,
    temperature: float = 0.05,
    iterations: int = 3,
    features: str = "unit",
    engine: common.Engine = common.LOCAL,
) -> Estimator:
    """Joint prototypes with equipartitioned targets, after SwAV (Caron et al. 2020): K = `components` head parameters.

    The state is a queue of the last M teacher features, the batch's among them. The target codebook is
    stop_gradient(unit(head)) with bias temperature * f, f the potentials of `iterations` Sinkhorn iterations from zero
    over the queue with equal masses, so that an objective with this teacher temperature sees

        t_i = softmax_k(h_i . w_k / temperature + f_k),   mean over the queue of t_ik -> 1 / K.

    The prediction is unit(head) without bias. Nothing here moves prototypes: the objective's gradient does, as in
    `learned`. What the state never sees (the head) it cannot count, so there is no usage in the report. Without a queue
    of at least K rows a batch smaller than K cannot be shared out among K prototypes.

    Options, each with its reason:
      queue: M, default 2 K (published: 3,840 rows for K = 3,000).
      temperature: of the plan; give the objective the same teacher temperature, and `swav` iterations=0 or it would
        balance again over the batch alone.
      iterations: Sinkhorn iterations a step; 0 balances nothing, which is `learned`.
      features: 'unit' or 'raw', as the objective reads them ('raw' for logits without temperature: then 1.0).
    There is no centring switch: subtracting a mean adds one constant to all logits of a prototype, which the
    potentials take off again.

    State: components {}; memory {features [M,D], written [M] (step, -1 empty)}; shared {cursor, total_steps}. Raises
    ValueError or TypeError for any option out of range.
    """
    count = common.check_count("queue_sinkhorn, components", components)
    size = 2 * count if queue is None else common.check_count("queue_sinkhorn, queue", queue)
    iterations = common.check_count("queue_sinkhorn, iterations", iterations, 0)
    common.check_reading("queue_sinkhorn", features)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not temperature > 0:
        raise ValueError(f"queue_sinkhorn, temperature: expected a positive number, got {temperature!r}.")

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        shared = {**common.shared_start(spec), "cursor": jnp.zeros((), jnp.int32)}
        return {"components": {}, "memory": empty_memory(size, spec.dim), "shared": shared}

    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        return common.row_statistics(*common.read_rows(rows, features))

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        read, mask = common.read_rows(rows, features)
        new = remember(S, read, mask, step)
        fill = jnp.mean((new["memory"]["written"] >= 0).astype(read.dtype))
        info = {**common.row_info(stats), "memory_fill": fill}
        return common.keep_if_empty(stats["rows"], new, S), common.report(info, stats["rows"])

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        prediction = head_prototypes(head, count)
        none = jnp.zeros((count,), prediction.dtype)
        target = jax.lax.stop_gradient(prediction)
        memory = jax.lax.stop_gradient(S["memory"]["features"])
        potentials = engine.balanced_potentials(
            memory,
            target,
            jnp.full((count,), -math.log(count), memory.dtype),
            jnp.zeros((count,), memory.dtype),
            temperature=temperature,
            iterations=iterations,
            mask=S["memory"]["written"] >= 0,
        )
        return common.fixed_codebooks(target, temperature * potentials)[0], Codebook(prediction, none)

    return Estimator(init, statistics, update, codebooks, random_head(count), 0, common.no_start)
