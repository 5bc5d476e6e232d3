"""What moves sub-prompts: the optimiser (with a running usage beside it), or online EM without any gradient.

Both give codebooks of an unusual shape: `prototypes` = offsets [C,K,D] from each class's base feature, `bias` = usage
[C,K]. Rows are images of the batch: 'features' [B,D] unit, 'labels' [B], 'mask' [B], the
constants that the E-step reads, and for offsets that the optimiser learns 'offsets' [B,K,D] of each image's class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Array, Codebook, Estimator, EstimatorSpec, Key, Metrics, PyTree
from protojax.estimators import common
from protojax.estimators.usage import usage_start, usage_statistics, usage_update

# (offsets of the own class [B,K,D], usage [C,K], potential [C,K] or None, rows) -> assignment [B,K]
Assign = Callable[[Array, Array, Any, Mapping[str, Array]], Array]
# (key, constants) -> offsets [C,K,D] at the start
Start = Callable[[Key, PyTree], Array]
# (potential [C,K], offsets [C,K,D], fraction of the run, constants) -> potential
Rebalance = Callable[[Array, Array, Array, PyTree], Array]


def learned_offsets(
    *, assign: Assign, initial: Start, num_prompts: int, rebalance: Rebalance | None, rebalance_steps: int,
    half_life: float = 1.0,
) -> Estimator:  # fmt: skip
    """Offsets are parameters, moved by the optimiser; the estimator keeps the usage of each class's sub-prompts.

    head: {'offsets' [C,K,D]}. half_life of the usage, in epochs of the class itself. rebalance: the exact balance,
    every `rebalance_steps` steps. Raises ValueError for a half-life that is not positive.
    """
    count = _check(num_prompts, half_life)

    def head(key: Key, spec: EstimatorSpec) -> PyTree:
        return {"offsets": initial(key, spec.constants)}

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        return {"components": {}, "memory": {}, "shared": _shared(spec, count, rebalance is not None)}

    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        return _usage_of(S, rows["offsets"], rows, assign)

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        shared = _moved(S["shared"], stats, half_life)
        if rebalance is not None:
            shared["potential"] = jax.lax.cond(
                step % rebalance_steps == 0,
                lambda: rebalance(
                    shared["potential"], rows["all_offsets"], common.fraction(S, step), rows["constants"]
                ),
                lambda: shared["potential"],
            )
        return {**S, "shared": shared}, _info(shared, stats)

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        offsets, usage = head["offsets"], S["shared"]["usage"]
        return Codebook(jax.lax.stop_gradient(offsets), usage), Codebook(offsets, usage)

    return Estimator(init, statistics, update, codebooks, head, 0, common.no_start)


def online_em(
    *, assign: Assign, initial: Start, num_prompts: int, half_life: float = 1.0, strength: float = 1.0,
    eta: float = 0.1,
) -> Estimator:  # fmt: skip
    """No gradient: every sub-prompt keeps the mean feature that it owns. S['components'] = {'means' [C,K,D]}.

        n_ck = sum_{b: y=c} r_bk,   a_ck = 1 - (1 - eta)^n_ck
        m_ck <- (1 - a_ck) m_ck + a_ck (sum_{b: y=c} r_bk x_b) / n_ck
        offsets_ck = strength (m_ck - class_mean_c)

    A sub-prompt without mass stays where it is. Raises ValueError for strength or half_life not positive, eta outside
    (0, 1].
    """
    count = _check(num_prompts, half_life)
    common.check_share("online_em, eta", eta)
    if not strength > 0:
        raise ValueError(f"online_em, strength: expected a positive number, got {strength!r}.")

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        mean = spec.constants["class_mean"]
        means = mean[:, None, :] + initial(key, spec.constants) / strength
        return {"components": {}, "memory": {}, "shared": {**_shared(spec, count, False), "means": means,
                                                           "class_mean": mean}}  # fmt: skip

    def offsets_of(S: PyTree) -> Array:
        return strength * (S["shared"]["means"] - S["shared"]["class_mean"][:, None, :])

    def statistics(S: PyTree, rows: Mapping[str, Array]) -> PyTree:
        mean = S["shared"]["means"]
        stats = _usage_of(S, offsets_of(S)[rows["labels"]], rows, assign)
        kept = jnp.where(rows["mask"][:, None], rows["features"], jnp.zeros((), rows["features"].dtype))
        owned = stats.pop("assignment")[:, :, None] * kept[:, None, :].astype(mean.dtype)
        return {**stats, "first": jnp.zeros_like(mean).at[rows["labels"]].add(owned)}

    def update(S: PyTree, stats: PyTree, rows: Mapping[str, Array], step: Array, key: Key) -> tuple[PyTree, Metrics]:
        shared = _moved(S["shared"], stats, half_life)
        mass = stats["mass"][:, :, None]
        rate = 1.0 - (1.0 - eta) ** mass
        target = stats["first"] / jnp.maximum(mass, jnp.finfo(mass.dtype).tiny)
        means = shared["means"] + jnp.where(mass > 0, rate * (target - shared["means"]), jnp.zeros((), mass.dtype))
        shared = {**shared, "means": means}
        return {**S, "shared": shared}, _info(shared, stats)

    def codebooks(S: PyTree, head: PyTree) -> tuple[Codebook, Codebook]:
        return common.fixed_codebooks(offsets_of(S), S["shared"]["usage"])

    return Estimator(init, statistics, update, codebooks, common.no_head, 0, common.no_start)


def _check(count: int, half_life: float) -> int:
    if not half_life > 0:
        raise ValueError(f"usage, half_life: expected a positive number of epochs, got {half_life!r}.")
    return common.check_count("prompts, num_prompts", count)


def _shared(spec: EstimatorSpec, count: int, potential: bool) -> dict[str, Array]:
    """Replicated: [C,K] is small beside the offsets, and C need not divide over devices."""
    sizes = spec.constants["class_counts"]
    usage = usage_start(sizes.shape[0], count)
    more = {"potential": jnp.zeros_like(usage)} if potential else {}
    # `statistics` is not told the step, which the temperature of the E-step is a function of.
    steps = jnp.zeros((), usage.dtype)
    return {
        **common.shared_start(spec),
        "steps": steps,
        "usage": usage,
        "class_counts": sizes.astype(usage.dtype),
        **more,
    }


def _usage_of(S: PyTree, own: Array, rows: Mapping[str, Array], assign: Assign) -> dict[str, Array]:
    shared = S["shared"]
    fraction = shared["steps"] / shared["total_steps"]
    assignment = assign(own, shared["usage"], shared.get("potential"), {**rows, "fraction": fraction})
    classes = shared["usage"].shape[0]
    found = usage_statistics(assignment, rows["labels"], rows["mask"], classes)
    weight = rows["mask"].astype(assignment.dtype)
    return {**found, "assignment": assignment * weight[:, None]}


def _moved(shared: dict[str, Array], stats: PyTree, half_life: float) -> dict[str, Array]:
    usage = usage_update(shared["usage"], stats, shared["class_counts"], half_life)
    return {**shared, "usage": usage, "steps": shared["steps"] + 1.0}


def _info(shared: Mapping[str, Array], stats: PyTree) -> Metrics:
    """usage_perplexity: mean over classes of exp(H(usage_c)), of the running usage; max_usage: mean of the largest."""
    usage = shared["usage"]
    shares = usage / jnp.sum(usage, axis=1, keepdims=True)
    rows = jnp.sum(stats["count"])
    return common.report(
        {"usage_perplexity": jnp.mean(jax.vmap(common.perplexity)(shares)), "max_usage": jnp.mean(jnp.max(shares, 1))},
        rows,
    )
