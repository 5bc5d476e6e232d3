"""`protojax embed --weights`: from pictures and names of classes to a feature cache, and what is refused on the way."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protojax.cli import main
from protojax.data.pairs_npz import open_pairs_npz
from protojax.data.prompts_cache import open_cache
from protojax.data.prompts_pictures import open_pictures
from protojax.data.prompts_sources import open_file
from protojax.data.prompts_templates import (
    class_texts,
    fields_of,
    levels_of,
    open_templates,
    own_fields,
    read_class_fields,
    template_sets,
)
from protojax.data.prompts_thumbnails import middle
from protojax.towers import bank, load
from protojax.towers.bank import base_features, embed

from .models.pretrained_folder import SIDE, write_folder, write_photos

CLASSES = ("red_apple", "green_pear", "blue_cat")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def towers(weights):
    return load(weights, batch_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train and test of three classes: two pictures each, one of the training pictures is damaged."""
    root = write_photos(tmp_path_factory.mktemp("photos"), ("train", "test"), CLASSES, 2)
    (root / "train" / "red_apple" / "2.png").write_bytes(b"not a picture")
    return root


def run(*arguments: str) -> int:
    return main(["embed", *map(str, arguments)])


# ------------------------------------------------------------------------------------------------ the cache
def test_a_folder_becomes_a_cache_of_what_the_towers_say(weights, towers, folder, tmp_path, capsys):
    out = tmp_path / "cache.npz"
    assert run(f"--weights={weights}", f"--data={folder}", f"--out={out}", "--templates=photo", "--batch-size=8") == 0
    assert "train [6, 16], test [6, 16], 3 classes, base [3, 16], clip-" in capsys.readouterr().out
    cache = open_cache(out)
    assert cache.class_names == tuple(sorted(CLASSES))
    assert {name: f.label.tolist() for name, f in cache.splits.items()} == {
        "train": [0, 0, 1, 1, 2, 2], "test": [0, 0, 1, 1, 2, 2]
    }  # fmt: skip
    fit = towers.preprocessing.fit
    images = np.stack([fit(Image.open(folder / "test" / c / f"{i}.png")) for c in cache.class_names for i in (0, 1)])
    np.testing.assert_allclose(cache.split("test").image, towers.encode_images(images), atol=1e-3)  # kept as float16
    texts = [f"a photo of a {c.replace('_', ' ')}." for c in cache.class_names]
    np.testing.assert_allclose(cache.base, towers.encode_texts(texts), atol=1e-6)
    kind, image, text = cache.fingerprint.split("/")
    assert kind.startswith("clip-")
    assert image == f"image-{towers.preprocessing.digest}"
    assert text.startswith(f"text-{towers.tokeniser.digest}-")
    assert json.loads(cache.about)["templates"] == ["a photo of a {name}."]
    np.testing.assert_array_equal(cache.pictures("test", np.asarray([3]))[0], middle(Image.fromarray(images[3])))
    opened = open_file(root=out, seed=0, base="text", fingerprint=cache.fingerprint)  # as the workload does
    np.testing.assert_array_equal(opened.base, cache.base)

    again = {"data": str(folder), "batch_size": 8}
    assert "left as it is" in embed(weights, out, **again)
    with pytest.raises(ValueError, match=r"was made by 'clip-.*', this command makes 'clip-.*': use another name, or"):
        embed(weights, out, templates="plain", **again)
    with pytest.raises(ValueError, match="was made by the same towers with another data_digest"):
        embed(weights, out, splits=("train",), **again)
    long = tmp_path / "long.txt"
    long.write_text(" ".join(["a photo of"] * 5) + " {name}")
    assert "; 3 texts were cut to 12 tokens" in embed(weights, out, templates=str(long), overwrite=True, **again)
    assert "no texts" in embed(weights, out, templates="none", overwrite=True, splits=("train",), **again)
    assert open_cache(out).base is None


def test_large_sets_keep_the_names_of_files_in_step_with_their_rows(weights, folder, tmp_path, monkeypatch):
    """A class without training picture is dropped, and a damaged picture: what is left still shows its own picture."""
    monkeypatch.setattr(bank, "LARGEST_DRAWN", 50_000)
    files = [folder / "test" / name / f"{i}.png" for name in CLASSES for i in (0, 1)]
    rows = [{"path": str(file), "label": file.parent.name, "split": "train"} for file in files]
    rows[3]["split"] = rows[4]["split"] = rows[5]["split"] = "test"
    rows.insert(1, {"path": str(folder / "train" / "red_apple" / "2.png"), "label": "red_apple", "split": "train"})
    table = write_table(tmp_path / "t.csv", rows)
    embed(weights, tmp_path / "c.npz", data=str(table), batch_size=8, drop_empty_classes=True)
    cache = open_cache(tmp_path / "c.npz")
    assert cache.class_names == ("green_pear", "red_apple")
    assert [f.label.tolist() for f in cache.splits.values()] == [[1, 1, 0], [0]]
    for split, expected in (("train", files[:3]), ("test", files[3:4])):
        found = cache.pictures(split, np.arange(len(expected)))
        for picture, file in zip(found, expected, strict=True):
            with Image.open(file) as image:
                np.testing.assert_array_equal(picture, middle(image))


def test_base_is_the_unit_mean_of_unit_texts(towers):
    texts = [("a cat", "a photo of a cat"), ("a dog", "a photo of a dog")]
    units = towers.encode_texts([t for own in texts for t in own]).reshape(2, 2, -1)
    mean = units.mean(axis=1)
    np.testing.assert_allclose(
        base_features(towers, texts), mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6
    )


def test_a_table_with_fields_and_captions_becomes_a_cache_and_a_token_bank(weights, towers, folder, tmp_path):
    rows = [
        {"path": str(folder / split / name / f"{i}.png"), "label": name, "split": split, "caption": f"a {name} photo",
         "kind": "fruit" if name != "blue_cat" else "cat", "weight": str(i)}
        for split in ("train", "test") for name in CLASSES for i in range(2)
    ]  # fmt: skip
    table = write_table(tmp_path / "photos.csv", rows)
    templates = tmp_path / "mine.txt"
    templates.write_text("# two levels\na photo of a {name}\na {name}, a kind of {kind}\n")
    made = {"data": str(table), "batch_size": 8}
    embed(weights, tmp_path / "cache.npz", templates=str(templates), **made)
    cache = open_cache(tmp_path / "cache.npz")
    assert cache.levels == {"kind": ("cat", "fruit", "fruit")}
    templates.write_text("a {weight}")
    with pytest.raises(ValueError, match=r"class 'blue_cat', template 'a \{weight\}' .* the field 'weight' is missing"):
        embed(weights, tmp_path / "none.npz", templates=str(templates), **made)

    embed(weights, tmp_path / "tokens.npz", tokens=True, **made)
    pairs = open_pairs_npz(str(tmp_path / "tokens.npz"), "test")
    assert pairs.size == 6
    assert pairs.texts.causal
    assert len(pairs.texts.captions) == 3
    content, _ = pairs.read(np.arange(6))
    fit = towers.preprocessing.fit
    images = np.stack([fit(Image.open(row["path"])) for row in rows if row["split"] == "test"])
    np.testing.assert_allclose(content["image_tokens"], towers.encode_images(images, "tokens"), rtol=1e-3, atol=1e-2)
    order = [int(c[0]) for c in pairs.caption]
    expected = towers.encode_texts([row["caption"] for row in rows if row["split"] == "test"], "pooled")
    np.testing.assert_allclose(pairs.texts.pooled["eos"][order], expected, atol=1e-5)


def test_embedded_photographs_have_two_levels_and_descriptions():
    pictures = open_pictures("embedded", lambda image: np.asarray(image.resize((SIDE, SIDE))), SIDE)
    assert list(pictures.splits) == ["train", "test"]
    assert levels_of(pictures.fields)["coarse"][pictures.class_names.index("Golden-Delicious")] == "Apple"
    texts = class_texts(open_templates("fine_coarse"), pictures.class_names, pictures.fields)
    assert "a photo of Golden-Delicious, a kind of Apple." in texts[pictures.class_names.index("Golden-Delicious")]
    class_texts(open_templates("description"), pictures.class_names, pictures.fields)
    assert pictures.splits["test"].take(np.asarray([0, 5]))["image"].shape == (2, SIDE, SIDE, 3)


def test_coarse_labels_have_their_fine_classes_as_modes(weights, folder, tmp_path):
    """Numbered over all splits together: a fine class that one split lacks does not shift the others."""
    for split, names in (("train", ("Aves/hawk", "Aves/owl", "Felis/cat")), ("test", ("Aves/owl", "Felis/cat"))):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (SIDE, SIDE), (len(name), 9, 9)).save(tmp_path / "data" / split / name / "0.png")
    out = tmp_path / "coarse.npz"
    embed(weights, out, data=str(tmp_path / "data"), label="coarse", batch_size=8)
    cache = open_cache(out)
    assert cache.mode_names == (("Aves/hawk", "Aves/owl"), ("Felis/cat",))
    assert {k: f.mode.tolist() for k, f in cache.splits.items()} == {"train": [0, 1, 0], "test": [1, 0]}


def test_data_in_one_piece_are_held_out_class_by_class(folder):
    pictures = open_pictures(str(folder / "test"), np.asarray, SIDE, test_share=0.5)
    assert {k: v.labels["fine"].tolist() for k, v in pictures.splits.items()} == {"train": [0, 1, 2], "test": [0, 1, 2]}


# ------------------------------------------------------------------------------------------ templates and fields
def test_installed_templates_are_templates():
    known = {field for name in template_sets() for line in open_templates(name).lines for field in fields_of(line)}
    assert known == {"name", "coarse", "description", "species", "genus", "family", "order"}


def test_fields_come_from_names_and_files(tmp_path):
    names = ["00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris"]
    found = own_fields(names)
    assert found["species"] == ("Lumbricus terrestris",)
    assert (found["order"], found["family"], found["genus"]) == (("Haplotaxida",), ("Lumbricidae",), ("Lumbricus",))
    assert own_fields(["Aves/snow_owl", "Aves/hawk"]) == {"name": ("snow owl", "hawk"), "coarse": ("Aves", "Aves")}
    table = write_table(tmp_path / "classes.csv", [{"class": c, "genus": g} for c, g in (("b", "y"), ("a", "x"))])
    (tmp_path / "a.json").write_text('{"a": {"genus": "x"}, "b": {"genus": "y", "family": "z"}}')
    (tmp_path / "b.json").write_text('[{"name": "b", "genus": "y"}, {"name": "a", "genus": "x", "id": 3}]')
    for file in (table, tmp_path / "a.json", tmp_path / "b.json"):
        assert read_class_fields(file, ["a", "b"])["genus"] == ("x", "y")
    assert levels_of({"genus": ("x", "y", "x"), "alone": ("1", "2", "3"), "name": ("n", "n", "n")}) == {
        "genus": ("x", "y", "x")
    }


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n\n", "no template in it; write one a line"),
        ("a {name}\na {name}\n", r"'a \{name\}' stands there twice"),
        ("a {name.upper}", "is no field; write a plain name"),
        ("a {}", "is no field; write a plain name"),
        ("a {name", "fields are written {name}"),
    ],
)
def test_template_files_that_are_refused(tmp_path, text, message):
    (tmp_path / "set.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_templates(tmp_path / "set.txt")


def test_templates_need_their_fields_and_tell_classes_apart(tmp_path):
    with pytest.raises(ValueError, match=r"'taxonmy': neither an installed set \(.*\) nor a file .*mean 'taxonomy'"):
        open_templates("taxonmy")
    with pytest.raises(
        ValueError, match=r"class 'b', template '.*\{genus\}.' of taxonomy: the field 'genus' is missing"
    ):
        class_texts(open_templates("taxonomy"), ["a", "b"], {"species": ("a", "b"), "genus": ("g", ""), "family":
                    ("f", "f"), "order": ("o", "o")})  # fmt: skip
    names = ["x/cat", "y/cat"]
    with pytest.raises(ValueError, match="classes 'x/cat' and 'y/cat' get the same texts"):
        class_texts(open_templates("photo"), names, own_fields(names))
    file = write_table(tmp_path / "classes.csv", [{"class": "a", "genus": "x"}] * 2)
    with pytest.raises(ValueError, match="names the class 'a' twice"):
        read_class_fields(file, ["a"])
    with pytest.raises(ValueError, match=r"lacks 1 of 2 classes, the first is 'ab' \(did you mean 'a'\?\)"):
        read_class_fields(write_table(file, [{"class": "a", "genus": "x"}]), ["a", "ab"])


# ------------------------------------------------------------------------------------------------- bad pictures
ROWS = [{"path": "a.png", "label": "x", "split": "train"}, {"path": "b.png", "label": "y", "split": "test"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "a.png", "kind": "x"}], r"has no column 'label' \(or class, category\); it has: file, kind"),
        ([{"place": "a.png", "label": "x"}], "has no column 'path'"),
        ([*ROWS, {"path": "c.png", "label": "", "split": "test"}], r"1 rows have no label, the first are rows \[3\]"),
        ([*ROWS, {"path": "c.png", "label": "x", "split": ""}], "1 rows have no split and others do"),
        ([*ROWS, {"path": "c.png", "label": "x", "split": "train"}], "names 1 images that do not exist, the first is"),
        ([*ROWS, ROWS[0]], "twice; keep one row an image"),
        (ROWS, r"1 classes have no image in 'train', first \['y'\]"),
    ],
)
def test_tables_that_are_refused_before_anything_is_encoded(weights, tmp_path, rows, message):
    for name in "ab":
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=message):
        embed(weights, tmp_path / "out.npz", data=str(write_table(tmp_path / "t.csv", rows)), batch_size=8)
    assert not (tmp_path / "out.npz").exists()


def test_command_lines_that_are_refused(weights, folder, tmp_path, capsys):
    out = tmp_path / "cache.npz"
    for arguments, message in (
        ((f"--out={out}",), "expected WORKDIR (a run) or --weights=FOLDER (pretrained towers), got neither"),
        (("runs/x", f"--weights={weights}", f"--out={out}"), "got both"),
        ((f"--weights={weights}", f"--out={out}"), "--weights needs --data"),
        ((f"--weights={weights}", f"--data={folder}", "--out=x.parquet"), "are written as .npz"),
        ((f"--weights={weights}", f"--data={folder}", f"--out={tmp_path}/no/x.npz"), "make it first"),
        ((f"--weights={weights}", f"--data={folder}", f"--out={out}", "--label=coarse"), "has no label 'coarse'"),
        ((f"--weights={weights}", f"--data={folder}", f"--out={out}", "--splits=val"), "has no split 'val'"),
        ((f"--weights={weights}", f"--data={folder}", f"--out={out}", "--test-share=0.2"), "only labelled data in one"),
        (
            (f"--weights={weights}", f"--data={folder}", f"--out={out}", "--tokens", "--templates=none"),
            "pairs need texts",
        ),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    out.write_bytes(b"something else")
    assert run(f"--weights={weights}", f"--data={folder}", f"--out={out}") == 2
    assert "was made by 'something else'" in capsys.readouterr().err
