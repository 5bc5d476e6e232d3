"""Tasks in processes of their own: cores, deaths and signals."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from protojax import jobs


def write_cores(where: Path, number: int) -> None:
    """What a task sees: its process and its cores, for as long as both jobs need to have begun."""
    (where / f"{number}.txt").write_text(f"{os.getpid()} {sorted(os.sched_getaffinity(0))}")
    until = time.monotonic() + 60
    while number < 2 and not (where / f"{1 - number}.txt").exists() and time.monotonic() < until:
        time.sleep(0.01)


def die_or_not(number: int) -> None:
    if number == 0:
        os._exit(3)
    if number == 1:
        raise ValueError("one")


def wait_for_a_signal(where: Path, number: int, catch: bool) -> None:
    """As a training loop does: SIGTERM raises a flag, the state is saved, the task ends before it is done."""
    caught = threading.Event()
    if catch:
        signal.signal(signal.SIGTERM, lambda *_: caught.set())
    (where / f"begun-{number}").touch()
    if caught.wait(60):
        (where / f"saved-{number}").touch()
        raise jobs.Stopped("in time")


def test_core_shares_are_disjoint_and_of_equal_size():
    assert jobs.core_shares([0, 1], 2) == [{0}, {1}]
    assert jobs.core_shares([2, 3, 5, 7, 8], 2) == [{2, 3}, {5, 7}]
    assert jobs.core_shares([0, 1], 1) == []  # one process has them all
    assert jobs.core_shares([0, 1], 3) == []  # nothing to divide


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot keep a process to some cores")
def test_every_task_has_a_new_process_and_a_share_of_the_cores(tmp_path, monkeypatch):
    """What ends gives its share back; where there are none to give, a task has all cores."""
    mine = os.sched_getaffinity(0)
    shares = [{min(mine)}, {*mine}]
    monkeypatch.setattr(jobs, "core_shares", lambda cores, count: shares[:count])
    assert sorted(jobs.each(write_cores, [(tmp_path, n) for n in range(3)], 2)) == [(n, None) for n in range(3)]
    seen = [(tmp_path / f"{n}.txt").read_text().split(" ", 1) for n in range(3)]
    assert len({process for process, _ in seen}) == 3
    assert [cores for _, cores in seen][:2] == [str(sorted(share)) for share in shares]
    again = [(tmp_path, n) for n in (3, 4)]  # one at a time: the second has what the first gave back
    assert list(jobs.each(write_cores, again, 1)) == [(0, None), (1, None)]
    monkeypatch.setattr(jobs, "core_shares", lambda cores, count: [])
    assert list(jobs.each(write_cores, [(tmp_path, 5)], 1)) == [(0, None)]
    last = [(tmp_path / f"{n}.txt").read_text().split(" ", 1)[1] for n in (3, 4, 5)]
    assert last == [str(sorted(share)) for share in (shares[0], shares[0], mine)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_task_that_dies_or_fails_takes_no_other_with_it(count):
    ended = dict(jobs.each(die_or_not, [(n,) for n in range(4)], count))
    assert {n: type(error) for n, error in ended.items()} == {
        0: BrokenProcessPool,
        1: ValueError,
        2: type(None),
        3: type(None),
    }


@pytest.mark.parametrize("catch", [True, False])
def test_a_signal_is_passed_on_and_nothing_more_is_begun(tmp_path, catch):
    """Also to a task that has no handler (yet): it is stopped, not failed."""

    def send() -> None:
        while not all((tmp_path / f"begun-{n}").exists() for n in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send, daemon=True).start()
    ended = dict(jobs.each(wait_for_a_signal, [(tmp_path, n, catch) for n in range(3)], 2))
    assert sorted(ended) == [0, 1]
    assert {type(error) for error in ended.values()} == {jobs.Stopped}
    assert [(tmp_path / f"saved-{n}").exists() for n in range(3)] == [catch, catch, False]
    assert not (tmp_path / "begun-2").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_here_a_stopped_task_is_the_last():
    began = []

    def task(number: int) -> None:
        began.append(number)
        if number:
            raise jobs.Stopped("here") if number == 2 else ValueError("on")

    ended = list(jobs.each(task, [(n,) for n in range(4)], 0))
    assert [(n, type(error)) for n, error in ended] == [(0, type(None)), (1, ValueError), (2, jobs.Stopped)]
    assert began == [0, 1, 2]
