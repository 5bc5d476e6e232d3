"""The seed is an argument of what is compiled: runs that differ in it alone compile once, and learn what they did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from protojax import experiment, parallel
from protojax import session as session_lib
from protojax import step as step_lib
from tests.toy import toy_config, toy_options

ROOT = Path(__file__).parent.parent


def session_of(seed: int) -> session_lib.Session:
    config = toy_config(seed=seed, run__steps_per_call=2)
    return session_lib.make_session(experiment.build(config), toy_options(config, Path(".")))


def texts(session: session_lib.Session) -> dict[str, str]:
    """Name -> the program, as it goes to the compiler (and into the key of the compilation cache)."""
    sums = jax.eval_shape(lambda: step_lib.empty_accumulator(session.numbers))
    batch = session.recipe.sources["train"].batch(0)
    stacked = {k: np.stack([v, v]) for k, v in batch.items()}
    _, variables, _ = step_lib.observer(session.recipe, session.shapes)
    given = session.constants
    return {
        "one": session.one.lower(session.shapes, sums, batch, given).as_text(),
        "many": session.many.lower(session.shapes, sums, stacked, given).as_text(),
        "terms": session.terms.lower(session.shapes, batch, given).as_text(),
        "forward": session.forward.lower(variables, batch, given).as_text(),
    }


def test_two_seeds_are_one_program():
    a, b = texts(session_of(0)), texts(session_of(1))
    assert [name for name in a if a[name] != b[name]] == []


def test_a_seed_that_is_an_argument_draws_what_the_recipes_own_draws():
    """Initial values bit for bit; the loss of the first step, on augmented views, to rounding."""
    recipe = experiment.build(toy_config(seed=3))
    batch = recipe.sources["train"].batch(0)

    def begin(recipe, batch):
        state = step_lib.init_state(recipe, batch)
        return state, step_lib.step(recipe, state, batch)[1]

    written, losses = jax.jit(lambda b: begin(recipe, b))(batch)
    program = jax.jit(lambda b, c: begin(*step_lib.given(recipe, b, c)))
    given, ours = program(batch, step_lib.constants_of(recipe))
    jax.tree.map(np.testing.assert_array_equal, parallel.to_host(given), parallel.to_host(written))
    for name in ("loss/total", "grad_norm"):
        np.testing.assert_allclose(ours[name][0], losses[name][0], rtol=1e-4, err_msg=name)
    _, other = program(batch, step_lib.Constants(np.uint32(4)))
    assert abs(other["loss/total"][0] / ours["loss/total"][0] - 1) > 1e-3


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_does_not_fit_is_refused(seed):
    with pytest.raises(ValueError, match=rf"config\.seed: expected .* below 2\^32, got {seed}"):
        toy_config(seed=seed)


@pytest.mark.slow
def test_a_second_seed_finds_every_program_in_the_cache(tmp_path):
    """What `protojax train` compiles for seed 0 is all that seed 1 needs."""
    cache = tmp_path / "cache"
    environ = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    kept = []
    for seed in (0, 1):
        command = [sys.executable, "-m", "protojax", "train", "--config=quickstart:decoupled,smoke",
                   f"--config.system.compilation_cache={cache}", f"--config.seed={seed}", "--config.run.report=False",
                   f"--workdir={tmp_path / str(seed)}"]  # fmt: skip
        subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True)
        kept.append({p.name for p in cache.iterdir() if p.name.endswith("-cache")})
    assert len(kept[0]) > 5
    assert kept[1] - kept[0] == set()
