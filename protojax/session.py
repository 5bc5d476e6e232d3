"""What a run needs before its first step: options, shapes, compiled functions, the state at step 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from protojax import accumulation, parallel, probing
from protojax import step as step_lib
from protojax.api import Batch, Recipe, TrainState
from protojax.config import Run, System
from protojax.parallel_engine import engaged

WARM_UP_PASSES = 8  # batch-norm moments of the data before the first evaluation: the untrained control is a fair one


class Options(NamedTuple):
    """What the loop needs beside the recipe. fingerprint: the groups of the configuration that change results. written:
    told of the folder of every checkpoint whose writing has begun."""

    workdir: Path
    run: Run
    system: System
    eval_every: float
    fingerprint: Mapping[str, Any]
    wandb: Any = None
    say: Callable[[str], None] = print
    written: Callable[[Path], None] | None = None


class Session(NamedTuple):
    """Compiled functions and their surroundings: made once a process."""

    recipe: Recipe
    mesh: jax.sharding.Mesh
    shapes: TrainState
    shardings: TrainState
    one: Any  # jitted (state, accumulator, batch, constants) -> (state, accumulator)
    many: Any  # the same over stacked batches
    forward: Callable
    options: Options
    numbers: Any  # shapes of the step's metrics
    constants: step_lib.Constants  # the seed and the recipe's frozen arrays, on the devices
    terms: Any  # jitted (state, batch, constants) -> gradient norm of every term of the objective; None: one term


def make_session(recipe: Recipe, options: Options) -> Session:
    """Shapes, shardings and jitted functions. Raises ValueError when a size does not divide over the mesh, and what
    the recipe raises for shapes that do not fit: before anything is compiled or computed."""
    mesh = parallel.make_mesh(options.system.data, options.system.proto)
    parallel.check_divisible(mesh, **{"data.batch_size": recipe.sources["train"].spec.batch_size})
    accumulation.check(recipe.micro_batches, recipe.sources["train"].spec.batch_size, mesh.size)
    constants = parallel.place_constants(mesh, step_lib.constants_of(recipe))
    example = step_lib.join(parallel.global_shapes(recipe.sources["train"].batch(0)), constants.arrays)
    shapes = jax.eval_shape(lambda b: step_lib.init_state(recipe, b), example)
    shardings = parallel.state_shardings(mesh, shapes, options.system.fsdp)
    if recipe.micro_batches > 1 and accumulation.warning(shapes.stats):
        options.say(accumulation.warning(shapes.stats))
    with engaged(mesh):
        numbers = step_lib.step_numbers(recipe, shapes, example)
    rows, stacked = parallel.batch_sharding(mesh), parallel.batch_sharding(mesh, 1)
    one, many = step_lib.compile_step(recipe, mesh, shardings, rows, stacked, options.run.steps_per_call)
    terms = None
    if recipe.objective.terms is not None and recipe.micro_batches == 1:
        terms = jax.jit(
            lambda s, b, c: _seeded(step_lib.term_gradients, recipe, s, b, c), out_shardings=parallel.replicated(mesh)
        )
    forward = probing.make_forward(recipe, mesh)
    return Session(recipe, mesh, shapes, shardings, one, many, forward, options, numbers, constants, terms)


def initial_state(session: Session) -> TrainState:
    """State at step 0: parameters, then batch-norm moments and the estimator from the data."""
    recipe, mesh, source = session.recipe, session.mesh, session.recipe.sources["train"]
    batch = parallel.to_device(mesh, source.batch(0))
    state = jax.jit(
        lambda b, c: step_lib.init_state(*step_lib.given(recipe, b, c)), out_shardings=session.shardings
    )(batch, session.constants)  # fmt: skip
    needed = 0 if recipe.estimator is None else recipe.estimator.start_rows
    passes = WARM_UP_PASSES if jax.tree.leaves(session.shapes.stats) else 0
    warm = jax.jit(
        lambda s, b, c, i: _seeded(step_lib.warm_up, recipe, s, b, c, i),
        out_shardings=(session.shardings, parallel.replicated(mesh)),
        donate_argnums=0,
    )
    collected: list[dict[str, jax.Array]] = []
    i = 0
    while i < passes or sum(len(r["mask"]) for r in collected) < needed:
        batch = parallel.to_device(mesh, source.batch(i))
        state, rows = warm(state, batch, session.constants, jnp.int32(i))
        if needed:
            collected.append(rows)
        i += 1
    if not needed:
        return state
    # The last rows: their batch-norm moments are nearest to those that training starts with.
    rows = {k: jnp.concatenate([r[k] for r in collected])[-needed:] for k in collected[0]}
    begin = jax.jit(
        lambda s, r, c: step_lib.start(recipe._replace(seed=c.seed), s, r),
        out_shardings=session.shardings,
        donate_argnums=0,
    )
    return begin(state, rows, session.constants)


def _seeded(function: Callable, recipe: Recipe, state: TrainState, batch: Batch, constants: Any, *rest: Any) -> Any:
    """function(recipe, state, batch, *rest) with what the constants hold in the recipe and in the batch."""
    recipe, batch = step_lib.given(recipe, batch, constants)
    return function(recipe, state, batch, *rest)
