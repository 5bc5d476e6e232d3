"""CARP: consistency of assignments inside random blocks of prototypes (Silva & Ramírez Rivera, NeurIPS 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from protojax.api import Array, Metrics, Objective, PyTree
from protojax.objectives import common
from protojax.ops.block import block_consistency


def carp(
    *,
    block: int = 512,
    temperature: float | None = None,
    teacher_temperature: float | None = None,
    regulariser: float = 1.0,
) -> Objective:
    """consistency + `regulariser` * regulariser of `ops.block.block_consistency`.

    At each step a new random permutation (of `inputs['key']`, so the same for all views and devices) cuts the K
    prototypes into K / block blocks; p_i, q_j are softmaxes inside a block of student view i and teacher view j:

        consistency = mean_{blocks, rows, i != j} -ln clip(<p_i, q_j>, eps, 1 - eps),
        regulariser = mean_blocks [ln(block) + sum_c pbar_c ln pbar_c].

    temperature: None as in the paper: features as they come, their norm is the inverse temperature. A number: unit
    features, logits divided by it (`teacher_temperature` for the teacher, the same if None).

    inputs: student image [V,B,D], teacher image [T,B,D] (the same images as the first T student views), target,
    prediction, mask [B], key. Metrics: loss, consistency, regulariser, and chance = ln(block), the consistency of
    uniform assignments: a loss that stays there has learned nothing.

    Raises ValueError for options out of range, and at trace time where K is not a multiple of block.
    """
    common.whole("carp, block", block, 2)
    if temperature is None and teacher_temperature is not None:
        raise ValueError(
            "carp: teacher_temperature needs temperature: without one, features are not normalised and have none."
        )
    student = 1.0 if temperature is None else common.positive("carp, temperature", temperature)
    teacher = (
        student if teacher_temperature is None else common.positive("carp, teacher_temperature", teacher_temperature)
    )

    def loss(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        target, prediction, mask = inputs["target"], inputs["prediction"], inputs["mask"]
        views = inputs["student"]["image"], jax.lax.stop_gradient(inputs["teacher"]["image"])
        if temperature is not None:
            views = common.unit_rows(views[0], mask), common.unit_rows(views[1], mask)
        permutation = jax.random.permutation(inputs["key"], prediction.prototypes.shape[0])
        consistency, spread = block_consistency(
            *views,
            prediction,
            target,
            mask,
            permutation,
            block=block,
            student_temperature=student,
            teacher_temperature=teacher,
        )
        total = consistency + regulariser * spread
        values: dict[str, Array | float] = {
            "loss": total,
            "consistency": consistency,
            "regulariser": spread,
            "chance": math.log(block),
        }
        return total, {name: common.once(value, mask) for name, value in values.items()}

    requires = frozenset({"student/image", "teacher/image", "target", "prediction", "mask", "key"})
    return Objective(requires, common.nothing_learned, loss)
