"""The loop: resuming is exact, meshes agree, one compile, donated state, no host read between log steps."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from protojax import experiment, metrics, parallel, train
from protojax import session as session_lib
from protojax import step as step_lib
from protojax.checkpoint import CheckpointError
from protojax.metrics import NotFiniteError
from tests.toy import toy_config, toy_options, toy_recipe

ROOT = Path(__file__).parent.parent


def leaves(state):
    return {parallel.path_of(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(parallel.to_host(state))}


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    different = [k for k in a if not np.array_equal(a[k], b[k], equal_nan=True)]
    assert not different


def run(config, workdir, **changes):
    return train.run(experiment.build(config), toy_options(config, workdir, **changes))


# ------------------------------------------------------------------------------------------ order and gradients
@pytest.fixture(scope="module")
def started():
    """(session, state at step 0, first batch on the device)."""
    config = toy_config()
    session = session_lib.make_session(experiment.build(config), toy_options(config, Path(".")))
    state = session_lib.initial_state(session)
    return session, state, parallel.to_device(session.mesh, session.recipe.sources["train"].batch(0))


def test_prototypes_move_first_and_the_loss_sees_the_new_ones(started):
    session, state, batch = started
    recipe = session.recipe
    seen = {}

    def spying_loss(params, inputs):
        seen["target"] = inputs["target"].prototypes
        return recipe.objective.loss(params, inputs)

    spying = recipe._replace(objective=recipe.objective._replace(loss=spying_loss))

    def one(state, batch):
        new, _, _ = step_lib.step(spying, state, batch)
        return new, seen["target"]

    new, target = jax.jit(one)(state, batch)
    book, _ = recipe.estimator.codebooks(new.estimator, {})
    old, _ = recipe.estimator.codebooks(state.estimator, {})
    assert np.allclose(target, book.prototypes, atol=1e-6)
    assert not np.allclose(target, old.prototypes, atol=1e-4)


@pytest.mark.parametrize(
    ("arm", "moves"), [("decoupled", False), ("frozen", False), ("joint", True), ("partial", True)]
)
def test_gradient_to_prototypes(arm, moves):
    """Exactly zero where the estimator alone moves them; not zero where the optimiser does."""
    recipe = toy_recipe(arm)
    batch = {k: jnp.asarray(v) for k, v in recipe.sources["train"].batch(0).items()}
    state = jax.jit(lambda b: step_lib.init_state(recipe, b))(batch)

    def loss(prototypes, components):
        inputs = recipe.views(jax.random.key(0), batch)
        variables = {"params": state.params["encoder"], "stats": state.stats}
        teacher, _ = recipe.teacher.apply(variables, recipe.teacher_views(inputs), True, jax.random.key(1))
        head = {**state.params["head"], "prototypes": prototypes}
        params = {**state.params, "head": head}
        estimator = {**state.estimator, "components": components}
        data = {"inputs": inputs, "teacher": teacher, "batch": batch}
        return step_lib.loss_fn(recipe, params, state, estimator, data)[0]

    head, components = state.params["head"]["prototypes"], state.estimator["components"]
    to_head, to_components = jax.jit(jax.grad(loss, argnums=(0, 1)))(head, components)
    assert all(not np.any(g) for g in jax.tree.leaves(to_components))
    assert bool(jax.tree.leaves(to_head)) == moves
    assert all(np.any(g) for g in jax.tree.leaves(to_head))


def test_the_teacher_is_the_average_of_students(started):
    session, state, batch = started
    recipe = session.recipe
    new, _, _ = jax.jit(lambda s, b: step_lib.step(recipe, s, b))(state._replace(step=jnp.int32(3)), batch)
    m = float(recipe.schedules["momentum"](jnp.int32(3)))
    old = leaves(state.teacher["params"])
    for name, value in leaves(new.teacher["params"]).items():
        assert np.allclose(value, m * old[name] + (1 - m) * leaves(new.params)[name], atol=1e-6), name


# --------------------------------------------------------------------------------------------------- resuming
def test_resume_is_bit_identical(tmp_path: Path):
    config = toy_config()
    whole = run(config, tmp_path / "whole")
    stopped = experiment.build(config)
    sources = dict(stopped.sources)
    batch = sources["train"].batch
    calls = []

    def failing(step):
        calls.append(step)
        if step == 4 and len(calls) > 12:  # the warm-up reads it too
            raise OSError("disk gone")
        return batch(step)

    sources["train"] = sources["train"]._replace(batch=failing)
    options = toy_options(config, tmp_path / "stopped")
    options = options._replace(system=type(options.system)(prefetch=0))
    with pytest.raises(OSError, match="disk gone"):
        train.run(stopped._replace(sources=sources), options)
    resumed = run(config, tmp_path / "stopped")
    assert_same(whole.state, resumed.state)
    assert whole.final == resumed.final
    names = [(r["kind"], r["step"]) for r in metrics.read_records(tmp_path / "stopped" / "metrics.jsonl")]
    assert names.count(("eval", 3)) == 1
    assert ("event", 3) in names


def test_steps_per_call_system_and_run_change_no_result(tmp_path: Path):
    a = run(toy_config(), tmp_path / "a")
    b = run(toy_config(run__steps_per_call=2, run__log_every=3, system__prefetch=0, run__checkpoint_every=1.0),
            tmp_path / "b")  # fmt: skip
    one, two = leaves(a.state), leaves(b.state)
    # The scanned step is another program: equal to rounding, amplified by Adam's division at tiny gradients.
    for name in one:
        if "opt/" not in name:
            assert np.allclose(one[name], two[name], atol=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kill_minus_nine_and_resume_is_bit_identical(tmp_path: Path, seed):
    """A process killed at a random moment, started again with the same command, ends where the other one does."""
    command = [sys.executable, "-c", KILLED.format(root=ROOT), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment)
    rng = np.random.default_rng(seed)
    path = tmp_path / "killed" / "metrics.jsonl"
    wanted = int(rng.integers(6, 30))
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            if any(r["step"] >= wanted for r in metrics.read_records(path)):
                break
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    subprocess.run(command, env=environment, check=True)
    subprocess.run([*command[:-1], str(tmp_path / "whole")], env=environment, check=True)
    a, b = np.load(tmp_path / "killed" / "end.npz"), np.load(tmp_path / "whole" / "end.npz")
    assert set(a.files) == set(b.files)
    assert [k for k in a.files if not np.array_equal(a[k], b[k])] == []


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, "{root}")
import numpy as np
from protojax import experiment, train
from tests.test_train import leaves
from tests.toy import toy_config, toy_options
config = toy_config(method__steps=40, run__checkpoint_every=0.1)
workdir = Path(sys.argv[1])
result = train.run(experiment.build(config), toy_options(config, workdir))
np.savez(workdir / "end.npz", **leaves(result.state))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop_and_the_same_call_resumes(tmp_path: Path, number):
    config = toy_config()
    recipe = experiment.build(config)
    sources, batch, seen = dict(recipe.sources), recipe.sources["train"].batch, []

    def interrupting(step):
        seen.append(step)
        if step == 1 and len(seen) > 11:
            os.kill(os.getpid(), number)
        return batch(step)

    sources["train"] = sources["train"]._replace(batch=interrupting)
    options = toy_options(config, tmp_path)
    options = options._replace(system=type(options.system)(prefetch=0))
    assert threading.current_thread() is threading.main_thread()
    stopped = train.run(recipe._replace(sources=sources), options)
    assert not stopped.finished
    assert stopped.step < 6
    events = [r for r in metrics.read_records(tmp_path / "metrics.jsonl") if r["kind"] == "event"]
    assert [(r["event"], r["step"]) for r in events] == [("stop", stopped.step)]
    assert signal.Signals(number).name in events[0]["text"]
    whole = run(config, tmp_path / "whole")
    assert_same(run(config, tmp_path).state, whole.state)


# ------------------------------------------------------------------------------------------------------ meshes
MESHES = [(1, 1), (2, 2), (4, 1), (1, 4)]


def steps_on_mesh(recipe, state, data, proto, steps=5):
    """(gradient and estimator after one step from `state`, first losses) on a mesh of data x proto devices."""
    mesh = parallel.make_mesh(data, proto, devices=jax.devices()[: data * proto])
    shardings = parallel.state_shardings(mesh, state)
    seen = {}

    def update(gradient, opt, params, **extra):
        seen["gradient"] = gradient
        return optax.with_extra_args_support(recipe.optimizer).update(gradient, opt, params, **extra)

    spying = recipe._replace(optimizer=recipe.optimizer._replace(update=update))

    def one(state, batch):
        new, numbers, _ = step_lib.step(spying, state, batch)
        return new, numbers["loss/total"][0], seen["gradient"]

    rows, all_ = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    one = jax.jit(one, in_shardings=(shardings, rows), out_shardings=(shardings, all_, all_))
    state, losses, first = jax.device_put(state, shardings), [], None
    for i in range(steps):
        state, loss, gradient = one(state, parallel.to_device(mesh, recipe.sources["train"].batch(i)))
        losses.append(float(loss))
        first = first or (leaves(gradient), leaves(state.estimator))
    return *first, losses


@pytest.mark.parametrize("arm", ["decoupled", pytest.param("joint", marks=pytest.mark.slow)])
def test_every_mesh_gives_the_same_gradients_statistics_and_losses(arm):
    config = toy_config(arm)
    session = session_lib.make_session(experiment.build(config), toy_options(config, Path(".")))
    state = parallel.to_host(session_lib.initial_state(session))
    gradient, estimator, losses = steps_on_mesh(session.recipe, state, 1, 1)
    scale = max(np.abs(g).max() for g in gradient.values())
    assert scale > 0
    for data, proto in MESHES[1:]:
        other, other_estimator, other_losses = steps_on_mesh(session.recipe, state, data, proto)
        # Sums of up to 1e4 float32 terms in another order: 1e4 * 2^-24 = 6e-4 of the largest.
        for name, value in gradient.items():
            assert np.abs(value - other[name]).max() <= 6e-4 * scale, (data, proto, name)
        for name, value in estimator.items():
            bound = 6e-4 * max(1.0, np.abs(value).max())
            assert np.abs(value - other_estimator[name]).max() <= bound, (data, proto, name)
        # Five steps of Adam amplify the rounding of the gradient by its division at tiny second moments.
        assert np.allclose(losses, other_losses, rtol=2e-3), (data, proto)


# ------------------------------------------------------------------------------------- compiles, memory, reads
class Spied:
    """Stands for a device array in the loop's hands; every way to a host value is noted. (On CPU the transfer guard
    sees nothing, and numpy reads an array's buffer without calling any method that could be patched.)"""

    def __init__(self, array, events):
        self.array, self.events = array, events

    def _read(self, *args, **kwargs):
        self.events.append("read")
        return np.asarray(self.array)

    __array__ = tolist = item = block_until_ready = _read

    def __float__(self):
        return float(self._read())

    def __int__(self):
        return int(self._read())

    def __bool__(self):
        return bool(self._read())


def spied(tree, events):
    return jax.tree.map(lambda x: Spied(x, events), tree)


def bare(tree):
    return jax.tree.map(lambda x: x.array if isinstance(x, Spied) else x, tree)


@pytest.mark.parametrize(
    "read", [float, int, bool, np.asarray, np.array, jax.device_get, lambda x: x.item(), parallel.to_host]
)
def test_the_double_sees_a_planted_read(read):
    events: list[str] = []
    read(Spied(jnp.ones(()), events))
    assert events == ["read"]


def test_one_compile_donated_state_and_no_host_read_between_logs(tmp_path: Path, monkeypatch):
    config = toy_config(method__steps=12, run__log_every=6, evals__every=1.0, run__checkpoint_every=1.0)
    events: list[str] = []
    compiles, donated = [], []
    make = train.make_session

    def counted(recipe, options):
        session = make(recipe, options)

        def one(state, accumulator, batch, constants):
            events.append("dispatch")
            state, accumulator = bare((state, accumulator))
            out = session.one(state, accumulator, batch, constants)
            donated.append(all(x.is_deleted() for x in jax.tree.leaves((state, accumulator))))
            compiles.append(session.one._cache_size())
            return spied(out, events)

        return session._replace(one=one)

    monkeypatch.setattr(train, "make_session", counted)
    for name in ("evaluate", "save", "_term_gradients"):  # boundaries of their own, besides the log that is counted
        original = getattr(train.Loop, name)
        monkeypatch.setattr(
            train.Loop, name, lambda self, state, at, original=original: original(self, bare(state), at)
        )
    assert train.run(experiment.build(config), toy_options(config, tmp_path)).step == 12
    assert compiles == [1] * 12
    assert all(donated)
    dispatches = [i for i, event in enumerate(events) if event == "dispatch"]
    assert len(dispatches) == 12
    after = [j - i - 1 for i, j in zip(dispatches, [*dispatches[1:], len(events)], strict=True)]
    assert [at for at, reads in enumerate(after, 1) if reads] == [1, 6, 12]  # the log steps


# ------------------------------------------------------------------------------------------------- bad endings
def test_nan_in_the_first_step_is_named_and_the_checkpoint_survives(tmp_path: Path):
    config = toy_config()
    recipe = experiment.build(config)

    def poisoned(params, inputs):
        loss, terms = recipe.objective.loss(params, inputs)
        return loss * jnp.where(inputs["step"] >= 0, jnp.nan, 1.0), terms

    bad = recipe._replace(objective=recipe.objective._replace(loss=poisoned))
    with pytest.raises(NotFiniteError, match=r"step 1: the gradient of encoder/.*last finite checkpoint is step 0"):
        train.run(bad, toy_options(config, tmp_path))
    last = metrics.read_records(tmp_path / "metrics.jsonl")[-1]
    assert (last["detector"], last["step"]) == ("not_finite", 1)
    assert run(config, tmp_path).finished  # from the checkpoint at step 0


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path):
    run(toy_config(method__steps=2), tmp_path)
    with pytest.raises(CheckpointError, match=r"another configuration \(method.steps: saved 2, now 4\)"):
        run(toy_config(method__steps=4), tmp_path)


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    config = toy_config(method__steps=2)
    first = run(config, tmp_path)
    again = run(config, tmp_path)
    assert again.finished
    assert_same(first.state, again.state)
    assert again.final == first.final


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.batch_size = 12 does not divide over 8 devices"):
        run(toy_config(data__batch_size=12), tmp_path)


def test_prototypes_that_do_not_divide_are_refused(tmp_path: Path):
    changes = {"method__estimator__components": 36, "method__objective__carp__block": 36}
    with pytest.raises(ValueError, match=r"has 36 rows .* do not divide over 8 devices"):
        run(toy_config(**changes), tmp_path)


def test_a_block_that_does_not_divide_the_prototypes_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="48"):
        run(toy_config(method__objective__carp__block=48), tmp_path)


# --------------------------------------------------------------------------------------------------- schedule
def test_boundaries_and_plan():
    logs, evals, saves = train.boundaries(100, 30, 0.5, 0.25)
    assert evals == {50, 100}
    assert saves == {25, 50, 75, 100}
    assert logs == {1, 30, 60, 90} | evals | saves
    calls = train.plan(0, 100, logs | evals | saves, 8)
    assert sum(count for _, count in calls) == 100
    assert {count for _, count in calls} == {1, 8}
    ends = {begin + count for begin, count in calls}
    assert (logs | evals | saves) <= ends
    assert train.plan(100, 100, logs, 8) == []
