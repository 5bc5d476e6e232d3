"""Feature caches of mixtures of prompts: what is refused, what survives a round trip, what the synthetic sets are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from protojax.data.prompts_cache import (
    FeatureCache,
    Features,
    check_cache,
    class_means,
    normalised,
    open_cache,
    save_cache,
    warn_small_classes,
    with_base,
)
from protojax.data.prompts_records import feature_records, feature_table
from protojax.data.prompts_synthetic import synthetic_modes


def cache(**changes) -> FeatureCache:
    """Three classes of two unit rows in four dimensions, two splits."""
    rows = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    label = np.asarray([0, 0, 1, 1, 2, 2], np.int32)
    splits = {"train": Features(rows, label), "test": Features(rows[::2], label[::2])}
    found = FeatureCache("toy", splits, rows[::2].copy(), ("a", "b", "c"), {"genus": ("x", "x", "y")})
    return found._replace(**changes)


def with_rows(**changes) -> FeatureCache:
    made = cache()
    return made._replace(splits={**made.splits, "train": made.splits["train"]._replace(**changes)})


def test_a_cache_survives_a_round_trip_and_its_fingerprint_is_checked(tmp_path: Path):
    path = tmp_path / "cache.npz"
    save_cache(path, cache(fingerprint="tower/224"), dtype=np.float32)
    back = open_cache(path, fingerprint="tower/224")
    for name, features in cache().splits.items():
        np.testing.assert_array_equal(back.split(name).image, features.image)
        np.testing.assert_array_equal(back.split(name).label, features.label)
    assert back.levels == {"genus": ("x", "x", "y")}
    assert back.class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="was made by 'tower/224', expected 'tower/336'"):
        open_cache(path, fingerprint="tower/336")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is not a readable \.npz archive"):
        open_cache(path)
    with pytest.raises(ValueError, match="no such feature cache"):
        open_cache(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (with_rows(image=3.0 * cache().splits["train"].image), r"norms 3\.\.3, expected 1; set data.normalise=True"),
        (with_rows(image=np.full((6, 4), np.nan, np.float32)), r"6 image rows are zero or not finite, first \[0, 1, 2"),
        (with_rows(label=np.asarray([0, 0, 1, 1, 2, 7], np.int32)), r"labels \[7\] lie outside 0..2"),
        (with_rows(label=np.zeros(6, np.int32)), r"2 classes have no image in 'train', first \['b', 'c'\]"),
        (cache(base=np.eye(3, dtype=np.float32)), r"base has \(3, 3\).*come from different models"),
        (cache(class_names=("a", "b", "a")), r"class names repeat: \['a'\]"),
        (cache(levels={"genus": ("x",)}), "level 'genus' names 1 classes, expected 3"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(bad: FeatureCache, message: str):
    with pytest.raises(ValueError, match=message):
        check_cache(bad)


def test_rows_can_be_normalised_and_empty_classes_left_out():
    long = with_rows(image=3.0 * cache().splits["train"].image)
    np.testing.assert_allclose(check_cache(normalised(long)).split("train").image, cache().split("train").image,
                               rtol=1e-6)  # fmt: skip
    label = np.asarray([0, 0, 0, 2, 2, 2], np.int32)
    kept = check_cache(with_rows(label=label), drop_empty_classes=True)
    assert kept.class_names == ("a", "c")
    assert kept.levels == {"genus": ("x", "y")}
    np.testing.assert_array_equal(kept.split("train").label, [0, 0, 0, 1, 1, 1])
    with pytest.warns(UserWarning, match="3 classes have fewer than K = 3 training images"):
        assert warn_small_classes(cache(), 3) == 3


def test_bases():
    found = cache()
    means = class_means(found.split("train"), 3)
    np.testing.assert_allclose(means[1], found.split("train").image[2:4].mean(0), rtol=1e-6)
    bare = found._replace(base=None)
    np.testing.assert_allclose(with_base(bare, "class_mean").base, means / np.linalg.norm(means, axis=1)[:, None],
                               rtol=1e-5)  # fmt: skip
    gap = with_base(bare, "gap", seed=1)
    np.testing.assert_allclose(np.linalg.norm(gap.base, axis=1), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match="has no text features; use base='class_mean'"):
        with_base(bare, "text")
    with pytest.raises(ValueError, match="did you mean 'text_shifted'"):
        with_base(found, "text_shift")


def test_the_table_holds_every_split_once_and_records_point_into_it():
    found = cache()
    table = feature_table(found, ("train", "test"))
    records = feature_records(found, "test", table.first["test"])
    taken = records.take(np.arange(3))
    np.testing.assert_array_equal(table.features[taken["row"]], found.split("test").image)
    np.testing.assert_array_equal(taken["label"], found.split("test").label)
    assert feature_table(found, ("train", "train")).features.shape == (6, 4)


def test_the_synthetic_set_has_the_gap_and_the_pairs_that_one_prompt_cannot_part():
    found = synthetic_modes("standard", classes=8, train=64, test=64)
    test = found.split("test")
    gram = test.image @ test.image.T
    same = test.label[:, None] == test.label[None, :]
    assert gram[~same].mean() == pytest.approx(0.57, abs=0.03)
    assert gram[same].mean() == pytest.approx(0.78, abs=0.02)
    assert (test.image @ found.base.T).mean() == pytest.approx(0.29, abs=0.03)  # image-text: below image-image
    means = class_means(found.split("train"), 8)
    cosine = means @ means.T / np.linalg.norm(means, axis=1)[:, None] / np.linalg.norm(means, axis=1)[None, :]
    assert cosine[0, 1] > cosine[0, 4] + 0.05  # paired classes share their mean
    again = synthetic_modes("standard", classes=8, train=64, test=64)
    np.testing.assert_array_equal(again.split("train").image, found.split("train").image)
    with pytest.raises(ValueError, match="modes come in pairs"):
        synthetic_modes("standard", modes=3)
    with pytest.raises(ValueError, match="did you mean 'standard'"):
        synthetic_modes("standart")
    with pytest.raises(ValueError, match="has no option 'trian'"):
        synthetic_modes("standard", trian=3)
