"""Archives: plain and packed images agree, subsets relabel all splits alike, damage is named; the embedded set."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from protojax.data import class_counts, open_records
from protojax.data.embedded import hierarchy


def _save(path, **arrays):
    np.savez(path, **arrays)
    return path


def _pack(images, damage=()):
    """Lossless 'JPEG' layout (PNG bytes: the reader goes by content) with the files of `damage` cut short."""
    files = []
    for i, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue()[:40] if i in damage else file.getvalue())
    return {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)], dtype=np.int64),
    }


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (9, 6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("cache", [True, False])
def test_packed_and_plain_archives_give_the_same_records(tmp_path, images, cache):
    labels = {"labels": np.arange(9) % 3, "coarse_labels": np.arange(9) % 3 // 2}
    names = {"class_names": np.array(["a", "b", "c"]), "coarse_names": np.array(["x", "y"])}
    both = {f"{split}_{key}": value for split in ("train", "train_mini") for key, value in labels.items()}
    plain = _save(tmp_path / "plain.npz", train_images=images, train_mini_images=images, **both, **names)
    packed = {f"{split}_{key}": v for split in ("train", "train_mini") for key, v in _pack(images).items()}
    packed_path = _save(tmp_path / "packed.npz", **packed, **both, **names)
    rows = np.array([8, 0, 3, 3, 5, 8])
    for split in ("train", "train_mini"):
        first = open_records("npz", split, root=plain)
        second = open_records("npz", split, root=packed_path, cache=cache)
        assert first.shapes == second.shapes
        assert first.classes == second.classes == {"fine": ("a", "b", "c"), "coarse": ("x", "y")}
        for key in first.shapes:
            for _ in range(2):  # the second time from the cache
                np.testing.assert_array_equal(first.take(rows)[key], second.take(rows)[key])
    union = open_records("npz", "train+train_mini", root=plain)
    np.testing.assert_array_equal(union.take(np.array([17]))["image"], images[8:])


def test_archive_in_one_piece_and_split_class_names(tmp_path, images):
    own = open_records("npz", "all", root=_save(tmp_path / "a.npz", images=images, labels=np.arange(9)))
    np.testing.assert_array_equal(own.take(np.arange(9))["image"], images)
    assert own.classes["fine"] == tuple(map(str, range(9)))
    path = _save(
        tmp_path / "b.npz",
        background_images=images[..., :1],
        background_labels=np.zeros(9, np.int16),
        background_class_names=np.array(["only"]),
    )
    assert open_records("npz", "background", root=path).classes == {"fine": ("only",)}


def test_subset_lists_choose_images_and_relabel_every_split(tmp_path, images):
    labels = np.array([4, 1, 0, 3, 1, 2, 3, 4, 0])
    arrays = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images[::-1],
        "test_labels": labels[::-1],
        "test_coarse_labels": labels[::-1] // 2,
        "train_coarse_labels": labels // 2,
        "class_names": np.array(list("abcde")),
        "few_idx": np.array([1, 3, 4], np.int32),
    }
    path = _save(tmp_path / "lt.npz", **arrays)
    train, test = (open_records("npz", split, root=path, subset="few") for split in ("train", "test"))
    assert train.classes == test.classes == {"fine": ("b", "d"), "coarse": ("0", "1")}
    np.testing.assert_array_equal(train.take(np.arange(3))["image"], images[[1, 3, 4]])
    assert train.labels["fine"].tolist() == [0, 1, 0]
    kept = np.flatnonzero(np.isin(labels[::-1], [1, 3]))
    np.testing.assert_array_equal(test.take(np.arange(test.size))["image"], images[::-1][kept])
    np.testing.assert_array_equal(np.array([1, 3])[test.labels["fine"]], labels[::-1][kept])
    with pytest.raises(ValueError, match="has no index list 'lots'; it has: few"):
        open_records("npz", "train", root=path, subset="lots")
    arrays["few_idx"] = np.array([99])
    with pytest.raises(ValueError, match=r"must hold indices in 0\.\.8 of the train split"):
        open_records("npz", "train", root=_save(tmp_path / "bad.npz", **arrays), subset="few")
    del arrays["train_labels"]
    with pytest.raises(ValueError, match="'few' needs 'train_labels'"):
        open_records("npz", "train", root=_save(tmp_path / "bad.npz", **arrays), subset="few")


@pytest.mark.parametrize("cache", [True, False])
def test_damaged_image_is_skipped_and_named_once_or_fatal(tmp_path, images, cache):
    path = _save(tmp_path / "d.npz", **{f"train_{k}": v for k, v in _pack(images, damage=(0, 4)).items()})
    records = open_records("npz", "train", root=path, cache=cache)
    for _ in range(2):
        taken = records.take(np.arange(9))
        np.testing.assert_array_equal(taken["index"], [1, 1, 2, 3, 5, 5, 6, 7, 8])
        np.testing.assert_array_equal(taken["image"], images[taken["index"]])
    assert [line.split(":")[0] for line in records.problems()] == ["d/train[0]", "d/train[4]"]
    fatal = open_records("npz", "train", root=path, on_corrupt="error", cache=cache)
    with pytest.raises(ValueError, match=r"cannot decode d/train\[4\].*set on_corrupt='skip'"):
        fatal.take(np.array([2, 4]))


def test_archive_errors(tmp_path, images):
    def opened(split="train", **arrays):
        return open_records("npz", split, root=_save(tmp_path / "e.npz", **arrays))

    with pytest.raises(ValueError, match=r"no such file: .*none\.npz; data\.root must be the path"):
        open_records("npz", "train", root=tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text\.npz is not a readable \.npz archive"):
        open_records("npz", "train", root=tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", images)
    with pytest.raises(ValueError, match=r"holds a single array; save images and labels together"):
        open_records("npz", "train", root=tmp_path / "one.npy")
    with pytest.raises(ValueError, match="has no split 'val'; it has: train, test"):
        opened("val", train_images=images, test_images=images)
    with pytest.raises(ValueError, match="it has: no images at all"):
        opened(labels=np.zeros(3))
    with pytest.raises(ValueError, match=r"needs 'train_offsets'.*beside it"):
        opened(train_jpeg=np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="must be one uint8 vector, got int64"):
        opened(train_jpeg=np.zeros(5, np.int64), train_offsets=np.array([0, 5]))
    with pytest.raises(ValueError, match="offsets must be an ascending vector"):
        opened(train_jpeg=np.zeros(5, np.uint8), train_offsets=np.array([0, 5, 3]))
    with pytest.raises(ValueError, match="offsets end at 9, but there are only 5 bytes"):
        opened(train_jpeg=np.zeros(5, np.uint8), train_offsets=np.array([0, 9]))
    with pytest.raises(ValueError, match="none of its 1 images can be decoded"):
        opened(train_jpeg=np.zeros(5, np.uint8), train_offsets=np.array([0, 5]))
    with pytest.raises(ValueError, match=r"array 'train_labels' cannot be read.*damaged"):
        opened(train_images=images, train_labels=np.array([None] * 9, dtype=object))
    path = _save(tmp_path / "e.npz", **{f"train_{k}": v for k, v in _pack(images).items()})
    with pytest.raises(ValueError, match="on_corrupt must be 'skip' or 'error', got 'ignore'"):
        open_records("npz", "train", root=path, on_corrupt="ignore")


def test_embedded_photographs():
    train, test = (open_records("embedded", split) for split in ("train", "test"))
    assert (train.size, test.size) == (2936, 2485)
    assert train.classes == test.classes
    assert (len(train.classes["fine"]), len(train.classes["coarse"])) == (81, 43)
    to_coarse, descriptions = hierarchy()
    assert len(descriptions) == 81
    assert all(descriptions)
    for records in (train, test):
        np.testing.assert_array_equal(to_coarse[records.labels["fine"]], records.labels["coarse"])
        assert class_counts(records)["fine"].min() > 0
    assert class_counts(train)["fine"].max() <= 100  # why this set's groups are terciles
    rows = np.arange(0, 2485, 5)
    images = test.take(rows)["image"]
    assert images.shape == (497, 64, 64, 3)
    assert images.dtype == np.uint8
    assert not test.problems()
    # Photographs, not noise: neighbouring pixels are alike, images are not.
    flat = images.astype(np.float32).mean(-1)
    assert np.abs(np.diff(flat, axis=2)).mean() < 0.4 * np.abs(np.diff(flat, axis=0)).mean()
    # The labels belong to the images: coarse 1-NN on raw pixels beats chance several times over.
    bank = train.take(np.arange(0, 2936, 2))
    x, y = (a[:, ::8, ::8].reshape(len(a), -1).astype(np.float32) for a in (images, bank["image"]))
    nearest = ((x**2).sum(1)[:, None] - 2.0 * x @ y.T + (y**2).sum(1)[None]).argmin(1)
    assert (bank["coarse"][nearest] == test.labels["coarse"][rows]).mean() > 3 / 43
    assert open_records("embedded", "train") is train  # decoded once a process


def test_a_condition_on_an_array_cuts_one_split_into_two(tmp_path, images):
    """The two parts share the classes, hold every row once, and keep its image and label."""
    drawer, labels = np.array([3, 1, 2, 1, 3, 2, 1, 1, 2], np.int8), np.arange(9) % 4
    path = _save(tmp_path / "a.npz", ev_images=images, ev_labels=labels, ev_drawer=drawer, ev_wide=np.zeros((9, 2)))
    first, second = (open_records("npz", f"ev[drawer{sign}2]", root=path) for sign in ("<=", ">"))
    assert (first.size, second.size) == (7, 2)
    assert first.classes == second.classes
    for part, rows in ((first, drawer <= 2), (second, drawer > 2)):
        found = part.take(np.arange(part.size))
        np.testing.assert_array_equal(found["image"], images[rows])
        np.testing.assert_array_equal(found["fine"], labels[rows])
    for split, message in {
        "ev[hand<=2]": "no array 'ev_hand' to choose rows by; it has: images, labels, drawer, wide",
        "ev[drawer>3]": r"no image fulfils 'ev\[drawer>3\]'; ev_drawer goes from 1 to 3",
        "ev[wide==0]": r"must hold one integer an image \(9\)",
        "ev[drawer=2]": "has no split",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_records("npz", split, root=path)
    with pytest.raises(ValueError, match="exclude one another"):
        open_records("npz", "ev[drawer<=2]", root=path, subset="few")
