"""Masked patches: the student names the prototypes of what it does not see (Zhou et al., iBOT, ICLR 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Array, Metrics, Objective, PyTree
from protojax.objectives import common
from protojax.objectives.dino import teacher_entropy
from protojax.objectives.swav import balanced_target
from protojax.ops.lse import soft_cross_entropy


def ibot(
    *,
    student_temperature: float = 0.1,
    target_temperature: float = 0.05,
    iterations: int = 3,
    ratio: float = 0.4,
    blocks: int = 2,
) -> Objective:
    """mean over hidden patches of -sum_k t_k ln s_k: dense prediction against the codebook of the images.

    u = unit(token) of a patch that is hidden from the student, v = unit(token) of the same patch of the same view,
    which the teacher sees, both through the encoder's patch head:

        s = softmax_k((u . m_k + b_k) / student_temperature)      prediction codebook,
        t = softmax_k(v . m'_k / target_temperature + f_k)        target codebook, balanced over the batch's patches.

    There is one codebook, that of the image-level loss, and patches are not rows of its estimator: what is reported of
    prototypes is measured on images, as in every other arm. Without balance all patches could be told by one prototype,
    since nothing else keeps their features apart; f are `iterations` Sinkhorn iterations over the V B n hidden patches,
    as in `swav` (DINOv2 and CAPI balance patches likewise; iBOT centres).

    ratio, blocks: which patches are hidden (`data.masking.block_positions`); the workload draws them.

    inputs: student tokens [V,B,n,D] and teacher tokens [V,B,n,D] of the same patches, target, prediction, mask [B].
    Metrics: loss, chance = ln(K), teacher_entropy (mean entropy of t over about 64 patches). Nothing of rows x K is
    stored. Raises ValueError or TypeError for options out of range, and ValueError for tokens that do not pair.
    """
    student_tau = common.positive("ibot, student_temperature", student_temperature)
    target_tau = common.positive("ibot, target_temperature", target_temperature)
    common.whole("ibot, iterations", iterations, 0)
    common.whole("ibot, blocks", blocks, 1)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio < 1.0:
        raise ValueError(f"ibot, ratio: expected a share of the patches in (0, 1), got {ratio!r}.")

    def loss(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        mask, prediction = inputs["mask"], inputs["prediction"]
        student, teacher = inputs["student"]["tokens"], jax.lax.stop_gradient(inputs["teacher"]["tokens"])
        if student.ndim != 4 or student.shape != teacher.shape:
            raise ValueError(
                "ibot: expected student and teacher tokens [V,B,n,D] of the same patches, got "
                f"{student.shape} and {teacher.shape}."
            )
        views, images, count, width = student.shape
        kept = jnp.broadcast_to(mask.astype(bool)[:, None], (images, count)).reshape(-1)
        student, teacher = (common.unit_rows(x.reshape(views, -1, width), kept) for x in (student, teacher))
        target = balanced_target(teacher, inputs["target"], kept, target_tau, iterations)
        rows = soft_cross_entropy(
            student.reshape(-1, width),
            prediction.prototypes / student_tau,
            prediction.bias / student_tau,
            teacher.reshape(-1, width) / target_tau,
            target.prototypes,
            target.bias / target_tau,
        )
        values: dict[str, Array | float] = {
            "loss": common.masked_mean(rows, jnp.tile(kept, views)),
            "chance": math.log(prediction.prototypes.shape[0]),
            "teacher_entropy": teacher_entropy(teacher[0], target, target_tau, kept),
        }
        return jnp.asarray(values["loss"]), {name: common.once(value, mask) for name, value in values.items()}

    requires = frozenset({"student/tokens", "teacher/tokens", "target", "prediction", "mask"})
    return Objective(requires, common.nothing_learned, loss)
