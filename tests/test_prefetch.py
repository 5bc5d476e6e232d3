"""Prefetching changes when batches are made, not which, and loses no error."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from protojax.prefetch import prefetch, stack


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_every_batch_in_order(depth):
    calls = [(i, 1) for i in range(7)]
    assert [b for b, _ in prefetch(calls, lambda step, count: (step, count), depth)] == calls


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_at_its_batch(depth):
    def load(step, count):
        if step == 2:
            raise OSError("disk gone")
        return step

    batches = prefetch([(i, 1) for i in range(5)], load, depth)
    assert [next(batches)[0], next(batches)[0]] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_closing_stops_the_thread():
    made = []
    batches = prefetch([(i, 1) for i in range(1000)], lambda step, count: made.append(step), 2)
    next(batches)
    batches.close()
    count = len(made)
    time.sleep(0.3)
    assert len(made) <= count + 1
    assert not any(t.name == "protojax-prefetch" for t in threading.enumerate())


def test_waiting_is_measured():
    def slow(step, count):
        time.sleep(0.03)
        return step

    assert min(w for _, w in prefetch([(0, 1)], slow, 0)) >= 0.03


def test_stack_puts_steps_first():
    out = stack([{"x": np.zeros((4, 2))}, {"x": np.ones((4, 2))}])
    assert out["x"].shape == (2, 4, 2)
    assert out["x"][1].all()
