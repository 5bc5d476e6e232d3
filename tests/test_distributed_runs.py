"""One run by 1, 2 and 4 processes over loopback: the same losses, and what happens when one of them is stopped."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from protojax.peers import LOST_STATUS
from tests import processes
from tests.processes import Run

pytestmark = pytest.mark.slow

STEPS = 6
# Sums over devices are added in another order by another transport: a few rounding errors of float32, which the
# optimiser's division by the gradient's size passes on for STEPS steps.
TOLERANCE = 64 * STEPS * float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process with all devices: what the others must repeat."""
    workdir = tmp_path_factory.mktemp("one")
    run = Run(workdir, 1, f"method__steps={STEPS}")
    assert run.wait() == [0], run.output(0)
    return workdir


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_see_the_same_losses(alone, tmp_path, count):
    run = Run(tmp_path, count, f"method__steps={STEPS}")
    assert run.wait() == [0] * count, run.output(0)
    one, several = processes.losses(alone), processes.losses(tmp_path)
    assert set(one) == set(several) == set(range(1, STEPS + 1))
    np.testing.assert_allclose([several[s] for s in sorted(one)], [one[s] for s in sorted(one)], rtol=TOLERANCE)
    # The first evaluation is made of sums over rows of a device only: bit for bit.
    first = [next(r for r in processes.records(w) if r["kind"] == "eval")["metrics"] for w in (alone, tmp_path)]
    assert first[0] == first[1]


def test_a_run_goes_on_with_other_processes(alone, tmp_path):
    """1 -> 2 -> 4 processes: the arrays of the checkpoint come over bit for bit, the losses within rounding."""
    at = {}
    for count in (1, 2, 4):
        stop = {1: STEPS // 3, 2: 2 * STEPS // 3, 4: STEPS}[count]
        # Slow enough for the signal to come before the end.
        slow = ("pause=1.0", "system__prefetch=0") if count < 4 else ()
        run = Run(tmp_path, count, f"method__steps={STEPS}", f"run__checkpoint_every={1 / 3}", *slow)
        if count < 4:
            run.at_step(tmp_path, stop)
            run.signal(0)
        assert run.wait() == [0] * count, run.output(0)
        at[count] = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    one, several = processes.losses(alone), processes.losses(tmp_path)
    assert set(one) == set(several)
    np.testing.assert_allclose([several[s] for s in sorted(one)], [one[s] for s in sorted(one)], rtol=TOLERANCE)
    assert at[1] < at[2] < at[4] == STEPS


def test_all_processes_stop_at_one_step_when_one_is_told_to(tmp_path):
    run = Run(tmp_path, 2, "method__steps=4000")
    run.at_step(tmp_path, 2)
    run.signal(1, signal.SIGTERM)
    assert run.wait() == [0, 0], run.output(0) + run.output(1)
    ends = [run.output(i).strip().splitlines()[-1] for i in range(2)]
    assert ends[0] == ends[1]
    assert ends[0].startswith("ended at step ")
    step = int(ends[0].split()[-1])
    assert 2 <= step < 4000
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    (stop,) = [r for r in processes.records(tmp_path) if r["kind"] == "event"]
    assert (stop["event"], stop["step"]) == ("stop", step)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_and_the_last_checkpoint_is_intact(tmp_path, victim):
    steps = "method__steps=4000"
    run = Run(tmp_path, 2, steps, "run__checkpoint_every=0.001")
    run.at_step(tmp_path, 6)
    began = time.monotonic()
    run.signal(victim, signal.SIGKILL)
    statuses = run.wait(60)
    assert time.monotonic() - began < 30  # the connection closes at once; the rest is a busy machine
    other = 1 - victim
    assert (statuses[victim], statuses[other]) == (-signal.SIGKILL, LOST_STATUS), run.output(other)
    found = processes.lost(run.output(other))
    assert found, run.output(other)
    assert (found[1], found[2], found[4]) == (str(victim), "2", str(other))
    assert "resumes from the newest" in run.output(other)

    again = Run(tmp_path, 2, steps, "run__checkpoint_every=0.001")
    again.until("resuming at step")  # before that, metrics.jsonl holds the steps that the killed run had written
    last = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    again.at_step(tmp_path, last + 2)
    again.signal(0)
    assert again.wait() == [0, 0], again.output(0)
    assert "resuming at step" in again.output(0)
    assert "damaged" not in again.output(0)


def test_other_configurations_are_refused_on_all_hosts(tmp_path):
    run = Run(tmp_path, 2, each=[["method__steps=6"], ["method__steps=8"]])
    assert run.wait(120) == [2, 2]
    for index in range(2):
        assert "method.steps: 6 and 8" in run.output(index)


def test_another_runs_checkpoints_are_refused_on_all_hosts(tmp_path, alone):
    run = Run(alone, 2, f"method__steps={STEPS}", "seed=3")
    assert run.wait(120) == [2, 2]
    assert all("another configuration (seed: saved 0, now 3)" in run.output(i) for i in range(2))
    assert json.loads(json.dumps(processes.losses(alone)))  # and nothing was touched
