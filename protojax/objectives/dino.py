"""DINO: cross-entropy between the assignments of different views to all prototypes (Caron et al., ICCV 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Array, Codebook, Metrics, Objective, PyTree
from protojax.objectives import common
from protojax.ops.lse import expectation, lse, soft_cross_entropy_pairs
from protojax.schedules import ScheduleSpec, is_constant, make_schedule


def dino(
    *,
    student_temperature: float = 0.1,
    teacher_temperature: ScheduleSpec = ("linear", 0.04, 0.07, 0.0, 0.3),
    total_steps: int | None = None,
) -> Objective:
    """mean_{i != j, rows} -sum_k t_jk ln s_ik over student views i and teacher views j.

    s_i = softmax((u_i . m_k + b_k) / student_temperature) with the prediction codebook and u = unit(h);
    t_j = softmax((u_j . m'_k + b'_k) / teacher_temperature) with the target codebook. DINO's centre is the target's
    bias (`estimators.with_logit_center`). teacher_temperature: a schedule over the run (default: 0.04 to 0.07 in the
    first 30%), which needs `total_steps`.

    Views are scored once each, then paired: with O_j = sum_k t_jk m_k and beta_j = sum_k t_jk b_k,

        CE(t_j, s_i) = LSE(s_i) - (u_i . O_j + beta_j) / tau_s,

    so that V + T sweeps over the prototypes serve V T pairs, and nothing of N x K is stored.

    inputs: student image [V,B,D], teacher image [T,B,D] (the same images as the first T student views), target,
    prediction, mask [B], step. Metrics: loss, chance = ln(K) (the loss of a uniform student), teacher_entropy (mean
    conditional entropy of t over a sample of about 64 rows) and temperature.

    Raises ValueError or TypeError for options out of range, a schedule without total_steps, and views that cannot pair.
    """
    tau = common.positive("dino, student_temperature", student_temperature)
    if total_steps is None and not is_constant(teacher_temperature):
        raise ValueError(
            "dino, teacher_temperature: a schedule needs total_steps, the length of the run; pass it, or a number."
        )
    sharpness = make_schedule(teacher_temperature, total_steps or 1, what="dino, teacher_temperature")

    def loss(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        mask, target, prediction = inputs["mask"], inputs["target"], inputs["prediction"]
        student, teacher = inputs["student"]["image"], jax.lax.stop_gradient(inputs["teacher"]["image"])
        check_views("dino", student, teacher)
        temperature = sharpness(inputs["step"])
        student, teacher = common.unit_rows(student, mask), common.unit_rows(teacher, mask)
        pairs = pair_cross_entropy(student, teacher, prediction, target, tau, temperature)
        value = common.masked_mean(pairs, mask)
        values: dict[str, Array | float] = {
            "loss": value,
            "chance": math.log(prediction.prototypes.shape[0]),
            "teacher_entropy": teacher_entropy(teacher[0], target, temperature, mask),
            "temperature": temperature,
        }
        return value, {name: common.once(metric, mask) for name, metric in values.items()}

    requires = frozenset({"student/image", "teacher/image", "target", "prediction", "mask", "step"})
    return Objective(requires, common.nothing_learned, loss)


def check_views(what: str, student: Array, teacher: Array) -> None:
    """ValueError unless teacher views are as many as, or fewer than, student views of the same images, 2 at least."""
    views, teachers = student.shape[0], teacher.shape[0]
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"{what}: expected student [V,B,D] and teacher [T,B,D] of the same images, got {student.shape} and "
            f"{teacher.shape}."
        )
    if views < 2 or not 1 <= teachers <= views:
        raise ValueError(f"{what}: expected 1 <= T <= V and V >= 2 views, got T = {teachers}, V = {views}.")


def pair_cross_entropy(
    student: Array,
    teacher: Array,
    prediction: Codebook,
    target: Codebook,
    student_temperature: float,
    teacher_temperature: Array | float,
) -> Array:
    """Mean over pairs i != j of the cross-entropy of student view i to teacher view j [B]; see `dino`."""
    views, teachers = student.shape[0], teacher.shape[0]
    losses = soft_cross_entropy_pairs(
        (student, prediction.prototypes / student_temperature, prediction.bias / student_temperature),
        (teacher / teacher_temperature, target.prototypes, target.bias / teacher_temperature),
    )
    others = ~jnp.eye(views, teachers, dtype=bool)[:, :, None]
    return jnp.sum(jnp.where(others, losses, jnp.zeros((), losses.dtype)), axis=(0, 1)) / (views * teachers - teachers)


def teacher_entropy(rows: Array, target: Codebook, temperature: Array | float, mask: Array) -> Array:
    """Mean over about 64 unmasked of the rows [N,D] of H_i = LSE_k l_ik - sum_k t_ik l_ik, the entropy of the teacher's
    assignments: for the report."""
    stride = max(1, mask.shape[0] // 64)
    given = rows[::stride] / temperature, target.prototypes, target.bias / temperature
    queries, keys, bias = jax.lax.stop_gradient(given)
    mean, offset = expectation(queries, keys, bias, keys, bias)
    entropy = lse(queries, keys, bias) - jnp.sum(queries * mean, axis=1) - offset
    return common.masked_mean(entropy, mask[::stride])
