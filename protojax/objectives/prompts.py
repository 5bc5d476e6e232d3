"""Mixture of prompts: K sub-prompts a class over frozen image-text features (docs/prompts.md).

With x_b the unit feature of an image of class y, prompts_ck = unit(base_c + offsets_ck) and sg = stop-gradient:

    e_bk   = (scale / tau) <x_b - class_mean_y, prompts_yk> - price ln(K usage_yk)      E-step
    r_b    = softmax_k(e_b),   g_b = sg(r_b)                                            responsibilities
    L_mix  = -mean_b sum_k g_bk scale <x_b, prompts_yk>                                 a prompt moves to what it owns
    L_cls  = cross-entropy of max_k scale <x_b, prompts_ck> / cls_temperature at y
    loss   = w L_mix + (1 - w) L_cls + offset_penalty mean offsets^2 + regularisers of the live r

The published recipe is this without class_mean and without price: one sub-prompt then wins every image of its class,
since image features share a direction that text features lie off, and whichever turns there first is nearer to all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from protojax.api import Metrics, Objective, PyTree
from protojax.objectives import common
from protojax.objectives import prompts_terms as terms
from protojax.ops.prompts import POOLS, class_scores, e_step_logits, own_rows, prompts_of
from protojax.schedules import check_choice

Array = jax.Array

CENTRES = ("class", "global", "none")
BALANCES = ("price", "sinkhorn", "none")
TAU_SCHEDULES = ("linear", "geometric", "constant")
GRADIENTS = ("live", "stopped")


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """Every knob of the loss and of the E-step; the defaults are the cured recipe.

    Only scale / tau and scale / cls_temperature matter; the three are kept apart because they are read that way. Where
    the defaults differ from the published recipe, each for a measured reason (docs/prompts.md): cls_temperature 1
    instead of 0.07, hard_assignment in the second half of the run, tau_end 0.2 instead of 0.05, offset_penalty 0
    instead of 1e-3.
    """

    scale: float = 50.0
    tau_start: float = 1.0
    tau_end: float = 0.2
    tau_schedule: str = "linear"
    e_step_centre: str = "class"
    balance: str = "price"
    price: float = 5.0
    hard_assignment: bool = True
    hard_from: float = 0.5
    uniform_plan: bool = False
    mixture_weight: float = 0.5
    cls_temperature: float = 1.0
    cls_pool: str = "max"
    offset_penalty: float = 0.0
    diversity_weight: float = 0.0
    diversity_form: str = "mean_square"
    diversity_margin: float | None = None
    entropy_weight: float = 0.0
    min_usage_weight: float = 0.0
    min_usage_threshold: float = 0.05
    regulariser_gradient: str = "live"
    allow_dead_terms: bool = False

    def __post_init__(self) -> None:
        _check(self)

    def tau(self, fraction: Array | float) -> Array:
        """Temperature of the E-step at a fraction of the run: linear or geometric from tau_start to tau_end."""
        f = jnp.clip(jnp.asarray(fraction, jnp.result_type(float)), 0.0, 1.0)
        if self.tau_schedule == "constant":
            return jnp.full_like(f, self.tau_start)
        if self.tau_schedule == "geometric":
            return self.tau_start * jnp.exp(f * math.log(self.tau_end / self.tau_start))
        return self.tau_end + (self.tau_start - self.tau_end) * (1.0 - f)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term that is switched on."""
        every = {
            "mixture": self.mixture_weight,
            "classification": 1.0 - self.mixture_weight,
            "offset_penalty": self.offset_penalty,
            "diversity": self.diversity_weight,
            "entropy": -self.entropy_weight,
            "min_usage": self.min_usage_weight,
        }
        return {name: weight for name, weight in every.items() if weight != 0.0}


def _check(o: PromptOptions) -> None:
    def require(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"prompts, {name}: expected {expected}, got {getattr(o, name)!r}.")

    for name in ("scale", "tau_start", "tau_end", "cls_temperature"):
        require(getattr(o, name) > 0, name, "a positive number")
    for name in ("price", "offset_penalty", "diversity_weight", "entropy_weight", "min_usage_weight"):
        require(getattr(o, name) >= 0, name, "a number >= 0")
    require(0 <= o.mixture_weight <= 1, "mixture_weight", "a number in [0, 1]")
    require(0 <= o.min_usage_threshold <= 1, "min_usage_threshold", "a share in [0, 1]")
    require(0 <= o.hard_from <= 1, "hard_from", "a fraction of the run in [0, 1]")
    choices = {
        "tau_schedule": TAU_SCHEDULES, "e_step_centre": CENTRES, "balance": BALANCES, "cls_pool": POOLS,
        "regulariser_gradient": GRADIENTS, "diversity_form": terms.FORMS,
    }  # fmt: skip
    for name, known in choices.items():
        check_choice(f"prompts, {name}", getattr(o, name), known)
    if o.diversity_form == "hinge" and o.diversity_margin is None:
        raise ValueError("prompts, diversity_form='hinge' needs diversity_margin: cosines below it cost nothing.")
    require(not (o.hard_assignment and o.uniform_plan), "uniform_plan", "False, or hard_assignment=False beside it")
    dead = [n for n in ("entropy", "min_usage") if n in o.weights]
    if dead and o.regulariser_gradient == "stopped" and not o.allow_dead_terms:
        raise ValueError(
            f"prompts: {dead} read responsibilities, whose gradient regulariser_gradient='stopped' cuts: the loss "
            "would move and nothing would learn from it. Use 'live', or allow_dead_terms=True to see this happen."
        )


def check_count(options: PromptOptions, count: int) -> None:
    """Raises ValueError for K < 1, and for K = 1 with terms that need pairs or shares."""
    common.whole("prompts, num_prompts", count, 1)
    idle = [n for n in ("diversity", "entropy", "min_usage") if n in options.weights]
    if count == 1 and idle:
        raise ValueError(
            f"prompts, num_prompts = 1: {idle} have nothing to act on with one prompt a class; use K >= 2, or set "
            "their weights to 0."
        )


class PromptData(NamedTuple):
    """images [B,D] unit, labels [B], mask [B]; base, centre [C,D] frozen (centre: what the E-step subtracts);
    usage [C,K] shares within each class; potential [C,K] of the exact balance, or None; prior [C,K] or None."""

    images: Array
    labels: Array
    mask: Array
    base: Array
    centre: Array
    usage: Array
    potential: Array | None = None
    prior: Array | None = None


class EStep(NamedTuple):
    """responsibilities [B,K] with their gradient, assignment [B,K] without (soft, hard or uniform)."""

    responsibilities: Array
    assignment: Array


def e_step(
    own: Array, data: PromptData, options: PromptOptions, tau: Array | float, fraction: Array | float = 1.0
) -> EStep:
    """Responsibilities of the sub-prompts `own` [B,K,D] of each image's class, at a temperature and a fraction of the
    run (with hard_assignment the assignment is soft before hard_from)."""
    labels = data.labels
    price = options.price if options.balance == "price" else 0.0
    logits = e_step_logits(
        data.images, data.centre[labels], own, data.usage[labels], sharpness=options.scale / tau, price=price,
        prior=None if data.prior is None else data.prior[labels],
    )  # fmt: skip
    if options.balance == "sinkhorn" and data.potential is not None:
        logits = logits - data.potential[labels] / tau
    r = jax.nn.softmax(logits, axis=1)
    if options.uniform_plan:
        assignment = jnp.full_like(r, 1.0 / r.shape[1])
    elif options.hard_assignment:
        won = jax.nn.one_hot(jnp.argmax(logits, axis=1), r.shape[1], dtype=r.dtype)
        assignment = jnp.where(jnp.asarray(fraction) >= options.hard_from, won, r)
    else:
        assignment = r
    return EStep(r, jax.lax.stop_gradient(assignment))


def prompt_terms(offsets: Array, data: PromptData, options: PromptOptions, tau: Array | float,
                 fraction: Array | float = 1.0) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
    """(value of each term that is switched on, before its weight; numbers worth a look) at `offsets` [C,K,D]."""
    weight = data.mask.astype(offsets.dtype)
    # A masked row may hold anything: it is cleaned before a norm or a product could turn it into NaN.
    images = jnp.where(data.mask[:, None], data.images, jnp.zeros((), data.images.dtype)).astype(offsets.dtype)
    labels = jnp.where(data.mask, data.labels, jnp.zeros((), data.labels.dtype))
    data = data._replace(images=images, labels=labels)
    offsets, rows = own_rows(offsets, labels)
    own = prompts_of(data.base[labels], rows)
    step = e_step(own, data, options, tau, fraction)
    similarity = options.scale * jnp.einsum("bd,bkd->bk", images, own)
    live = step.responsibilities
    regular = live if options.regulariser_gradient == "live" else jax.lax.stop_gradient(live)
    on = options.weights
    found: dict[str, Array] = {}
    if "mixture" in on:
        found["mixture"] = terms.mixture(similarity, step.assignment, weight)
    if "classification" in on:
        scores = class_scores(images, data.base, offsets, scale=options.scale, pool=options.cls_pool)
        found["classification"] = terms.classification(scores, labels, weight, options.cls_temperature)
    if "offset_penalty" in on:
        found["offset_penalty"] = jnp.mean(offsets**2)
    if "diversity" in on:
        found["diversity"] = terms.diversity(own, class_weight(labels, weight, data.base.shape[0]),
                                             form=options.diversity_form, margin=options.diversity_margin)  # fmt: skip
    if "entropy" in on:
        found["entropy"] = terms.mean_entropy(regular, weight)
    if "min_usage" in on:
        found["min_usage"] = terms.min_usage(regular, weight, options.min_usage_threshold)
    numbers = {
        "conditional_entropy": terms.mean_entropy(jax.lax.stop_gradient(live), weight),
        "max_responsibility": terms.weighted_mean(jnp.max(jax.lax.stop_gradient(live), axis=1), weight),
    }
    return found, numbers


def prompt_loss(offsets: Array, data: PromptData, options: PromptOptions, tau: Array | float,
                fraction: Array | float = 1.0) -> tuple[Array, dict[str, Array]]:  # fmt: skip
    """(loss, {each term, 'conditional_entropy', 'max_responsibility'}): the sum of the weighted terms."""
    found, numbers = prompt_terms(offsets, data, options, tau, fraction)
    total = jnp.zeros((), offsets.dtype)
    for name, value in found.items():
        total = total + options.weights[name] * value
    return total, {**found, **numbers}


def class_weight(labels: Array, weight: Array, classes: int) -> Array:
    """w_b / (images of its class in the batch x classes present): each class present counts once, together one."""
    counts = jnp.zeros((classes,), weight.dtype).at[labels].add(weight)
    present = jnp.maximum(jnp.sum((counts > 0).astype(weight.dtype)), 1.0)
    return weight / (jnp.maximum(counts[labels], 1.0) * present)


def prompts(*, options: PromptOptions, total_steps: int) -> Objective:
    """The mixture of prompts as an objective.

    inputs: student/image [1,B,D] unit features; prediction: Codebook with `prototypes` = offsets [C,K,D] and `bias` =
    usage [C,K] as the estimator gives them; batch: 'label' and the constants 'base', 'centre', 'prior' (and
    estimator/shared/potential of the exact balance). Metrics: loss, each term before its weight, conditional_entropy,
    max_responsibility. `terms`: what the gradient probe takes apart.
    """

    def arguments(inputs: Mapping[str, Any]) -> tuple[Array, PromptData, Array, Array]:
        batch, book = inputs["batch"], inputs["prediction"]
        constants = batch["constants"]
        data = PromptData(
            inputs["student"]["image"][0], batch["label"], inputs["mask"].astype(bool), constants["base"],
            constants["centre"], jax.lax.stop_gradient(book.bias), inputs["estimator"]["shared"].get("potential"),
            constants.get("prior"),
        )  # fmt: skip
        fraction = inputs["step"] / total_steps
        return book.prototypes, data, options.tau(fraction), fraction

    def loss(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        offsets, data, tau, fraction = arguments(inputs)
        total, numbers = prompt_loss(offsets, data, options, tau, fraction)
        return total, {name: common.once(value, data.mask) for name, value in {"loss": total, **numbers}.items()}

    def weighted(params: PyTree, inputs: Mapping[str, Any]) -> dict[str, tuple[Array, Array]]:
        offsets, data, tau, fraction = arguments(inputs)
        found, _ = prompt_terms(offsets, data, options, tau, fraction)

        def weight(name: str, value: Array) -> Array:
            # A cross-entropy below the rounding of its logits is met, not dead: its gradient underflows to exactly 0.
            rounding = 4.0 * float(jnp.finfo(value.dtype).eps) * options.scale / options.cls_temperature
            met = (jnp.abs(value) <= rounding) if name == "classification" else jnp.zeros((), bool)
            return jnp.where(met, 0.0, options.weights[name]).astype(jnp.float32)

        return {name: (weight(name, v), options.weights[name] * v) for name, v in found.items()}

    needed = frozenset({"student/image", "prediction", "estimator", "batch", "mask", "step"})
    return Objective(needed, common.nothing_learned, loss, weighted)
