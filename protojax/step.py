"""The training state, its initialisation, and the one step: pure functions of a Recipe, no workload names.

Order inside a step (written once, tested): teacher features -> the estimator moves the prototypes -> the encoder is
trained against the *new* codebook -> optimiser -> EMA teacher. Metrics are (sum, count) pairs added to an accumulator
that stays on the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from protojax import metrics as metrics_lib
from protojax.api import Array, Batch, EstimatorSpec, Key, Metrics, PyTree, Recipe, TrainState
from protojax.optim import ema

NEVER = np.iinfo(np.int32).max


def stream(seed: int, name: str, step: Array | int = 0) -> Key:
    """The key of a named random stream at a step: derived from (seed, name, step), never stored."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF), step)


def estimator_spec(recipe: Recipe, variables: PyTree, batch: Batch) -> EstimatorSpec:
    """D and the number of teacher rows a step, from shapes alone."""
    rows = jax.eval_shape(lambda v, b: _teacher_rows(recipe, v, b, jnp.int32(0), "shape")[0], variables, batch)
    n, dim = rows["features"].shape
    return EstimatorSpec(dim=dim, rows=n, total_steps=recipe.total_steps)


def _teacher_rows(recipe: Recipe, variables: PyTree, batch: Batch, step: Array, name: str) -> Any:
    inputs = recipe.views(stream(recipe.seed, name, step), batch)
    key = stream(recipe.seed, name + "/teacher", step)
    embeddings, stats = recipe.teacher.apply(variables, recipe.teacher_views(inputs), True, key)
    return recipe.rows(embeddings, batch), stats, embeddings, inputs


def init_state(recipe: Recipe, batch: Batch) -> TrainState:
    """State at step 0, before the data start. jit-able; call through `eval_shape` for shapes."""
    seed = recipe.seed
    inputs = recipe.views(stream(seed, "shape"), batch)
    variables = recipe.encoder.init(stream(seed, "encoder"), inputs)
    spec = estimator_spec(recipe, variables, batch)
    head = {
        "prototypes": recipe.estimator.head(stream(seed, "prototypes"), spec),
        "objective": recipe.objective.init(stream(seed, "objective"), spec),
    }
    params = {"encoder": variables["params"], "head": head}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=variables["stats"],
        teacher={"params": jax.tree.map(jnp.copy, params), "stats": jax.tree.map(jnp.copy, variables["stats"])},
        opt=recipe.optimizer.init(params),
        estimator=recipe.estimator.init(stream(seed, "estimator"), spec),
    )


def warm_up(recipe: Recipe, state: TrainState, batch: Batch, step: Array) -> tuple[TrainState, dict[str, Array]]:
    """One pass without learning: batch-norm moments of student and teacher move towards the data's, and the
    teacher's rows come back for the estimator's data start."""
    variables = {"params": state.teacher["params"]["encoder"], "stats": state.teacher["stats"]}
    rows, stats, _, _ = _teacher_rows(recipe, variables, batch, step, "start")
    state = state._replace(stats=stats, teacher={**state.teacher, "stats": jax.tree.map(jnp.copy, stats)})
    return state, rows


def start(recipe: Recipe, state: TrainState, rows: Mapping[str, Array]) -> TrainState:
    """The estimator's initialisation from data."""
    return state._replace(
        estimator=recipe.estimator.start(state.estimator, rows, stream(recipe.seed, "estimator-start"))
    )


def loss_fn(recipe: Recipe, params: PyTree, state: TrainState, estimator: PyTree, data: Mapping[str, Any]) -> Any:
    """Loss of the student against the codebooks of `estimator`. No gradient reaches the estimator or the teacher.

    data: inputs (views), teacher (embeddings), batch. Returns (loss, (metrics, batch-norm moments)).
    """
    estimator = jax.lax.stop_gradient(estimator)
    variables = {"params": params["encoder"], "stats": state.stats}
    key = stream(recipe.seed, "student", state.step)
    student, stats = recipe.encoder.apply(variables, data["inputs"], True, key)
    target, _ = recipe.estimator.codebooks(estimator, state.teacher["params"]["head"]["prototypes"])
    _, prediction = recipe.estimator.codebooks(estimator, params["head"]["prototypes"])
    loss, terms = recipe.objective.loss(
        params["head"]["objective"],
        {
            "student": student,
            "teacher": jax.lax.stop_gradient(data["teacher"]),
            "target": jax.lax.stop_gradient(target),
            "prediction": prediction,
            "mask": data["batch"]["mask"],
            "batch": data["batch"],
            "head": params["head"],
            "step": state.step,
            "key": stream(recipe.seed, "objective", state.step),
        },
    )
    return loss, (terms, stats)


def step(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, dict[str, Array]]:
    """One training step. Returns (state, metrics, flags): from flags `first_bad` names a non-finite array."""
    variables = {"params": state.teacher["params"]["encoder"], "stats": state.teacher["stats"]}
    rows, teacher_stats, teacher, inputs = _teacher_rows(recipe, variables, batch, state.step, "views")
    rows = jax.lax.stop_gradient(rows)

    statistics = recipe.estimator.statistics(state.estimator, rows)
    key = stream(recipe.seed, "estimator", state.step)
    estimator, info = recipe.estimator.update(state.estimator, statistics, rows, state.step, key)

    data = {"inputs": inputs, "teacher": teacher, "batch": batch}
    gradient_of = jax.value_and_grad(lambda p: loss_fn(recipe, p, state, estimator, data), has_aux=True)
    (loss, (terms, stats)), gradient = gradient_of(state.params)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax does not run strict
        updates, opt = recipe.optimizer.update(gradient, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
    momentum = recipe.schedules["momentum"](state.step)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        stats=stats,
        teacher={"params": ema(state.teacher["params"], params, momentum), "stats": teacher_stats},
        opt=opt,
        estimator=estimator,
    )
    one = jnp.ones((), jnp.float32)
    norm, moved = optax.tree.norm(gradient), optax.tree.norm(updates)
    numbers = {("loss/total" if k == "loss" else f"loss/{k}"): v for k, v in terms.items()} | dict(info)
    numbers |= {"grad_norm": (norm, one), "update_norm": (moved, one)}
    return new_state, numbers, _finite(state.step, loss, moved, gradient)


def _finite(step: Array, loss: Array, moved: Array, gradient: PyTree) -> dict[str, Array]:
    """{'step', 'leaf'}: this step and the first non-finite array of it (leaf i of the gradient, then the loss, then the
    norm of the update), or NEVER twice."""
    arrays = [*jax.tree.leaves(gradient), loss, moved]
    ok = jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays])
    bad = ~jnp.all(ok)
    never = jnp.int32(NEVER)
    leaf = jnp.argmin(ok).astype(jnp.int32)
    return {"step": jnp.where(bad, step + 1, never), "leaf": jnp.where(bad, leaf, never)}


def accumulate(
    recipe: Recipe, carry: tuple[TrainState, PyTree], batch: Batch
) -> tuple[tuple[TrainState, PyTree], None]:
    """`step`, with its metrics added to the accumulator in the carry (scan-able)."""
    state, accumulator = carry
    state, numbers, flags = step(recipe, state, batch)
    first = flags["step"] < accumulator["bad"]["step"]
    bad = {k: jnp.where(first, flags[k], accumulator["bad"][k]) for k in flags}
    return (state, {"numbers": metrics_lib.add(accumulator["numbers"], numbers), "bad": bad}), None


def empty_accumulator(recipe: Recipe, shapes: TrainState, batch: Batch) -> PyTree:
    """The accumulator before the first step, from shapes alone."""
    _, numbers, _ = jax.eval_shape(lambda s, b: step(recipe, s, b), shapes, batch)
    return {"numbers": metrics_lib.zeros(numbers), "bad": {k: jnp.int32(NEVER) for k in ("step", "leaf")}}


def first_bad(state: TrainState, bad: Mapping[str, Any]) -> str | None:
    """'step 17: gradient encoder/...' from the accumulator's host copy; None when all was finite."""
    from protojax.parallel import path_of

    at, leaf = int(bad["step"]), int(bad["leaf"])
    if at == NEVER:
        return None
    parameters = [f"the gradient of {path_of(p)}" for p, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    names = [*parameters, "the loss", "the update"]
    return f"step {at}: {names[leaf]}"


def compile_step(
    recipe: Recipe, shardings: PyTree, replicated: Any, batch_sharding: Any, stacked_sharding: Any, calls: int
) -> tuple[Callable, Callable]:
    """(one, many): jitted step over one batch, and scanned over `calls` stacked batches. State and accumulator are
    donated: the old state's memory is the new one's."""

    def one(state: TrainState, accumulator: PyTree, batch: Batch) -> tuple[TrainState, PyTree]:
        return accumulate(recipe, (state, accumulator), batch)[0]

    def many(state: TrainState, accumulator: PyTree, batches: Batch) -> tuple[TrainState, PyTree]:
        return jax.lax.scan(lambda c, b: accumulate(recipe, c, b), (state, accumulator), batches, length=calls)[0]

    def jitted(function: Callable, batch: Any) -> Callable:
        return jax.jit(
            function,
            in_shardings=(shardings, replicated, batch),
            out_shardings=(shardings, replicated),
            donate_argnums=(0, 1),
        )

    return jitted(one, batch_sharding), jitted(many, stacked_sharding)
