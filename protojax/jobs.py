"""Tasks in processes of their own: cores are divided among them, signals are passed on to them."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any


class Stopped(Exception):
    """A task that a signal ended before it was done."""


def each(
    function: Callable[..., object], tasks: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[tuple[int, BaseException | None]]:
    """Call function(*task) for every task, `jobs` at a time, each in a new process (0: here, one after another).

    Yields (number of the task, its exception or None) as they end. Several processes divide the cores among them
    (`core_shares`): small networks keep one core busy but not two, and processes that compete for all of them lose more
    than they gain. A process that dies is the BrokenProcessPool of its own task and of no other.

    SIGTERM and Ctrl-C are passed on as SIGTERM, a second Ctrl-C kills. After a signal, or a task that raised `Stopped`,
    nothing more is begun: tasks that were not are not yielded.
    """
    if jobs == 0:
        yield from _here(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    free: list[set[int] | None] = [*(core_shares(sorted(affinity(0)), jobs) if affinity else [])] or [None] * jobs
    others = {*multiprocessing.active_children()}
    stopping = False

    def stop(number: int, frame: Any) -> None:
        nonlocal stopping
        for child in {*multiprocessing.active_children()} - others:
            if stopping and number == signal.SIGINT:
                child.kill()
            else:
                child.terminate()
        stopping = True

    waiting = collections.deque(enumerate(tasks))
    running: dict[concurrent.futures.Future, tuple[int, concurrent.futures.ProcessPoolExecutor, set[int] | None]] = {}
    with _handler(stop):
        while running or (waiting and not stopping):
            while waiting and free and not stopping:
                (number, task), share = waiting.popleft(), free.pop(0)
                pool = concurrent.futures.ProcessPoolExecutor(1, context, _use_cores, (share,))
                running[pool.submit(function, *task)] = number, pool, share
                if stopping:  # the signal came while this one was started
                    stop(signal.SIGTERM, None)
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                number, pool, share = running.pop(future)
                pool.shutdown()
                free.append(share)
                error = future.exception()
                if stopping and isinstance(error, BrokenProcessPool):
                    error = Stopped("ended by a signal")
                stopping |= isinstance(error, Stopped)
                yield number, error


def _here(
    function: Callable[..., object], tasks: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, BaseException | None]]:
    for number, task in enumerate(tasks):
        error: Exception | None = None
        try:
            function(*task)
        except Exception as raised:
            error = raised
        yield number, error
        if isinstance(error, Stopped):
            return


def core_shares(cores: Sequence[int], jobs: int) -> list[set[int]]:
    """`jobs` disjoint sets of equal size that `cores` are cut into; none where there are not enough, or one job."""
    size = len(cores) // jobs
    return [] if jobs < 2 or not size else [{*cores[i * size : (i + 1) * size]} for i in range(jobs)]


def _use_cores(share: set[int] | None) -> None:
    """Keep this process to its share of the cores. Before JAX starts: it counts the cores once."""
    if share:
        os.sched_setaffinity(0, share)


@contextlib.contextmanager
def _handler(stop: Callable[[int, Any], None]) -> Iterator[None]:
    """`stop` on SIGTERM and Ctrl-C while the block lasts; only the main thread may ask for that."""
    mine = threading.current_thread() is threading.main_thread()
    old = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)} if mine else {}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
