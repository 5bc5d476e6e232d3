"""What can be done to any records keeps pixels, labels and class names together."""

from __future__ import annotations

import numpy as np
import pytest

from protojax.data import class_counts, concatenate, holdout, open_records, restrict, subset
from protojax.data.records import from_arrays


def _records(labels, name="toy", **extra):
    labels = np.asarray(labels)
    images = np.zeros((len(labels), 2, 3, 3), np.uint8)
    images[..., 0] = np.arange(len(labels))[:, None, None]
    images[..., 1] = labels[:, None, None]  # green tells the class, red the example
    return from_arrays(name, images, {"fine": labels, **extra}, {"fine": ["a", "b", "c", "d"]})


def _green(records):
    return records.take(np.arange(records.size))["image"][:, 0, 0, 1]


def test_subset_keeps_labels_with_their_images():
    records = _records([0, 1, 2, 3, 1, 2])
    part = subset(subset(records, [5, 1, 4, 0]), [0, 2, 3])  # of a subset: rows 5, 4, 0
    taken = part.take(np.array([0, 1, 2]))
    np.testing.assert_array_equal(taken["image"][:, 0, 0, 0], [5, 4, 0])
    np.testing.assert_array_equal(taken["index"], [0, 1, 2])
    np.testing.assert_array_equal(taken["fine"], _green(part))
    np.testing.assert_array_equal(part.labels["fine"], [2, 1, 0])
    assert part.classes == records.classes
    np.testing.assert_array_equal(class_counts(part)["fine"], [1, 1, 1, 0])


def test_restrict_relabels_the_same_way_in_every_split():
    train, test = _records([0, 1, 2, 3, 1]), _records([3, 3, 0, 1, 2])
    keep = {"fine": np.array([3, 1])}
    for records in (train, test):
        part = restrict(records, keep)
        assert part.classes["fine"] == ("b", "d")
        np.testing.assert_array_equal(np.array([1, 3])[part.labels["fine"]], _green(part))
    with pytest.raises(ValueError, match="no example belongs to the classes"):
        restrict(_records([0, 0]), keep)


def test_concatenation_is_the_parts_in_order():
    first, second = _records([0, 1, 2], "first"), _records([3, 1], "second")
    both = concatenate([first, second])
    assert both.size == 5
    rows = np.array([4, 0, 3, 2])
    taken = both.take(rows)
    np.testing.assert_array_equal(taken["image"][:, 0, 0, 0], [1, 0, 0, 2])
    np.testing.assert_array_equal(taken["fine"], taken["image"][:, 0, 0, 1])
    np.testing.assert_array_equal(_green(both), both.labels["fine"])
    with pytest.raises(ValueError, match="second has other image shapes or classes than first"):
        concatenate([first, from_arrays("second", np.zeros((2, 9, 9, 3), np.uint8), {})])
    with pytest.raises(ValueError, match="nothing to concatenate"):
        concatenate([])


def test_holdout_is_a_stratified_partition():
    labels = np.repeat([0, 1, 2, 3], [40, 10, 2, 1])
    rest, held = holdout(_records(labels), 0.2, seed=0)
    reds = [part.take(np.arange(part.size))["image"][:, 0, 0, 0] for part in (rest, held)]
    np.testing.assert_array_equal(np.sort(np.concatenate(reds)), np.arange(53))
    np.testing.assert_array_equal(class_counts(held)["fine"], [8, 2, 1, 0])  # never the only one of its class
    again, other = holdout(_records(labels), 0.2, seed=0)[1], holdout(_records(labels), 0.2, seed=1)[1]
    assert np.array_equal(_green(again), _green(held))
    assert not np.array_equal(other.take(np.arange(11))["image"], held.take(np.arange(11))["image"])
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        holdout(rest, 1.0, seed=0)
    with pytest.raises(ValueError, match="nothing can be held out"):
        holdout(_records([0, 1]), 0.5, seed=0)


def test_grey_images_become_three_equal_channels():
    grey = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for images in (grey, grey[..., None]):
        image = from_arrays("grey", images, {}).take(np.array([1, 0]))["image"]
        assert image.shape == (2, 3, 4, 3)
        np.testing.assert_array_equal(image, np.repeat(grey[[1, 0]][..., None], 3, axis=3))


def test_arrays_are_checked():
    ones = np.ones((4, 2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"must be uint8 in 0\.\.255, got float32"):
        from_arrays("x", ones.astype(np.float32), {})
    with pytest.raises(ValueError, match=r"must be \[M,H,W,3\].*got shape \(4, 2, 2, 4\)"):
        from_arrays("x", np.ones((4, 2, 2, 4), np.uint8), {})
    with pytest.raises(ValueError, match="the split is empty"):
        from_arrays("x", ones[:0], {})
    with pytest.raises(ValueError, match=r"labels 'fine' must be 4 integers.*got int64 \(3,\)"):
        from_arrays("x", ones, {"fine": np.zeros(3, np.int64)})
    with pytest.raises(ValueError, match=r"labels 'fine' must be 4 integers.*float64"):
        from_arrays("x", ones, {"fine": np.zeros(4)})
    with pytest.raises(ValueError, match=r"run from -1 to 0, but must lie in 0\.\.0"):
        from_arrays("x", ones, {"fine": np.array([-1, 0, 0, 0])})
    with pytest.raises(ValueError, match=r"run from 0 to 5, but must lie in 0\.\.1 \(2 class names\)"):
        from_arrays("x", ones, {"fine": np.array([5, 0, 0, 0])}, {"fine": ["a", "b"]})
    with pytest.raises(ValueError, match="non-empty list of indices"):
        subset(from_arrays("x", ones, {}), [])
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        subset(from_arrays("x", ones, {}), [4])


# ------------------------------------------------------------------------------------------------ registry, synthetic
def test_synthetic_is_deterministic_and_its_classes_are_visible():
    train = open_records("synthetic", "train", size=60, classes=5, side=16)
    again = open_records("synthetic", "train", size=60, classes=5, side=16)
    test = open_records("synthetic", "test", size=20, classes=5, side=16)
    everything = np.arange(60)
    np.testing.assert_array_equal(train.take(everything)["image"], again.take(everything)["image"])
    a, b = train.take(everything), test.take(np.arange(20))
    assert a["image"].shape == (60, 16, 16, 3)
    assert train.classes == test.classes
    np.testing.assert_array_equal(a["coarse"], a["fine"] // 2)
    # The nearest training image by mean colour has the same coarse class: colours are shared by both splits.
    colour = [x["image"].astype(np.float64).mean((1, 2)) for x in (a, b)]
    nearest = np.linalg.norm(colour[1][:, None] - colour[0][None], axis=-1).argmin(1)
    assert (a["coarse"][nearest] == b["coarse"]).mean() > 0.8


def test_registry_holds_out_a_share(tmp_path):
    images, labels = np.zeros((40, 2, 2, 3), np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    options = {"root": tmp_path / "own.npz", "holdout_fraction": 0.25}
    train, test = (open_records("npz", split, **options) for split in ("train", "test"))
    assert (train.size, test.size) == (30, 10)
    with pytest.raises(ValueError, match="with holdout_fraction the splits are 'train' and 'test', got 'val'"):
        open_records("npz", "val", **options)


def test_registry_errors_name_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'embeded'; did you mean 'embedded'"):
        open_records("embeded", "train")
    with pytest.raises(ValueError, match="unknown data set 'zzz'; known: embedded, npz"):
        open_records("zzz", "train")
    with pytest.raises(ValueError, match="data set 'synthetic' has no option 'clases'; did you mean 'classes'"):
        open_records("synthetic", "train", clases=3)
    for name, what in (("npz", ".npz archive"), ("image_folder", "folder of images")):
        with pytest.raises(ValueError, match=f"'{name}' needs data.root, the path of your {what}"):
            open_records(name, "train")
    with pytest.raises(ValueError, match=r"built in and reads no files; unset data.root"):
        open_records("embedded", "train", root=tmp_path)
    with pytest.raises(ValueError, match="embedded has no split 'validation'; it has: train, test"):
        open_records("embedded", "validation")
    with pytest.raises(ValueError, match="synthetic has no split 'all'; it has: train, test"):
        open_records("synthetic", "train+all")
    with pytest.raises(ValueError, match="size >= classes >= 1"):
        open_records("synthetic", "train", size=3, classes=9)
    with pytest.raises(ValueError, match="delay >= 0 seconds; got -1"):
        open_records("synthetic", "train", delay=-1.0)
    with pytest.raises(ValueError, match=r"empty split in 'train\+'"):
        open_records("synthetic", "train+")
