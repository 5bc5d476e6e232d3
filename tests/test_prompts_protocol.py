"""Few shots, base-to-new, and sheets of images: what is taken away, what is measured, what is drawn."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from protojax.config import Data
from protojax.data.prompts_cache import FeatureCache, Features, class_means, open_cache, save_cache, with_base
from protojax.data.prompts_sources import open_grocery
from protojax.data.prompts_synthetic import synthetic_modes
from protojax.objectives.prompts import PromptOptions
from protojax.reporting import prompts_sheets as sheets
from protojax.workloads import prompts_evaluation as evaluation
from protojax.workloads.prompts import constants_of
from protojax.workloads.prompts_protocol import protocol

C, N, D = 6, 12, 16


@pytest.fixture(scope="module")
def cache() -> FeatureCache:
    """Six classes of twelve images a split, two of them pairs that one prompt cannot part."""
    return synthetic_modes("small", classes=C, train=N, test=N, width=D, xor=0.0)


def test_shots_are_nested_and_test_images_stay(cache: FeatureCache):
    two, four = (protocol(cache, shots, seed=3) for shots in (2, 4))
    assert set(two.train_rows) < set(four.train_rows)
    np.testing.assert_array_equal(np.bincount(two.cache.split("train").label), np.full(C, 2))
    np.testing.assert_array_equal(two.cache.split("train").image, cache.split("train").image[two.train_rows])
    np.testing.assert_array_equal(two.cache.split("test").image, cache.split("test").image)
    assert set(protocol(cache, 2, seed=4).train_rows) != set(two.train_rows)


def test_a_base_of_class_means_sees_the_shots_alone(cache: FeatureCache):
    whole = with_base(cache._replace(base=None), "class_mean")
    found = protocol(whole, 2, base="class_mean").cache
    means = class_means(found.split("train"), C)
    np.testing.assert_allclose(found.base, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-5)
    with pytest.raises(ValueError, match="base='text_shifted' knows the mean of all images"):
        protocol(cache, 2, base="text_shifted")


def test_unseen_classes_are_nowhere_but_in_their_own_test_set(cache: FeatureCache):
    found = protocol(cache, 3, 0.5)
    assert found.cache.class_names == cache.class_names[:3]
    assert found.unseen is not None
    assert found.unseen.class_names == cache.class_names[3:]
    assert found.cache.split("train").label.max() == found.cache.split("test").label.max() == 2
    np.testing.assert_array_equal(found.unseen.base, cache.base[3:])
    np.testing.assert_array_equal(np.unique(found.unseen.test.label), [0, 1, 2])
    np.testing.assert_array_equal(cache.split("train").label[found.train_rows], found.cache.split("train").label)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": -1}, "shots: expected a whole number >= 0 .*got -1"),
        ({"unseen": 1.0}, r"unseen: expected a share of the classes in \[0, 1\), got 1.0"),
        ({"unseen": 0.05}, "unseen = 0.05 of 6 classes leaves one side without a class"),
        (
            {"unseen": 0.5, "base": "class_mean"},
            "unseen classes need a text base; base='class_mean' is made from images",
        ),
    ],
)
def test_protocols_that_cannot_be_are_refused(cache: FeatureCache, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        protocol(cache, **options)


def parts_of(cache: FeatureCache, **options: Any) -> tuple[evaluation.Tested, Any]:
    opened = protocol(cache, **options)
    chosen = PromptOptions()
    constants = constants_of(opened.cache, opened.cache.split("train").image, chosen, "train")
    return evaluation.tested(opened.cache, constants, chosen, Data(), 0.01, opened.unseen), opened


def test_base_to_new_without_training_is_zero_shot_on_both_sides(cache: FeatureCache):
    t, opened = parts_of(cache, unseen=0.5)
    zero = np.zeros((3, 2, D), np.float32)
    seen = evaluation.measured(t, lambda x: x @ t.base.T)["top1"]
    found = evaluation.seen_and_unseen(t, opened.unseen, zero, seen)
    assert found["new"] == found["new_zero_shot"]
    scores = opened.unseen.test.image @ opened.unseen.base.T
    assert found["new"] == pytest.approx((scores.argmax(axis=1) == opened.unseen.test.label).mean())
    assert found["harmonic_mean"] == pytest.approx(2 * seen * found["new"] / (seen + found["new"]))


def test_one_table_holds_every_baseline_with_the_same_columns(cache: FeatureCache):
    t, _ = parts_of(cache)
    found = evaluation.fitted_baselines(t, 4)
    assert set(found) == {"class_mean", "k_means", "linear_probe", "linear_probe_adam"}
    columns = {"top1", "balanced", "many", "medium", "few", "margin", "largest", "levels", "ece"}
    assert all(columns <= set(f) for f in found.values())
    assert found["linear_probe"]["margin"] is None  # its scores are no cosines
    assert found["k_means"]["purity"] > evaluation.random_purity(t, 4)
    assert t.held is not None  # temperatures are fitted on 'val'


def test_blocks_of_images_give_what_one_block_gives(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch):
    t, _ = parts_of(cache)
    scorer = lambda x: x @ t.base.T  # noqa: E731
    whole = evaluation.measured(t, scorer, calibrated=True)
    monkeypatch.setattr(evaluation, "ROWS", 7)  # 72 images: the last block is filled up
    parts = evaluation.measured(t, scorer, calibrated=True)
    assert parts.pop("levels") == pytest.approx(whole.pop("levels"))
    assert parts == pytest.approx(whole)


# --------------------------------------------------------------------------------------------------- sheets
def test_a_sheet_shows_what_a_sub_prompt_claims_by_falling_responsibility():
    r = np.asarray([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [1.0, 0.0, 0.0]], np.float32)
    cosine = np.zeros_like(r)
    rows, shares = sheets.claimed(r, cosine, np.asarray([0, 1, 2]), columns=2)  # row 3 is of another class
    np.testing.assert_array_equal(rows, [[0, 1], [2, -1], [-1, -1]])
    np.testing.assert_allclose(shares, [[0.9, 0.6], [0.8, 0.0], [0.0, 0.0]])
    cosine[:, 0] = [0.1, 0.5, 0.9, 0.7]
    even, _ = sheets.claimed(np.eye(3, dtype=np.float32)[np.zeros(4, int)], cosine, np.arange(4), columns=3)
    np.testing.assert_array_equal(even[0], [2, 3, 1])  # all at 1.00: the nearest come first
    modes = np.asarray([1, 1, 0, 0])
    assert sheets.mode_labels(r, np.asarray([0, 1, 2]), modes, ("a", "b")) == ["b 100%", "a 100%", ""]


def test_the_pictures_are_the_photographs_themselves_and_empty_tiles_are_grey(tmp_path: Path):
    """Rows of the Grocery set after a few-shot draw: the tile is the photograph of that row, not of its neighbour."""
    opened = protocol(open_grocery(seed=0, side=8), 3, base="class_mean")
    features = opened.cache.split("train")
    classes = len(opened.cache.class_names)
    r = np.eye(2, dtype=np.float32)[np.zeros(len(features.label), int)]  # sub-prompt 0 claims everything
    pictures = lambda rows: opened.cache.pictures("train", rows)  # noqa: E731
    made = np.zeros((classes, 2, 4), np.float32)
    path = sheets.write_prompts_data(
        tmp_path, r, 0 * r, features.label, made, opened.cache.class_names, rows=opened.train_rows, pictures=pictures,
        modes=features.mode, mode_names=opened.cache.mode_names,
    )  # fmt: skip
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    c = int(arrays["sheet_shown"][0])
    sheet = sheets.sheet_of(arrays, opened.cache.class_names[c])
    mine = opened.train_rows[features.label == c]
    assert set(sheet.rows[0][:3]) == set(mine)
    assert (sheet.rows[0][3:] == -1).all()
    photograph = pictures(sheet.rows[0][:1])[0]
    expected = np.asarray(Image.fromarray(photograph).resize((sheets.SIDE, sheets.SIDE)))
    np.testing.assert_array_equal(sheet.images[0, 0], expected)
    assert (sheet.images[1] == round(255 * sheets.GREY)).all()
    assert sheet.modes[0].split()[0] in opened.cache.mode_names[c]
    sheets.draw(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.width > 1000
        assert np.asarray(drawn.convert("RGB")).std() > 10  # not blank
    block = sheets.class_block(sheet)
    assert block.count("data:image/jpeg") == 3
    assert block.count("no further image") == 13
    with pytest.raises(ValueError, match=r"no class 'Appel'.*did you mean 'Apple'"):
        sheets.sheet_of(arrays, "Appel")


def test_a_cache_may_carry_thumbnails_or_name_its_files(cache: FeatureCache, tmp_path: Path):
    small = FeatureCache("own", {"train": Features(*(c[:3] for c in cache.split("train")[:2]))}, cache.base[:1], ("a",))
    save_cache(tmp_path / "own.npz", small, dtype=np.float32)
    with np.load(tmp_path / "own.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    thumbs = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    np.savez(tmp_path / "thumbs.npz", **arrays, thumbnail=thumbs)
    found = open_cache(tmp_path / "thumbs.npz")
    np.testing.assert_array_equal(found.pictures("train", np.asarray([2, 0])), thumbs[[2, 0]])
    Image.fromarray(np.full((10, 8, 3), 7, np.uint8)).save(tmp_path / "one.png")
    np.savez(tmp_path / "paths.npz", **arrays, path=np.asarray(["one.png", "gone.png", "one.png"]))
    with pytest.warns(UserWarning, match="1 pictures .* cannot be opened, first .*gone.png"):
        drawn = open_cache(tmp_path / "paths.npz").pictures("train", np.arange(3))
    assert (drawn[0] == 7).all()
    assert (drawn[1] == 205).all()
    assert open_cache(tmp_path / "own.npz").pictures is None


def test_tested_parts_are_those_of_the_configuration(cache: FeatureCache):
    """The split 'val' is not held out from itself when it is the one that is tested."""
    constants = constants_of(cache, cache.split("train").image, PromptOptions(), "train")
    data = dataclasses.replace(Data(), test_split="val")
    assert evaluation.tested(cache, constants, PromptOptions(), data, 0.01, None).held is None
