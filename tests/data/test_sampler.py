"""Batches addressed by step: every image once an epoch in training, no image twice in evaluation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from protojax.data import make_source, seeding
from protojax.data.records import from_arrays, image_shapes, make_records


def _records(size=11, classes=3):
    """Image i has the constant value i, so that pixels name their example."""
    images = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None, None], (size, 2, 2, 3))
    return from_arrays("toy", images.copy(), {"fine": np.arange(size) % classes})


def _stream(source, steps):
    return np.concatenate([source.batch(t)["index"] for t in range(steps)])


@pytest.mark.parametrize("batch_size", [4, 11, 30])  # straddles an epoch, is one, holds several
def test_wrap_visits_every_example_once_an_epoch(batch_size):
    source = make_source(_records(11), batch_size=batch_size, seed=3, shuffle=True)
    stream = _stream(source, 40)
    epochs = stream[: len(stream) // 11 * 11].reshape(-1, 11)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(11), (len(epochs), 1)))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # 11! orders: equal ones would be a bug
    assert source.spec.steps_per_epoch == -(-11 // batch_size)


def test_batch_is_a_pure_function_of_the_step():
    records = _records(11)
    source = make_source(records, batch_size=4, seed=3, shuffle=True)
    forward = [source.batch(t) for t in range(30)]
    other = make_source(records, batch_size=4, seed=3, shuffle=True)
    order = np.random.default_rng(0).permutation(30).tolist()
    with ThreadPoolExecutor(4) as pool:  # any order, many threads, the two remembered epochs thrash
        scattered = dict(zip(order, pool.map(other.batch, order), strict=True))
    for t, expected in enumerate(forward):
        for name, values in expected.items():
            np.testing.assert_array_equal(scattered[t][name], values)
    different = make_source(records, batch_size=4, seed=4, shuffle=True)
    assert not np.array_equal(_stream(source, 6), _stream(different, 6))


def test_orders_are_pinned():
    """Runs resumed on another machine or NumPy release must see the order that they were started with."""
    assert seeding.permutation(8, 0, seeding.EPOCH_ORDER, 0).tolist() == PINNED[0]
    assert seeding.permutation(8, 7, seeding.EPOCH_ORDER, 2).tolist() == PINNED[1]


PINNED = ([6, 4, 1, 3, 2, 7, 5, 0], [1, 3, 5, 4, 7, 0, 2, 6])


@pytest.mark.parametrize("remainder", ["wrap", "pad", "drop"])
def test_process_slices_concatenate_to_the_global_batch(remainder):
    records = _records(11)
    options = {"batch_size": 6, "seed": 1, "shuffle": remainder != "pad", "remainder": remainder}
    whole = make_source(records, **options)
    slices = [make_source(records, **options, process_index=i, process_count=3) for i in range(3)]
    for t in range(5):
        parts = [s.batch(t) for s in slices]
        for name, values in whole.batch(t).items():
            assert all(len(part[name]) == 2 for part in parts)
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
    assert slices[0].spec.batch_size == whole.spec.batch_size == 6


def test_pad_gives_each_example_once_in_order_and_masks_the_rest():
    source = make_source(_records(11), batch_size=4, shuffle=False, remainder="pad")
    assert source.spec.steps_per_epoch == 3
    batches = [source.batch(t) for t in range(3)]
    index, mask = (np.concatenate([b[name] for b in batches]) for name in ("index", "mask"))
    np.testing.assert_array_equal(index[mask], np.arange(11))
    assert mask.sum() == 11
    assert not mask[-1]
    np.testing.assert_array_equal(source.batch(4)["index"], batches[1]["index"])  # the pass begins again


def test_drop_gives_whole_batches_of_distinct_examples():
    source = make_source(_records(11), batch_size=4, seed=5, shuffle=True, remainder="drop")
    assert source.spec.steps_per_epoch == 2
    for epoch in range(4):
        seen = np.concatenate([source.batch(2 * epoch + t)["index"] for t in range(2)])
        assert len(set(seen.tolist())) == 8
    assert source.batch(7)["mask"].all()


def test_spec_describes_the_batch():
    source = make_source(_records(11), batch_size=4, seed=0, shuffle=True, name="renamed")
    batch = source.batch(2)
    assert set(batch) == set(source.spec.shapes) == {"image", "fine", "index", "mask"}
    for name, shape in source.spec.shapes.items():
        assert batch[name].shape == (4, *shape.shape)
        assert batch[name].dtype == shape.dtype
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["fine"], batch["index"] % 3)
    assert source.spec.name == "renamed"
    assert source.spec.size == 11
    assert source.spec.classes == {"fine": ("0", "1", "2")}
    np.testing.assert_array_equal(source.spec.counts["fine"], [4, 4, 3])
    given = make_source(_records(11), batch_size=4, shuffle=False, counts={"fine": np.array([9, 9, 1])})
    np.testing.assert_array_equal(given.spec.counts["fine"], [9, 9, 1])


def _with_damage(bad):
    def read(rows):
        return {"image": np.repeat(rows, 12).reshape(-1, 2, 2, 3).astype(np.uint8)}, ~np.isin(rows, bad)

    return make_records("damaged", 6, image_shapes(2, 2), read, {"fine": np.arange(6)}, problems=lambda: ["x"])


def test_unreadable_example_is_replaced_in_training_and_masked_in_evaluation():
    records = _with_damage([2, 3, 5])
    taken = records.take(np.array([1, 2, 3, 5]))
    np.testing.assert_array_equal(taken["index"], [1, 4, 4, 0])  # the next readable one, cyclically
    np.testing.assert_array_equal(taken["fine"], [1, 4, 4, 0])
    np.testing.assert_array_equal(taken["image"][:, 0, 0, 0], [1, 4, 4, 0])
    training = make_source(records, batch_size=6, shuffle=False).batch(0)
    assert training["mask"].all()
    evaluation = make_source(records, batch_size=4, shuffle=False, remainder="pad")
    rows = [evaluation.batch(t) for t in range(2)]
    kept = np.concatenate([b["index"][b["mask"]] for b in rows])
    np.testing.assert_array_equal(kept, [0, 1, 4])
    with pytest.raises(ValueError, match="none of its 6 examples can be read"):
        _with_damage(np.arange(6)).take(np.array([0]))


def test_errors_say_what_to_do():
    records = _records(11)
    with pytest.raises(ValueError, match=r"positive multiple of the number of processes \(3\), got 4"):
        make_source(records, batch_size=4, shuffle=True, process_count=3)
    with pytest.raises(ValueError, match=r"process_index must lie in 0\.\.1, got 2"):
        make_source(records, batch_size=4, shuffle=True, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="remainder must be one of wrap, pad, drop; got 'keep'"):
        make_source(records, batch_size=4, shuffle=True, remainder="keep")
    with pytest.raises(ValueError, match="11 examples give no whole batch of 16"):
        make_source(records, batch_size=16, shuffle=True, remainder="drop")
    with pytest.raises(ValueError, match="data seed must be 0 or more, got -1"):
        make_source(records, batch_size=4, seed=-1, shuffle=True)
    with pytest.raises(ValueError, match="taken from another data set"):
        make_source(records, batch_size=4, shuffle=True, counts={"fine": np.ones(7)})
    with pytest.raises(ValueError, match="step must be 0 or more, got -1"):
        make_source(records, batch_size=4, shuffle=True).batch(-1)
    with pytest.raises(IndexError, match=r"outside 0\.\.10"):
        records.take(np.array([11]))
