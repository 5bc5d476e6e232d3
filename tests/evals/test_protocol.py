"""Protocols: the hash is that of what is measured; files, names and mistakes."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from protojax import protocol
from protojax.data import registry
from protojax.data.naming import default_split, parse_data
from protojax.protocol import Protocol, make
from tests.toy import toy_config


# ----------------------------------------------------------------------------------------------------- the hash
def test_the_hash_is_the_sha256_of_the_canonical_json():
    found = make({"k": [20], "evaluations": {"knn": {}}})
    text = (
        '{"bank_split":null,"checkpoint":"last","crop":1.0,"evaluations":{"knn":{"clamp":false}},"groups":"inat",'
        '"k":[20],"labels":null,"resize":null,"seed":0,"temperature":0.07,"test_split":null,"version":1}'
    )
    assert json.loads(text) == found.canonical()
    assert found.hash == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert found.record() == {"name": "protocol", "hash": found.hash, **found.canonical()}


def test_what_is_spelt_out_at_its_default_and_the_name_change_nothing():
    short = make({"evaluations": {"ridge": {}, "kmeans": {}}})
    spelt = make({
        "name": "other", "crop": 1, "temperature": 0.07, "checkpoint": "last", "k": [10, 20, 100, 200],
        "evaluations": {"kmeans": {"restarts": 3, "clusters": None}, "ridge": {"held_out": 0.1}},
    })  # fmt: skip
    assert short.hash == spelt.hash
    one, also_one = ({"evaluations": {"ridge": {"decays": decays}}} for decays in ([1, 0.1], [1.0, 0.1]))
    assert make(one).hash == make(also_one).hash


def test_whatever_changes_a_number_changes_the_hash():
    base = {"evaluations": {"knn": {}, "linear": {}}}
    changes = [
        {}, {"bank_split": "a"}, {"test_split": "a"}, {"resize": 64}, {"crop": 0.875}, {"labels": ["fine"]},
        {"k": [20]}, {"groups": "terciles"}, {"temperature": 0.1}, {"seed": 1}, {"checkpoint": 800},
        {"evaluations": {"knn": {}}}, {"evaluations": {"knn": {}, "linear": {"steps": 10}}},
    ]  # fmt: skip
    hashes = [make({**base, **change}).hash for change in changes]
    assert len(set(hashes)) == len(changes)
    assert all(len(h) == 12 and int(h, 16) >= 0 for h in hashes)


def test_a_new_default_in_the_code_changes_the_hash(monkeypatch):
    """Numbers of yesterday's code do not pass for today's."""
    found = make({"evaluations": {"knn": {}}})
    before = found.hash
    monkeypatch.setattr(protocol, "VERSION", protocol.VERSION + 1)
    assert found.hash != before


def test_training_has_the_protocol_of_its_configuration():
    config = toy_config()
    found = protocol.of_training(config)
    assert (found.k, found.temperature, found.labels) == (config.evals.knn_k, 0.07, config.evals.labels)
    assert (found.bank_split, found.test_split) == (config.data.train_split, config.data.test_split)
    assert list(found.chosen) == ["knn", "prototypes", "rank"]
    assert protocol.of_training(toy_config(evals__knn_k=(1,))).hash != found.hash
    assert protocol.of_training(toy_config(run__log_every=1)).hash == found.hash


# -------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", ["knn", "standard", "full", "imagenet"])
def test_built_in_protocols_load_and_have_hashes_of_their_own(name):
    found = protocol.load(name)
    assert found.name == name
    assert found.k == (10, 20, 100, 200)
    assert found.step is None
    assert set(protocol.built_in()) == {"knn", "standard", "full", "imagenet"}
    assert len({protocol.load(n).hash for n in protocol.built_in()}) == 4


def test_a_file_is_loaded_and_named_after_itself(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"k": [5], "checkpoint": 100, "evaluations": {"knn": {"clamp": true}}}')
    found = protocol.load(path)
    assert (found.name, found.k, found.step, found.chosen) == ("mine", (5,), 100, {"knn": {"clamp": True}})
    assert dataclasses.replace(found, checkpoint="last").hash != found.hash


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", ValueError, "not readable as JSON"),
        ("[1]", ValueError, "expected a JSON object"),
        ('{"ks": [1]}', ValueError, r"protocol.ks: no such key \(did you mean 'k'\?\)"),
        ('{"k": 20}', TypeError, "protocol.k: expected a tuple"),
        ('{"k": [0]}', ValueError, "protocol.k: expected positive numbers"),
        ('{"crop": 1.5}', ValueError, r"protocol.crop: expected a fraction in \(0, 1\]"),
        ('{"resize": 0}', ValueError, "protocol.resize: expected null or a number of pixels"),
        ('{"groups": "few"}', ValueError, "protocol.groups: expected one of 'inat', 'terciles', 'training:inat'"),
        ('{"temperature": 0}', ValueError, "protocol.temperature: expected a positive number"),
        ('{"seed": -1}', ValueError, "protocol.seed: expected a number >= 0"),
        ('{"checkpoint": "worst"}', ValueError, "protocol.checkpoint: expected 'last', 'best' or a step, got 'worst'"),
        ('{"evaluations": {}}', TypeError, "expected a non-empty mapping"),
        ('{"evaluations": {"knnn": {}}}', ValueError, r"unknown evaluation 'knnn' \(did you mean 'knn'\?\)"),
        ('{"evaluations": {"knn": {"k": 3}}}', ValueError, "evaluation 'knn' has no option 'k'"),
        ('{"evaluations": {"a": {"name": "knn"}}}', ValueError, "an evaluation is chosen by its key"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, content, error, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(error, match=message):
        protocol.load(path)


def test_names_and_files_that_do_not_exist():
    with pytest.raises(ValueError, match=r"unknown protocol 'standart' \(did you mean 'standard'\?\)"):
        protocol.load("standart")
    with pytest.raises(FileNotFoundError, match="no such protocol file"):
        protocol.load("elsewhere/mine.json")
    assert Protocol().chosen.keys() == {"knn", "prototypes", "rank"}


# --------------------------------------------------------------------------------------------------------- data
def write(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"")


def test_data_are_named_by_source_or_path(tmp_path):
    data = parse_data("synthetic:size=40,classes=4,side=16,test_split=train")
    assert dict(data.source.options) == {"size": 40, "classes": 4, "side": 16}
    assert (data.source.name, data.train_split, data.test_split, data.root) == ("synthetic", "train", "train", None)
    assert parse_data("tfds:cifar10").source.name == "tfds:cifar10"
    tfds = parse_data("tfds:cifar10/a:1.0.0:root=~/d,train_split=train[:9],test_split=all")
    assert (tfds.source.name, tfds.root, tfds.train_split) == ("tfds:cifar10/a:1.0.0", "~/d", "train[:9]")
    write(tmp_path / "classes" / "cat", "0.png")
    write(tmp_path / "loose", "0.png")
    for name, options in (("classes", {"canvas": 64}), ("loose", {"labels": "none", "canvas": 64})):
        data = parse_data(f"{tmp_path / name}:canvas=64")
        assert (data.source.name, data.root) == ("image_folder", str(tmp_path / name))
        assert dict(data.source.options) == options
        assert default_split(data) == "all"
    assert default_split(parse_data(f"{tmp_path / 'classes'}:holdout_fraction=0.5")) == "train"
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    data = parse_data(str(tmp_path / "a.npz"))
    assert registry.open_records(data.source.name, default_split(data), root=data.root).size == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "'nowhere' is neither a source .* nor the path of a folder"),
        ("synthetic:size=", "option 'size' has no value"),
        ("embeded:subset=a", "'embeded' is neither a source"),
    ],
)
def test_data_that_are_nothing_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_data(text)
