"""Image folders: every layout gives the labels that its folders say; bad input is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from protojax.data import class_counts, open_records
from protojax.data.decode import decode, fit


def _image(path, colour, size=(12, 10), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **save)


def _open(root, split="train", **options):
    return open_records("image_folder", split, root=root, **{"canvas": 8, "workers": 2, **options})


def _images(records):
    return records.take(np.arange(records.size))


def test_split_class_layout_shares_class_numbers_between_splits(tmp_path):
    for suffix, red in zip(("jpg", "png", "webp", "bmp", "JPEG"), range(0, 250, 50), strict=True):
        _image(tmp_path / "train" / "cat" / f"{red:03d}.{suffix}", (red, 0, 200))
    for split, name in (("train", "ant"), ("train", "dog"), ("val", "dog")):
        _image(tmp_path / split / name / "0.png", (5, 99, 0))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    train, val = _open(tmp_path), _open(tmp_path, "val")
    assert train.classes == val.classes == {"fine": ("ant", "cat", "dog")}
    np.testing.assert_array_equal(class_counts(train)["fine"], [1, 5, 1])
    np.testing.assert_array_equal(_images(val)["fine"], [2])  # not 0, although it is the only folder in val
    taken = _images(train)
    assert taken["image"].shape == (7, 8, 8, 3)
    np.testing.assert_array_equal(taken["fine"], [0, 1, 1, 1, 1, 1, 2])
    reds = taken["image"][taken["fine"] == 1][:, 4, 4, 0].astype(int)
    assert np.all(np.abs(reds - np.arange(0, 250, 50)) <= 6)  # JPEG and WebP lose a little
    np.testing.assert_array_equal(_images(_open(tmp_path, cache=True))["image"], taken["image"])
    union = open_records("image_folder", "train+val", root=tmp_path, canvas=8)
    np.testing.assert_array_equal(union.labels["fine"], [0, 1, 1, 1, 1, 1, 2, 2])


def test_deep_layout_is_named_by_its_path_and_gives_a_coarse_label(tmp_path):
    for name in ("Aves/12", "Aves/3", "Fungi/7"):
        _image(tmp_path / "train" / name / "x.png", 0)
    records = _open(tmp_path)
    assert records.classes == {"fine": ("Aves/12", "Aves/3", "Fungi/7"), "coarse": ("Aves", "Fungi")}
    np.testing.assert_array_equal(records.labels["coarse"], [0, 0, 1])


def test_folder_in_one_piece_and_unlabelled_images(tmp_path):
    for name in ("a", "b"):
        for i in range(4):
            _image(tmp_path / "whole" / name / f"{i}.png", (i, 0, 0))
    whole = _open(tmp_path / "whole", "all")
    np.testing.assert_array_equal(class_counts(whole)["fine"], [4, 4])
    held = _open(tmp_path / "whole", "test", holdout_fraction=0.25)
    np.testing.assert_array_equal(class_counts(held)["fine"], [1, 1])
    with pytest.raises(ValueError, match=r"has one split, 'all'.*set a hold-out fraction"):
        _open(tmp_path / "whole", "test")
    _image(tmp_path / "flat" / "train" / "0.png", 0)
    _image(tmp_path / "flat" / "train" / "deeper" / "1.png", 0)
    unlabelled = _open(tmp_path / "flat", labels="none")
    assert (unlabelled.size, dict(unlabelled.labels)) == (2, {})
    assert set(_images(unlabelled)) == {"image", "index"}
    with pytest.raises(ValueError, match=r"labels missing: .*0\.png is not in a class folder.*set labels='none'"):
        _open(tmp_path / "flat")


def test_annotation_file_names_the_split(tmp_path):
    """iNaturalist 2018: both splits in one folder, told apart by JSON files."""
    categories = [{"id": i, "name": f"taxon {i}", "supercategory": "Aves" if i else "Fungi"} for i in (7, 0, 3)]
    images = [{"id": 10 * i, "file_name": f"all/{i}/x.png"} for i in range(4)]
    for i in range(4):
        _image(tmp_path / "all" / str(i) / "x.png", (i, 0, 0))

    def write(name, rows, labels):
        pairs = [{"image_id": 10 * i, "category_id": c} for i, c in zip(rows, labels, strict=False)]
        content = {"images": [images[i] for i in rows], "annotations": pairs, "categories": categories}
        (tmp_path / f"{name}18.json").write_text(json.dumps(content))

    write("train", [3, 0, 1], [7, 0, 3])
    write("val", [2], [7])
    write("test", [2], [])
    options = {"annotations": "{split}18.json"}
    train, val = _open(tmp_path, **options), _open(tmp_path, "val", **options)
    assert train.classes == val.classes
    assert train.classes == {"fine": ("taxon 0", "taxon 3", "taxon 7"), "coarse": ("Aves", "Fungi")}
    taken = _images(train)
    np.testing.assert_array_equal(taken["image"][:, 0, 0, 0], [3, 0, 1])
    np.testing.assert_array_equal(taken["fine"], [2, 0, 1])
    np.testing.assert_array_equal(taken["coarse"], [0, 1, 0])
    np.testing.assert_array_equal(_images(val)["fine"], [2])
    with pytest.raises(ValueError, match=r"labels missing: .*test18\.json gives no category to 1 of 1 images"):
        _open(tmp_path, "test", **options)
    assert not _open(tmp_path, "test", labels="none", **options).labels
    with pytest.raises(ValueError, match=r"no such annotation file: .*none18\.json"):
        _open(tmp_path, "none", **options)
    with pytest.raises(ValueError, match="no such folder"):
        _open(tmp_path / "nowhere", **options)
    (tmp_path / "bad18.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad18\.json is not valid JSON"):
        _open(tmp_path, "bad", **options)
    (tmp_path / "bad18.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad18\.json lists no images"):
        _open(tmp_path, "bad", **options)
    (tmp_path / "all" / "3" / "x.png").unlink()
    with pytest.raises(ValueError, match=r"lists 'all/3/x\.png', which is not below .*; unpack the images there"):
        _open(tmp_path, **options)


def _damaged_tree(root):
    for i in range(4):
        _image(root / "train" / "a" / f"{i}.png", (10 * i, 0, 0))
    (root / "train" / "a" / "2.png").write_bytes(b"not a picture")
    _image(root / "train" / "b" / "0.png", (90, 0, 0))
    return root


def test_corrupt_image_is_skipped_named_and_counted(tmp_path):
    records = _open(_damaged_tree(tmp_path))
    taken = _images(records)
    np.testing.assert_array_equal(taken["index"], [0, 1, 3, 3, 4])
    np.testing.assert_array_equal(taken["image"][:, 0, 0, 0], [0, 10, 30, 30, 90])
    (problem,) = records.problems()
    assert str(tmp_path / "train" / "a" / "2.png") in problem
    verified = _open(tmp_path, verify=True)
    assert verified.size == 4
    np.testing.assert_array_equal(_images(verified)["image"][:, 0, 0, 0], [0, 10, 30, 90])
    np.testing.assert_array_equal(verified.labels["fine"], [0, 0, 0, 1])
    assert len(verified.problems()) == 1


def test_corrupt_image_is_fatal_by_choice(tmp_path):
    records = _open(_damaged_tree(tmp_path), on_corrupt="error")
    with pytest.raises(ValueError, match=r"cannot decode .*2\.png: .*repair or remove it, or set on_corrupt='skip'"):
        _images(records)
    with pytest.raises(ValueError, match=r"cannot decode .*2\.png"):
        _open(tmp_path, on_corrupt="error", verify=True)
    (tmp_path / "train" / "b" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="class 'b' has no image that can be decoded"):
        _open(tmp_path, verify=True)
    for file in (tmp_path / "train").glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 5 images can be decoded"):
        _open(tmp_path, verify=True)
    with pytest.raises(ValueError, match="none of its 5 examples can be read"):
        _images(_open(tmp_path))


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder: .*nowhere; point data.root at the folder"):
        _open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is a file; data.root must be a folder"):
        _open(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    for split in ("train", "all"):
        with pytest.raises(ValueError, match=r"no images below .*empty"):
            _open(tmp_path / "empty", split)
    (tmp_path / "hollow" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no images below .*train; looked for \.jpg"):
        _open(tmp_path / "hollow")
    _image(tmp_path / "ok" / "train" / "a" / "0.png", 0)
    with pytest.raises(ValueError, match="has no split 'test'; it has: train"):
        _open(tmp_path / "ok", "test")
    (tmp_path / "ok" / "train" / "b").mkdir()
    with pytest.raises(ValueError, match=r"class 'b' has no image in .*\(1 such folders\)"):
        _open(tmp_path / "ok")
    (tmp_path / "ok" / "train" / "b").rmdir()
    _image(tmp_path / "ok" / "val" / "new" / "0.png", 0)
    with pytest.raises(ValueError, match=r"val has 1 classes that .*train lacks, such as 'new'"):
        _open(tmp_path / "ok", "val")
    with pytest.raises(ValueError, match="labels must be 'folder' or 'none', got 'json'"):
        _open(tmp_path / "ok", labels="json")
    with pytest.raises(ValueError, match="canvas must be at least 1 pixel"):
        _open(tmp_path / "ok", canvas=0)


# ------------------------------------------------------------------------------------------------------------ decoding
@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 5)])  # wide, tall, smaller than the canvas
def test_fit_scales_the_short_side_and_keeps_the_centre(size):
    width, height = size
    short = min(size)
    # red and green tell the offset from the centre, in half short sides: 128 + 50 * offset
    x = (2 * np.arange(width) + 1 - width) / short
    y = (2 * np.arange(height) + 1 - height) / short
    ramps = np.stack([*np.broadcast_arrays(x[None], y[:, None]), np.zeros((height, width))], axis=-1)
    fitted = fit(Image.fromarray(np.clip(np.round(128 + 50 * ramps), 0, 255).astype(np.uint8)), 10, 10).astype(float)
    expected = 128 + 50 * (2 * np.arange(10) + 1 - 10) / 10
    # A cut by whole pixels is off by at most half a pixel, 5 grey values; rounding twice adds one. At the border of an
    # enlarged image there is nothing beyond the outermost pixel, so the outer two pixels are left out.
    for along in (fitted[5, :, 0], fitted[:, 5, 1]):
        assert np.abs(along - expected)[2:-2].max() <= 6


def test_image_of_the_right_size_is_untouched_and_modes_become_rgb():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(Image.fromarray(pixels), 6, 9), pixels)
    grey = Image.fromarray(pixels[..., 0])
    np.testing.assert_array_equal(fit(grey, 6, 9), np.repeat(pixels[..., :1], 3, axis=2))
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    np.testing.assert_array_equal(fit(deep, 6, 9), np.repeat(pixels[..., :1], 3, axis=2))


def test_reduced_jpeg_decoding_agrees_with_full_decoding(tmp_path):
    y, x = np.mgrid[:256, :384] / 64.0
    smooth = np.stack([np.sin(x + y), np.cos(x), np.sin(2 * y)], axis=-1)
    image = Image.fromarray((128 + 100 * smooth).astype(np.uint8))
    image.save(tmp_path / "large.jpg", quality=95)
    with Image.open(tmp_path / "large.jpg") as full:
        expected = fit(full, 32, 32).astype(int)
    assert np.abs(decode(tmp_path / "large.jpg", 32, 32).astype(int) - expected).max() <= 6
