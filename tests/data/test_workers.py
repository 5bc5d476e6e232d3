"""Worker processes change who reads a batch, not which."""

from __future__ import annotations

import numpy as np
import pytest

from protojax.data import make_source, open_records, workers
from protojax.data.workers import read_by_workers


def source():
    records = open_records("synthetic", "train", classes=3, size=21, side=8)
    return make_source(records, batch_size=4, seed=5, shuffle=True)


def test_without_workers_it_is_the_source_itself():
    plain = source()
    assert read_by_workers(plain, 0) is plain
    with pytest.raises(ValueError, match=r"system\.workers must be 0 or more, got -1"):
        read_by_workers(plain, -1)


@pytest.mark.slow
def test_two_workers_give_every_batch_in_order(monkeypatch):
    monkeypatch.setattr(workers, "START_AFTER", 2)
    plain, read = source(), read_by_workers(source(), 2)
    for step in [0, 1, 0, *range(1, 12), 30, 31, 32, 33]:
        expected, found = plain.batch(step), read.batch(step)
        assert set(found) == set(expected)
        assert all(np.array_equal(found[k], expected[k]) for k in expected), step
    read.batch.close()
