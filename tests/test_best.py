"""The state of the best evaluation: kept beside the newest ones, told in the result, and never resumed from."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import evaluating, experiment, loading, metrics, protocol, summary, train
from protojax import session as session_lib
from protojax import step as step_lib
from protojax.api import Evaluation
from protojax.checkpoint import CheckpointError, Checkpoints
from protojax.data.naming import parse_data
from tests.test_seam import options, recipe
from tests.toy import toy_config

VALUES = {0: 9.0, 1: 0.1, 2: 0.5, 3: float("nan"), 4: 0.5, 5: 0.2, 6: 0.3, 7: 0.4, 8: 0.45}


def run(workdir: Path, values: dict[int, float] = VALUES, **changes: Any) -> train.Result:
    """Eight steps, evaluated after each, whose evaluation says what `values` says."""
    measure = Evaluation("v", lambda probe, key: {"v": {"x": values[probe.step], "y": None}})
    made = recipe(evaluations=(measure,), total_steps=8, best="v/x")
    return train.run(made, options(workdir, **{"checkpoint_every": 0.125, **changes})._replace(eval_every=0.125))


def steps(folder: Path) -> list[int]:
    found = Checkpoints(folder, read_only=True)
    try:
        return found.steps()
    finally:
        found.close()


def w(state: Any) -> float:
    return float(np.asarray(state.params["head"]["objective"]["w"])[0])


def restored(workdir: Path, folder: str, step: int) -> Any:
    session = session_lib.make_session(recipe(total_steps=8), options(workdir))
    found = Checkpoints(workdir / folder, read_only=True)
    try:
        return found.restore(step, session.shapes, session.shardings)
    finally:
        found.close()


def test_the_first_of_the_best_outlives_the_newest_and_is_told(tmp_path):
    """Not the untrained one, not NaN, not a later equal."""
    result = run(tmp_path)
    assert result.best == {"metric": "v/x", "step": 2, "value": 0.5}
    assert steps(tmp_path / "checkpoints") == [7, 8]
    assert steps(tmp_path / "best") == [2]
    kept = restored(tmp_path, "best", 2)
    assert (int(kept.step), int(result.state.step)) == (2, 8)
    assert w(kept) == pytest.approx(0.25 * 0.9**2, rel=1e-6)  # the seam's gradient of w is w, at rate 0.1
    assert run(tmp_path).best == result.best  # a finished run, started again
    assert steps(tmp_path / "best") == [2]


def test_a_run_resumes_exactly_and_from_the_newest_never_from_the_best(tmp_path):
    """Whatever the best folder holds when a process dies: the state of a lost future, of the past, or nothing."""
    whole = run(tmp_path / "whole", keep=8)
    for name, last, best in (("future", 1, True), ("past", 5, True), ("none", 2, False)):
        workdir = Path(shutil.copytree(tmp_path / "whole", tmp_path / name))
        for step in range(last + 1, 9):
            shutil.rmtree(workdir / "checkpoints" / str(step))
        if not best:
            shutil.rmtree(workdir / "best" / "2")
        said: list[str] = []
        measure = Evaluation("v", lambda probe, key: {"v": {"x": VALUES[probe.step]}})
        made = recipe(evaluations=(measure,), total_steps=8, best="v/x")
        again = train.run(made, options(workdir, checkpoint_every=0.125)._replace(eval_every=0.125, say=said.append))
        assert f"resuming at step {last} of 8" in said[0]
        assert again.best == whole.best
        assert steps(workdir / "best") == [2]
        assert w(restored(workdir, "best", 2)) == w(restored(tmp_path / "whole", "best", 2))
        assert w(again.state) == w(whole.state)


def test_the_best_state_cannot_stand_in_for_a_damaged_newest_one(tmp_path):
    run(tmp_path)
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="can be read"):
        run(tmp_path)
    assert steps(tmp_path / "best") == [2]


def test_a_better_state_replaces_one_of_a_future_that_did_not_come(tmp_path):
    """Resumed at step 1 on other hardware, say: the new step 1 to 3 are better than what step 4 was."""
    run(tmp_path, {**VALUES, 4: 0.6}, keep=8)
    assert steps(tmp_path / "best") == [4]
    for step in range(2, 9):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    assert run(tmp_path, {**VALUES, 3: 0.7}).best == {"metric": "v/x", "step": 3, "value": 0.7}
    assert steps(tmp_path / "best") == [3]


def test_a_new_run_forgets_the_best_of_the_one_before(tmp_path):
    run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert run(tmp_path, {**VALUES, 2: 0.0, 4: 0.0}).best == {"metric": "v/x", "step": 8, "value": 0.45}
    assert steps(tmp_path / "best") == [8]


def test_the_option_chooses_another_metric_or_none(tmp_path):
    off = run(tmp_path / "off", best="")
    assert off.best is None
    assert not (tmp_path / "off" / "best").exists()
    with pytest.raises(ValueError, match=r"run.best: .* no number 'v/z' .did you mean 'v/x'\?.; it has v/x"):
        run(tmp_path / "wrong", best="v/z")
    assert run(tmp_path / "null", best="v/y").best is None  # a number that this evaluation could not give


def test_loading_and_protocols_know_the_best(tmp_path):
    """A run of prototypes whose best state is of step 2 and whose newest is of step 4; nothing is trained."""
    config = toy_config()
    made = experiment.build(config)
    shapes = jax.eval_shape(lambda b: step_lib.init_state(made, b), made.sources["train"].batch(0))
    newest = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.25 if leaf.ndim else 4, leaf.dtype), shapes)
    best = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), newest)._replace(step=jnp.int32(2))
    written = Checkpoints(tmp_path / "checkpoints", best="v/x")
    written.offer(2, best, {}, {"v": {"x": 1}})
    written.save(4, newest, {})
    written.close()
    metrics.write_json(tmp_path / "config.json", summary.dumps_config(config))
    assert loading.load(tmp_path).step == 4
    assert loading.load(tmp_path, "best").step == 2
    chosen = protocol.make({"checkpoint": "best", "k": [1], "evaluations": {"knn": {}}})
    assert chosen.step == "best"
    assert chosen.hash != dataclasses.replace(chosen, checkpoint="last").hash
    record = evaluating.evaluate(tmp_path, chosen, parse_data("synthetic:size=16,classes=2,side=16"))
    assert record["run"]["step"] == 2
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(FileNotFoundError, match="keeps no best checkpoint"):
        loading.load(tmp_path, "best")
