"""Time and memory of the estimator, as shares of the training step.

The whole step and the same step without the estimator's work (its statistics and its update; codebooks stay, since the
loss needs them) are two compiled programs. They take turns in one process, so that what else the machine does meets
both, and the whole step runs twice a round: the difference of these two is the noise of the table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from protojax import parallel, running
from protojax import session as session_lib
from protojax import step as step_lib
from protojax.api import PyTree, Recipe, TrainState
from protojax.config import Config

# Steps a turn: an estimator that sweeps its memory every few steps has an expensive step among cheap ones.
# As many as lie between two sweeps of `balanced` at the largest K that the study asks for, or a multiple of that.
BLOCK = 32


def measure(config: Config, rounds: int = 5) -> dict[str, Any]:
    """Timed on all devices at `config`'s sizes, from the state after the data start.

    Returns step_ms (the whole step, median over `rounds` of BLOCK steps), without_ms, share (1 - without / whole),
    noise (|A / A' - 1| of the two turns of the whole step), images_per_second; state_mb (the estimator's), state_share
    (of the training state), temporaries_mb and without_temporaries_mb (of the compiled programs, a device).
    Raises ValueError for a recipe without an estimator."""
    recipe = running.build(config)
    if recipe.estimator is None:
        raise ValueError(f"overhead: workload {config.method.workload!r} has no estimator whose cost could be told.")
    options = session_lib.Options(Path("."), config.run, config.system, config.evals.every, {}, say=lambda text: None)
    session = session_lib.make_session(recipe, options)
    state = session_lib.initial_state(session)
    copy = jax.tree.map(jnp.copy, state)
    whole, without = _Timed(session, state), _Timed(session_lib.make_session(_without(recipe), options), copy)
    turns = {"whole": whole, "without": without, "again": whole}
    for turn in turns.values():
        turn.block()  # compiles, and fills caches
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            times[name].append(turn.block())
    seconds = {name: statistics.median(found) / BLOCK for name, found in times.items()}
    return {
        "step_ms": 1e3 * seconds["whole"],
        "without_ms": 1e3 * seconds["without"],
        "share": 1.0 - seconds["without"] / seconds["whole"],
        "noise": abs(seconds["whole"] / seconds["again"] - 1.0),
        "images_per_second": config.data.batch_size / seconds["whole"],
        "state_mb": _bytes(whole.state.estimator) / 1e6,
        "state_share": _bytes(whole.state.estimator) / _bytes(whole.state),
        "temporaries_mb": whole.temporaries / 1e6,
        "without_temporaries_mb": without.temporaries / 1e6,
    }


def _without(recipe: Recipe) -> Recipe:
    """The recipe whose estimator stays as it is."""
    assert recipe.estimator is not None
    still = recipe.estimator._replace(
        statistics=lambda S, rows: {}, update=lambda S, stats, rows, step, key: (S, {})
    )  # fmt: skip
    return recipe._replace(estimator=still)


class _Timed:
    """A compiled step with a state of its own (the step donates it) and one batch."""

    def __init__(self, session: session_lib.Session, state: TrainState):
        self.state = state
        batch = parallel.to_device(session.mesh, session.recipe.sources["train"].batch(0))
        empty: Callable[[], PyTree] = jax.jit(lambda: step_lib.empty_accumulator(session.numbers))
        self.arguments = (batch, session.constants)
        self.accumulator = empty()
        self.step = session.one.lower(self.state, self.accumulator, *self.arguments).compile()
        self.temporaries = int(self.step.memory_analysis().temp_size_in_bytes)

    def block(self) -> float:
        """Seconds of BLOCK steps."""
        begin = time.perf_counter()
        for _ in range(BLOCK):
            self.state, self.accumulator = self.step(self.state, self.accumulator, *self.arguments)
        jax.block_until_ready((self.state, self.accumulator))
        return time.perf_counter() - begin


def _bytes(tree: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
