"""Batches to the device ahead of time: one thread reads and transfers while the device works."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def prefetch(calls: list[tuple[int, int]], load: Callable[[int, int], Any], depth: int) -> Iterator[tuple[Any, float]]:
    """Yield (load(step, count), seconds waited for it) for each (step, count) in order.

    depth: how many are made ahead (0: none, everything in this thread). An error in the loader is raised here, at
    the batch that it belongs to. Closing the iterator stops the thread.
    """
    if depth == 0:
        for step, count in calls:
            began = time.perf_counter()
            batch = load(step, count)
            yield batch, time.perf_counter() - began
        return
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        for step, count in calls:
            if stop.is_set():
                return
            try:
                put((load(step, count), None))
            except BaseException as error:
                return put((None, error))

    thread = threading.Thread(target=work, name="protojax-prefetch", daemon=True)
    thread.start()
    try:
        for _ in calls:
            began = time.perf_counter()
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch, time.perf_counter() - began
    finally:
        stop.set()
        thread.join(timeout=10)


def stack(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Batches of consecutive steps -> one dict with a leading step axis."""
    return {k: np.stack([b[k] for b in batches]) for k in batches[0]}
