"""The dial between decoupled and joint prototypes (the paper's third open question)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Array, Codebook, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common
from protojax.estimators.balanced import balanced
from protojax.ops.unit import unit


def coupled(components: int, *, coupling: float = 0.5, **options: Any) -> Estimator:
    """`balanced(components, **options)` under `with_coupling`, the dial at `coupling` in [0, 1]."""
    return with_coupling(balanced(components, **options), coupling)


coupled.passes_to = balanced  # type: ignore[attr-defined]


def with_coupling(estimator: Estimator, coupling: float) -> Estimator:
    """Prototypes that EM and the optimiser move together: shares 1 - lambda and lambda = `coupling`.

    The head holds an offset d [K,D], zero at first, the state the means m of `estimator`. Prototypes, for teacher and
    student alike (each with its own copy of d), are

        p_k = unit(unit(m_k) + lambda d_k).

    Optimiser: the gradient that reaches d is that of the term unit(m) + d (stop-gradient takes lambda out of the
    derivative), so that p moves by lambda times the step that the optimiser makes of the joint gradient: the share is
    lambda for every optimiser, Adam included, which would undo a gradient that is only scaled.
    EM: E- and M-step start from the *tied* means, of length |m_k| and direction p_k with the teacher's d, and
    m_k <- m_k + (1 - lambda) (M-step(tied)_k - tied_k). EM therefore answers to where the gradient took a prototype and
    pulls it back towards its rows; were it blind to d, any lambda > 0 would end as joint. The rest of the state
    (potentials, usage, weights, centre, memory) follows in full.

    lambda = 0 is `estimator` itself, no head. lambda = 1 leaves m as it started: p = unit(m_0 + d) under the full
    gradient is joint training that begins at m_0, step for step, for optimisers that see the gradient alone (SGD,
    Adam). Weight decay and layer-wise rates act on d: decay pulls prototypes to where EM has them.

    rows['offset'] [K,D]: the teacher's d, as the recipe's `rows` finds it in the head. Rows without it stand for an
    offset of zero (the start, before the optimiser has moved).

    `estimator` is one of those whose state has components {'mean' [K,D], ...} and whose codebook is unit(mean) with
    bias -center . unit(mean). Raises ValueError for another, and for a coupling outside [0, 1].
    """
    share = common.check_share("coupled, coupling", coupling, zero=True)
    if share == 0.0:
        return estimator

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        S = estimator.init(key, spec)
        if "mean" not in S["components"]:
            raise ValueError(
                "coupled: expected an estimator whose state has components/mean, what EM moves; got components "
                f"{sorted(S['components'])}. Choose 'balanced', 'mixture' or another decoupled estimator."
            )
        return S

    def head(key: Key, spec: EstimatorSpec) -> PyTree:
        means = jax.eval_shape(lambda: estimator.init(key, spec)["components"]["mean"])
        return {"offset": jnp.zeros(means.shape, means.dtype)}

    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        return estimator.statistics(_tied(S, rows, share), rows)

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        tied, mean = _tied(S, rows, share), S["components"]["mean"]
        new, info = estimator.update(tied, stats, rows, step, key)
        mean = mean + (1.0 - share) * (new["components"]["mean"] - tied["components"]["mean"])
        return {**new, "components": {**new["components"], "mean": mean}}, info

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        if "offset" not in head:
            raise ValueError(
                f"codebooks: expected the head that this estimator made, {{'offset': [K, D]}}, got keys "
                f"{sorted(head)}: pass params['head']['prototypes']."
            )
        offset = head["offset"]
        base = estimator.codebooks(S, {})[0]
        prototypes = unit(base.prototypes + offset + jax.lax.stop_gradient((share - 1.0) * offset))
        center = jax.lax.stop_gradient(S["shared"].get("center", jnp.zeros(offset.shape[1:], offset.dtype)))
        prediction = Codebook(prototypes, base.bias + (base.prototypes - prototypes) @ center)
        return jax.lax.stop_gradient(prediction), prediction

    return Estimator(init, statistics, update, codebooks, head, estimator.start_rows, estimator.start)


def _tied(S: PyTree, rows: Mapping[str, Array], share: float) -> PyTree:
    """The state with means turned to where the prototypes are, their lengths kept."""
    if "offset" not in rows:
        return S
    mean, offset = S["components"]["mean"], jax.lax.stop_gradient(rows["offset"])
    length = jnp.sqrt(jnp.sum(mean * mean, axis=1))
    tied = length[:, None] * unit(unit(mean) + share * offset.astype(mean.dtype))
    return {**S, "components": {**S["components"], "mean": tied}}
