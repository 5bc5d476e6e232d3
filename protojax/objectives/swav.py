"""SwAV: swapped prediction of equipartitioned assignments (Caron et al., NeurIPS 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import OFF, Array, Codebook, Metrics, Objective, PyTree
from protojax.objectives import common
from protojax.objectives.dino import check_views, pair_cross_entropy, teacher_entropy
from protojax.ops.transport import balanced_potentials


def swav(*, student_temperature: float = 0.1, target_temperature: float = 0.05, iterations: int = 3) -> Objective:
    """mean_{i != j, rows} -sum_k t_jk ln s_ik over student views i and teacher views j, the targets t balanced.

    s_i = softmax((u_i . m_k + b_k) / student_temperature) with the prediction codebook and u = unit(h). Targets are the
    rows of the transport plan between the T B unmasked teacher rows and K prototypes of equal mass,

        t_j = softmax_k(u_j . m'_k / target_temperature + f_k),

    f from `iterations` Sinkhorn iterations that begin at the target codebook's bias b' / target_temperature. Then the
    cross-entropy of `dino`: V + T sweeps and two more an iteration, nothing of N x K is stored.

    Options, each with its reason:
      student_temperature: published 0.1. target_temperature: entropy of the plan, published 0.05; sharper plans need
        more iterations.
      iterations: 3 as published, over the batch alone, which can feed T B prototypes at best. 0: the target's bias as
        it is, for estimators that balance over a memory (`queue_sinkhorn`, at this temperature).

    inputs: student image [V,B,D], teacher image [T,B,D] (the same images as the first T student views), target,
    prediction, mask [B]. Metrics: loss, chance = ln(K), teacher_entropy (mean entropy of t over about 64 rows).

    Raises ValueError or TypeError for options out of range, and ValueError for views that cannot pair.
    """
    student_tau = common.positive("swav, student_temperature", student_temperature)
    target_tau = common.positive("swav, target_temperature", target_temperature)
    common.whole("swav, iterations", iterations, 0)

    def loss(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        mask, prediction = inputs["mask"], inputs["prediction"]
        student, teacher = inputs["student"]["image"], jax.lax.stop_gradient(inputs["teacher"]["image"])
        check_views("swav", student, teacher)
        student, teacher = common.unit_rows(student, mask), common.unit_rows(teacher, mask)
        target = balanced_target(teacher, inputs["target"], mask, target_tau, iterations)
        pairs = pair_cross_entropy(student, teacher, prediction, target, student_tau, target_tau)
        values: dict[str, Array | float] = {
            "loss": common.masked_mean(pairs, mask),
            "chance": math.log(prediction.prototypes.shape[0]),
            "teacher_entropy": teacher_entropy(teacher[0], target, target_tau, mask),
        }
        return jnp.asarray(values["loss"]), {name: common.once(value, mask) for name, value in values.items()}

    requires = frozenset({"student/image", "teacher/image", "target", "prediction", "mask"})
    return Objective(requires, common.nothing_learned, loss)


def balanced_target(teacher: Array, target: Codebook, mask: Array, temperature: float, iterations: int) -> Codebook:
    """The target codebook with the bias at which the unmasked rows of teacher [T,B,D] share out equally: temperature
    times the potentials f of `swav`. No gradient."""
    views = teacher.shape[0]
    prototypes, bias = jax.lax.stop_gradient((target.prototypes, target.bias))
    # Equal shares, -ln K; what is switched off keeps none.
    share = jax.nn.log_softmax(jnp.where(bias > 0.5 * OFF, 0.0, OFF / temperature).astype(teacher.dtype))
    potentials = balanced_potentials(
        teacher.reshape(-1, teacher.shape[2]),
        prototypes,
        share,
        bias / temperature,
        temperature=temperature,
        iterations=iterations,
        mask=jnp.tile(mask.astype(bool), views),
    )
    return Codebook(prototypes, temperature * potentials)
