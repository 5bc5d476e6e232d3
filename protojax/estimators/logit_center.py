"""DINO's centre of the teacher's logits, for any estimator."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from protojax.api import OFF, Array, Codebook, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common


def with_logit_center(estimator: Estimator, momentum: float = 0.9, *, features: str = "unit") -> Estimator:
    """The estimator, with the teacher's logits centred as in DINO (Caron et al. 2021, eq. 4).

    DINO keeps c_k <- m c_k + (1 - m) mean_i l_ik and scores the teacher by l_k - c_k. With l_ik = h_i . w_k + b_k
    the batch mean is hbar . w_k + b_k, so that one running mean of the *features*, g <- m g + (1 - m) hbar, holds the
    centre of all K logits: target.bias = b_k - (g . w_k + b_k) = -g . w_k. This costs O(N D) a step and O(K D) a
    codebook instead of N x K logits. Where DINO averages logits of past prototypes, the past features are scored
    against today's; for prototypes that do not move both are the same.

    features: how the objective reads them ('unit' for DINO). The state gains S['shared']['logit_mean'] [D].
    """
    common.check_share("with_logit_center, momentum", momentum, zero=True)
    common.check_reading("with_logit_center", features)

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        return _with_mean(estimator.init(key, spec), jnp.zeros((spec.dim,), common.float_dtype()))

    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        own = common.row_statistics(*common.read_rows(rows, features))
        return {"inner": estimator.statistics(S, rows), "rows": own["rows"], "feature_sum": own["feature_sum"]}

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        new, info = estimator.update(S, stats["inner"], rows, step, key)
        past, count = S["shared"]["logit_mean"], stats["rows"]
        mean = momentum * past + (1.0 - momentum) * stats["feature_sum"] / jnp.maximum(count, 1.0)
        mean = common.keep_if_empty(count, mean, past)
        length = jnp.sqrt(jnp.sum(mean * mean))
        return _with_mean(new, mean), {**info, **common.report({"logit_mean_norm": length}, count)}

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        target, prediction = estimator.codebooks(S, head)
        bias = -(target.prototypes @ S["shared"]["logit_mean"].astype(target.prototypes.dtype))
        bias = jnp.where(target.bias > 0.5 * OFF, bias, target.bias)  # what is switched off stays so
        return Codebook(target.prototypes, jax.lax.stop_gradient(bias)), prediction

    def start(S: PyTree, rows: Mapping[str, Array], key: Key) -> PyTree:
        return _with_mean(estimator.start(S, rows, key), S["shared"]["logit_mean"])

    return Estimator(init, statistics, update, codebooks, estimator.head, estimator.start_rows, start)


def _with_mean(S: PyTree, mean: Array) -> PyTree:
    return {**S, "shared": {**S["shared"], "logit_mean": mean}}
