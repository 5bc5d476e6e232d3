"""From records to a :class:`protojax.api.Source`: which example stands where, as a function of the step."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import numpy as np

from protojax import api
from protojax.data import seeding
from protojax.data.records import Records, class_counts

Remainder = Literal["wrap", "pad", "drop"]
REMAINDERS: tuple[Remainder, ...] = ("wrap", "pad", "drop")


def make_source(
    records: Records,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool,
    remainder: Remainder = "wrap",
    process_index: int = 0,
    process_count: int = 1,
    counts: Mapping[str, np.ndarray] | None = None,
    name: str | None = None,
) -> api.Source:
    """Batches of `records`, addressed by step: `batch(step)` is a pure function, so resuming needs no state.

    Epoch e visits the M examples in the order pi_e (a permutation seeded by (seed, e); the identity without
    `shuffle`). With B = batch_size, slot b of the global batch at step t holds

        'wrap'  stream position n = t*B + b: example pi_e[n mod M], e = n div M. Every example comes exactly once an
                epoch and a batch may straddle epochs; nothing is dropped or padded (training).
        'pad'   epoch e = t div S, position (t mod S)*B + b with S = ceil(M/B); beyond M the last example is repeated
                with mask False (evaluation).
        'drop'  the same with S = floor(M/B): the last M mod B examples of each epoch's order are left out.

    batch holds `image` uint8 [B',H,W,3], one int32 [B'] a label key, `index` int64 [B'] and `mask` bool [B'], where
    B' = B / process_count: process i has the rows [i*B', (i+1)*B') of the global batch. With 'pad', an example that
    cannot be read (see `Records.take`) is masked too, so that evaluations count no example twice.

    counts: training examples of each class, default those of `records`: give the training split's to an evaluation.
    Raises ValueError for a batch size that processes cannot share, a wrong process index or an unknown remainder.
    """
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder must be one of {', '.join(REMAINDERS)}; got {remainder!r}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in 0..{process_count - 1}, got {process_index}")
    if batch_size <= 0 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the number of processes ({process_count}), got {batch_size}"
        )
    if remainder == "drop" and records.size < batch_size:
        raise ValueError(
            f"{records.name}: {records.size} examples give no whole batch of {batch_size}; "
            "use a smaller batch_size or remainder 'wrap'"
        )
    size, local = records.size, batch_size // process_count
    steps_per_epoch = size // batch_size if remainder == "drop" else -(-size // batch_size)
    order = _epoch_orders(size, seed, shuffle)
    offsets = np.arange(process_index * local, (process_index + 1) * local, dtype=np.int64)

    def positions(step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch [B'], position in the epoch [B']; M or more means padding)."""
        if remainder == "wrap":
            return np.divmod(np.int64(step) * batch_size + offsets, size)
        epoch, within = divmod(step, steps_per_epoch)
        return np.full(local, epoch, np.int64), within * batch_size + offsets

    def batch(step: int) -> dict[str, np.ndarray]:
        step = int(step)
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}")
        epochs, slots = positions(step)
        mask = slots < size
        slots = np.minimum(slots, size - 1)
        rows = np.empty(local, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = order(int(epoch))[slots[here]]
        examples = records.take(rows)
        if remainder == "pad":
            mask &= examples["index"] == rows
        return {**examples, "mask": mask}

    spec = api.SourceSpec(
        name=name or records.name,
        size=size,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        shapes={**records.shapes, "mask": jax.ShapeDtypeStruct((), np.bool_)},
        classes=dict(records.classes),
        counts=_checked_counts(records, counts),
    )
    return api.Source(spec, batch)


def _checked_counts(records: Records, counts: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Counts as int64 [C]; ValueError when they do not fit the classes of the labels (another data set's counts)."""
    if counts is None:
        return class_counts(records)
    checked = {key: np.asarray(values, np.int64) for key, values in counts.items()}
    for key, values in checked.items():
        expected = (len(records.classes[key]),) if key in records.classes else None
        if expected is not None and values.shape != expected:
            raise ValueError(
                f"{records.name}: counts {key!r} have shape {values.shape}, but there are {expected[0]} classes; "
                "were they taken from another data set?"
            )
    return checked


class _EpochOrders:
    """epoch -> the order int64 [M] of its examples; remembers the last two (a batch straddles at most those)."""

    def __init__(self, size: int, seed: int):
        seeding.permutation(1, seed, seeding.EPOCH_ORDER)  # a bad seed fails here and not in a loader thread
        self._given = (size, seed)
        self._remembered: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        return _EpochOrders, self._given  # to a worker process go the seeds, not the orders

    def __call__(self, epoch: int) -> np.ndarray:
        with self._lock:  # prefetching threads ask for neighbouring epochs at the same time
            if epoch in self._remembered:
                self._remembered.move_to_end(epoch)
            else:
                size, seed = self._given
                self._remembered[epoch] = seeding.permutation(size, seed, seeding.EPOCH_ORDER, epoch)
                while len(self._remembered) > 2:
                    self._remembered.popitem(last=False)
            return self._remembered[epoch]


def _epoch_orders(size: int, seed: int, shuffle: bool) -> Callable[[int], np.ndarray]:
    if shuffle:
        return _EpochOrders(size, seed)
    identity = np.arange(size, dtype=np.int64)
    return lambda epoch: identity
