"""The training state, its initialisation, and the one step: pure functions of a Recipe, no workload names.

Order inside a step (written once, tested): teacher features -> the estimator moves the prototypes -> the encoder is
trained against the *new* codebook -> optimiser -> EMA teacher. Metrics are (sum, count) pairs added to an accumulator
that stays on the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from protojax import accumulation
from protojax import metrics as metrics_lib
from protojax.api import Array, Batch, Encoder, EstimatorSpec, Key, Metrics, PyTree, Recipe, TrainState
from protojax.optim import ema
from protojax.parallel import path_of, replicated
from protojax.parallel_engine import engaged

NEVER = np.iinfo(np.int32).max


def stream(seed: Array | int, name: str, step: Array | int = 0) -> Key:
    """The key of a named random stream at a step: derived from (seed, name, step), never stored."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF), step)


class Constants(NamedTuple):
    """What compiled functions are given beside state and batch, the same at every step.

    seed: of all random streams, a uint32 scalar. An argument, not part of the program: runs that differ in their seeds
    alone share what is compiled. arrays: the recipe's frozen ones; None where there are none."""

    seed: Any
    arrays: PyTree = None


def constants_of(recipe: Recipe) -> Constants:
    """On the host. Raises OverflowError for a seed that 32 bits do not hold."""
    return Constants(np.uint32(recipe.seed), recipe.constants)


def given(recipe: Recipe, batch: Batch, constants: Constants) -> tuple[Recipe, Batch]:
    """Inside a compiled function: the recipe with the seed that came as an argument, and the batch with the arrays."""
    return recipe._replace(seed=constants.seed), join(batch, constants.arrays)


def join(batch: Batch, constants: PyTree) -> Batch:
    """The batch as all functions of a recipe see it: frozen arrays under 'constants', where there are any."""
    return batch if constants is None else {**batch, "constants": constants}


def observer(recipe: Recipe, state: TrainState) -> tuple[Encoder, PyTree, PyTree]:
    """(network, variables, head) of what evaluations look at: the EMA teacher, or the student where there is none."""
    if recipe.teacher is None:
        return recipe.encoder, {"params": state.params["encoder"], "stats": state.stats}, state.params["head"]
    params, stats = state.teacher["params"], state.teacher["stats"]
    return recipe.teacher, {"params": params["encoder"], "stats": stats}, params["head"]


def codebooks(recipe: Recipe, estimator: PyTree, teacher_head: PyTree, student_head: PyTree) -> tuple[Any, Any]:
    """(target, prediction): what the teacher and what the student are scored against; None without an estimator."""
    if recipe.estimator is None:
        return None, None
    target, _ = recipe.estimator.codebooks(estimator, teacher_head["prototypes"])
    _, prediction = recipe.estimator.codebooks(estimator, student_head["prototypes"])
    return target, prediction


def estimator_spec(recipe: Recipe, variables: PyTree, batch: Batch) -> EstimatorSpec:
    """D and the number of teacher rows a step, from shapes alone; what the recipe says where it says so."""
    spec = recipe.spec or EstimatorSpec(dim=0, rows=0, total_steps=recipe.total_steps)
    if recipe.spec is None and recipe.estimator is not None:
        rows = jax.eval_shape(lambda v, b: _observe(recipe, v, {}, b, jnp.int32(0), "shape")[0], variables, batch)
        n, dim = rows["features"].shape
        spec = spec._replace(dim=dim, rows=n)
    return spec._replace(constants=batch.get("constants"))


def _observe(recipe: Recipe, variables: PyTree, head: PyTree, batch: Batch, step: Array, name: str) -> Any:
    """(rows for the estimator, teacher's batch-norm moments, its embeddings, the student's inputs)."""
    inputs = recipe.views(stream(recipe.seed, name, step), batch)
    key = stream(recipe.seed, name + "/teacher", step)
    embeddings: dict[str, Array] = {}
    stats: PyTree = {}
    if recipe.teacher is not None:
        seen, size = recipe.teacher_views(inputs), len(batch["mask"])
        if recipe.micro_batches > 1:
            embeddings, stats = accumulation.forward(recipe.teacher, variables, seen, key, size, recipe.micro_batches)
        else:
            embeddings, stats = recipe.teacher.apply(variables, seen, True, key)
    given = inputs if recipe.teacher is None else embeddings
    rows = None if recipe.rows is None else recipe.rows(given, batch, head)
    return rows, stats, embeddings, inputs


def init_state(recipe: Recipe, batch: Batch) -> TrainState:
    """State at step 0, before the data start. jit-able; call through `eval_shape` for shapes."""
    seed, estimator = recipe.seed, recipe.estimator
    inputs = recipe.views(stream(seed, "shape"), batch)
    variables = recipe.encoder.init(stream(seed, "encoder"), inputs)
    spec = estimator_spec(recipe, variables, batch)
    head = {
        "prototypes": {} if estimator is None else estimator.head(stream(seed, "prototypes"), spec),
        "objective": recipe.objective.init(stream(seed, "objective"), spec),
    }
    params = {"encoder": variables["params"], "head": head}
    copy = {"params": params, "stats": variables["stats"]}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        stats=variables["stats"],
        teacher={} if recipe.teacher is None else jax.tree.map(jnp.copy, copy),
        opt=recipe.optimizer.init(params),
        estimator={} if estimator is None else estimator.init(stream(seed, "estimator"), spec),
    )


def warm_up(recipe: Recipe, state: TrainState, batch: Batch, step: Array) -> tuple[TrainState, dict[str, Array]]:
    """One pass without learning: batch-norm moments of student and teacher move towards the data's, and the
    teacher's rows come back for the estimator's data start ({} without an estimator)."""
    _, variables, head = observer(recipe, state)
    rows, stats, _, inputs = _observe(recipe, variables, head, batch, step, "start")
    if recipe.teacher is None:
        _, stats = recipe.encoder.apply(variables, inputs, True, None)
        return state._replace(stats=stats), rows or {}
    state = state._replace(stats=stats, teacher={**state.teacher, "stats": jax.tree.map(jnp.copy, stats)})
    return state, rows or {}


def start(recipe: Recipe, state: TrainState, rows: Mapping[str, Array]) -> TrainState:
    """The estimator's initialisation from data."""
    assert recipe.estimator is not None
    return state._replace(
        estimator=recipe.estimator.start(state.estimator, rows, stream(recipe.seed, "estimator-start"))
    )


def objective_inputs(
    recipe: Recipe, params: PyTree, state: TrainState, estimator: PyTree, data: Mapping[str, Any]
) -> tuple[dict[str, Any], PyTree]:
    """(what the objective is given, the student's batch-norm moments). No gradient reaches estimator or teacher.

    data: inputs (views), teacher (embeddings), batch.
    """
    variables = {"params": params["encoder"], "stats": state.stats}
    key = stream(recipe.seed, "student", state.step)
    student, stats = recipe.encoder.apply(variables, data["inputs"], True, key)
    return scored_inputs(recipe, params, state, estimator, data, student), stats


def scored_inputs(
    recipe: Recipe, params: PyTree, state: TrainState, estimator: PyTree, data: Mapping[str, Any], student: PyTree
) -> dict[str, Any]:
    """What the objective is given for these embeddings of the student."""
    estimator = jax.lax.stop_gradient(estimator)
    target, prediction = codebooks(recipe, estimator, observer(recipe, state)[2], params["head"])
    return {
        "student": student,
        "teacher": jax.lax.stop_gradient(data["teacher"]),
        "target": jax.lax.stop_gradient(target),
        "prediction": prediction,
        "estimator": estimator,
        "mask": data["batch"]["mask"],
        "batch": data["batch"],
        "head": params["head"],
        "step": state.step,
        "key": stream(recipe.seed, "objective", state.step),
    }


def loss_fn(recipe: Recipe, params: PyTree, state: TrainState, estimator: PyTree, data: Mapping[str, Any]) -> Any:
    """Loss of the student against the codebooks of `estimator`. Returns (loss, (metrics, batch-norm moments))."""
    inputs, stats = objective_inputs(recipe, params, state, estimator, data)
    loss, terms = recipe.objective.loss(params["head"]["objective"], inputs)
    return loss, (terms, stats)


def _moved_estimator(recipe: Recipe, state: TrainState, batch: Batch) -> Any:
    """(estimator after its update, its numbers, teacher's batch-norm moments, data of the loss): steps 0 to 2."""
    _, variables, head = observer(recipe, state)
    rows, teacher_stats, teacher, inputs = _observe(recipe, variables, head, batch, state.step, "views")
    estimator = state.estimator
    info: Metrics = {}
    if recipe.estimator is not None:
        rows = jax.lax.stop_gradient(rows)
        statistics = recipe.estimator.statistics(estimator, rows)
        key = stream(recipe.seed, "estimator", state.step)
        estimator, info = recipe.estimator.update(estimator, statistics, rows, state.step, key)
    return estimator, info, teacher_stats, {"inputs": inputs, "teacher": teacher, "batch": batch}


def step(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, dict[str, Array]]:
    """One training step. Returns (state, metrics, flags): from flags `first_bad` names a non-finite array."""
    estimator, info, teacher_stats, data = _moved_estimator(recipe, state, batch)
    (loss, (terms, stats)), gradient = _gradient(recipe, state, estimator, data)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax does not run strict
        update = optax.with_extra_args_support(recipe.optimizer).update
        updates, opt = update(gradient, state.opt, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
    teacher: PyTree = {}
    if recipe.teacher is not None:
        momentum = recipe.schedules["momentum"](state.step)
        teacher = {"params": ema(state.teacher["params"], params, momentum), "stats": teacher_stats}
    new_state = TrainState(state.step + 1, params, stats, teacher, opt, estimator)
    one = jnp.ones((), jnp.float32)
    norm, moved = optax.tree.norm(gradient), optax.tree.norm(updates)
    numbers = {("loss/total" if k == "loss" else f"loss/{k}"): v for k, v in terms.items()} | dict(info)
    numbers |= {"grad_norm": (norm, one), "update_norm": (moved, one)}
    numbers |= {f"gradient/{k}": (optax.tree.norm(v), one) for k, v in subtrees(recipe, gradient).items()}
    if recipe.clip_norm is not None:
        numbers["clipped"] = ((norm > recipe.clip_norm).astype(one.dtype), one)
    return new_state, numbers, _finite(state.step, loss, moved, gradient)


def _gradient(recipe: Recipe, state: TrainState, estimator: PyTree, data: Mapping[str, Any]) -> Any:
    """((loss, (metrics, batch-norm moments)), gradient) of the whole batch, in parts where the recipe says so."""
    if recipe.micro_batches == 1:
        gradient_of = jax.value_and_grad(lambda p: loss_fn(recipe, p, state, estimator, data), has_aux=True)
        return gradient_of(state.params)

    def loss(params: PyTree, student: PyTree) -> tuple[Array, Metrics]:
        inputs = scored_inputs(recipe, params, state, estimator, data, student)
        return recipe.objective.loss(params["head"]["objective"], inputs)

    return accumulation.value_and_grad(
        recipe.encoder, loss, state.params, state.stats, data["inputs"],
        stream(recipe.seed, "student", state.step), len(data["batch"]["mask"]), recipe.micro_batches,
    )  # fmt: skip


def subtrees(recipe: Recipe, params: PyTree) -> dict[str, PyTree]:
    """Named parts of a tree like the parameters, for gradient norms; parts without arrays are left out."""
    if recipe.subtrees is not None:
        return recipe.subtrees(params)
    named = {f"{top}/{name}": part for top, inner in params.items() for name, part in inner.items()}
    return {name: part for name, part in named.items() if jax.tree.leaves(part)}


def term_gradients(recipe: Recipe, state: TrainState, batch: Batch) -> dict[str, Array]:
    """'grad_norm/TERM' and 'weight/TERM' of every term of the objective on one batch, nothing moved.

    One forward pass, one backward pass a term, in turn (the pass is compiled once): run at evaluations, not in the
    step. {} when there is but one term.
    """
    terms = recipe.objective.terms
    if terms is None:
        return {}
    estimator, _, _, data = _moved_estimator(recipe, state, batch)

    def values(params: PyTree) -> tuple[dict[str, Array], dict[str, Array]]:
        inputs, _ = objective_inputs(recipe, params, state, estimator, data)
        found = terms(params["head"]["objective"], inputs)
        return {k: value for k, (_, value) in found.items()}, {k: weight for k, (weight, _) in found.items()}

    named, backward, weights = jax.vjp(values, state.params, has_aux=True)
    one_each = {
        name: (jnp.arange(len(named)) == i).astype(value.dtype) for i, (name, value) in enumerate(named.items())
    }
    norms = jax.lax.map(lambda cotangents: optax.tree.norm(backward(cotangents)[0]), one_each)
    out = {f"weight/{name}": jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
    return out | {f"grad_norm/{name}": norms[i] for i, name in enumerate(named)}


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


def step_numbers(recipe: Recipe, shapes: TrainState, batch: Batch) -> Metrics:
    """Shapes of the step's metrics. Traces the whole step: what does not fit is said here, before any work."""
    after, numbers, _ = jax.eval_shape(lambda s, b: step(recipe, s, b), shapes, batch)
    old, new = _named(shapes), _named(after)
    changed = sorted(path for path in {*old, *new} if old.get(path) != new.get(path))
    if changed:
        what = "; ".join(f"{path}: {old.get(path)} becomes {new.get(path)}" for path in changed[:4])
        raise TypeError(f"a step must keep the shape and dtype of every array of the state, but changes {what}.")
    return numbers


def _named(tree: PyTree) -> dict[str, str]:
    return {path_of(p): f"{x.dtype} {list(x.shape)}" for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def empty_accumulator(numbers: Metrics) -> PyTree:
    """The accumulator before the first step, for metrics of these shapes."""
    return {"numbers": metrics_lib.zeros(numbers), "bad": {k: jnp.int32(NEVER) for k in ("step", "leaf")}}


def first_bad(state: TrainState, bad: Mapping[str, Any]) -> str | None:
    """'step 17: gradient encoder/...' from the accumulator's host copy; None when all was finite."""
    at, leaf = int(bad["step"]), int(bad["leaf"])
    if at == NEVER:
        return None
    parameters = [f"the gradient of {path_of(p)}" for p, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    names = [*parameters, "the loss", "the update"]
    return f"step {at}: {names[leaf]}"


def compile_step(
    recipe: Recipe, mesh: Any, shardings: PyTree, batch_sharding: Any, stacked_sharding: Any, calls: int
) -> tuple[Callable, Callable]:
    """(one, many): jitted step over one batch, and scanned over `calls` stacked batches; both take the constants last.
    State and accumulator are donated: the old state's memory is the new one's. Sweeps over prototypes are split over
    the mesh as `parallel_engine` says."""

    def one(state: TrainState, accumulator: PyTree, batch: Batch, constants: Constants) -> tuple[TrainState, PyTree]:
        seeded, batch = given(recipe, batch, constants)
        with engaged(mesh):
            return accumulate(seeded, (state, accumulator), batch)[0]

    def many(state: TrainState, accumulator: PyTree, batches: Batch, constants: Constants) -> tuple[TrainState, PyTree]:
        def body(carry: tuple[TrainState, PyTree], batch: Batch) -> tuple[tuple[TrainState, PyTree], None]:
            seeded, batch = given(recipe, batch, constants)
            return accumulate(seeded, carry, batch)

        with engaged(mesh):
            return jax.lax.scan(body, (state, accumulator), batches, length=calls)[0]

    everywhere = replicated(mesh)

    def jitted(function: Callable, batch: Any) -> Callable:
        return jax.jit(
            function,
            in_shardings=(shardings, everywhere, batch, everywhere),
            out_shardings=(shardings, everywhere),
            donate_argnums=(0, 1),
        )

    return jitted(one, batch_sharding), jitted(many, stacked_sharding)
