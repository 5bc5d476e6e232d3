"""Prototypes that the optimiser learns (joint training), and prototypes that nobody does (frozen random)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from protojax.api import Array, Codebook, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common
from protojax.estimators.logit_center import with_logit_center
from protojax.ops.unit import unit


def learned(
    components: int,
    *,
    features: str = "raw",
    center_momentum: float | None = None,
    engine: common.Engine = common.LOCAL,
) -> Estimator:
    """Joint training: K = `components` prototypes are parameters, moved by the encoder's optimiser and loss.

    head: {'prototypes': [K,D]}, random directions; read through weight normalisation with gain 1 (unit rows), so that
    only directions are learned. codebooks(S, head): target = stop_gradient(head), prediction = head; a teacher takes
    the target from its EMA head and the prediction from the student's. The state holds nothing but the run's length.

    features: how the objective reads features, for the centre and the report ('raw' or 'unit').
    center_momentum: DINO's centre of the teacher's logits (0.9 there), see `with_logit_center`; None: no centre.
    """
    count = common.check_count("learned, components", components)
    common.check_reading("learned", features)

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        return {"components": {}, "memory": {}, "shared": common.shared_start(spec)}

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        prototypes = head_prototypes(head, count)
        bias = jnp.zeros((count,), prototypes.dtype)
        return Codebook(jax.lax.stop_gradient(prototypes), bias), Codebook(prototypes, bias)

    estimator = _unmoved(init, codebooks, random_head(count), features)
    return estimator if center_momentum is None else with_logit_center(estimator, center_momentum, features=features)


def frozen(components: int, *, features: str = "raw", engine: common.Engine = common.LOCAL) -> Estimator:
    """Control: K = `components` random unit prototypes that never move, S['components'] = {'prototypes': [K,D]}.

    An untrained codebook is unique at every epsilon (65,536 directions in 256 dimensions have a largest cosine of
    0.38): whatever a moved codebook claims has to be read against this arm.
    """
    count = common.check_count("frozen, components", components)
    common.check_reading("frozen", features)

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        prototypes = common.random_directions(key, count, spec.dim)
        return {"components": {"prototypes": prototypes}, "memory": {}, "shared": common.shared_start(spec)}

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        prototypes = S["components"]["prototypes"]
        return common.fixed_codebooks(prototypes, jnp.zeros((count,), prototypes.dtype))

    return _unmoved(init, codebooks, common.no_head, features)


def random_head(count: int) -> Callable[[Key, EstimatorSpec], PyTree]:
    """`Estimator.head` of learned prototypes: {'prototypes': [count,D]}, random directions."""
    return lambda key, spec: {"prototypes": common.random_directions(key, count, spec.dim)}


def head_prototypes(head: PyTree, count: int) -> Array:
    """Unit prototypes [K,D] of a head made by this package's estimators."""
    if "prototypes" not in head:
        raise ValueError(
            f"codebooks: expected the head that this estimator made, {{'prototypes': [{count}, D]}}, got keys "
            f"{sorted(head)}: pass params['head']['prototypes']."
        )
    return unit(head["prototypes"])


def _unmoved(init, codebooks, head, features: str) -> Estimator:
    """An estimator whose state no row changes; it reports on the features alone."""

    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        return common.row_statistics(*common.read_rows(rows, features))

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        return S, common.report(common.row_info(stats), stats["rows"])

    return Estimator(init, statistics, update, codebooks, head, 0, common.no_start)
