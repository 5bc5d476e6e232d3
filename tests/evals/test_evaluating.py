"""`protojax eval --protocol` and `protojax embed` on a checkpoint: the numbers are those of the evaluations on the
features, whatever the devices, and every record says how it was measured."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow import parquet

from protojax import cli, configs_path, evaluating, loading, measuring, metrics, protocol, summary, teaching
from protojax import step as step_lib
from protojax.api import SourceSpec
from protojax.audit.measure import measure
from protojax.checkpoint import Checkpoints
from protojax.commands import eval as eval_command
from protojax.config import freeze
from protojax.data import soft_labels
from protojax.data.records import from_arrays
from protojax.evals.geometry import alignment, lidar
from protojax.evals.knn import knn_accuracy
from tests.toy import toy_config, toy_recipe

SIZES = {"size": 96, "classes": 4, "side": 16}
DATA = "synthetic:size=96,classes=4,side=16"
PLAIN = {"name": "small", "k": [1, 5], "labels": ["fine"], "evaluations": {"knn": {}, "prototypes": {}, "rank": {}}}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run at step 0, without training: its configuration and one checkpoint."""
    config, path = toy_config(), tmp_path_factory.mktemp("run") / "run"
    recipe = toy_recipe()
    shapes = jax.eval_shape(lambda b: step_lib.init_state(recipe, b), recipe.sources["train"].batch(0))
    rng = np.random.default_rng(0)

    def some(where, leaf):  # nothing is compiled
        values = 0.3 * rng.standard_normal(leaf.shape) if leaf.ndim else 0
        positive = any(word in jax.tree_util.keystr(where) for word in ("stats", "estimator"))  # variances, masses
        return jnp.asarray(np.abs(values) if positive else values, leaf.dtype)

    state = jax.tree_util.tree_map_with_path(some, shapes)
    checkpoints = Checkpoints(path / "checkpoints")
    checkpoints.save(0, state, {})
    checkpoints.wait()
    checkpoints.close()
    metrics.write_json(path / "config.json", summary.dumps_config(config))
    return path


@pytest.fixture(scope="module")
def bank(workdir):
    """(features, spec) of the named data, once."""
    return evaluating.features(workdir, protocol.make(PLAIN), evaluating_data())[:2]


def test_the_audit_of_a_workdir_is_of_the_codebook_that_its_loss_sees(workdir, capsys):
    encode = loading.load(workdir)
    numbers, _ = measure(encode.prototypes.astype(np.float32))
    status, text = said(capsys, "audit", workdir / "checkpoints" / "0", "--json")
    result = json.loads(text)
    assert (status, result["format"], result["prototypes"]) == (0, "run of protojax", len(encode.prototypes))
    assert result["key"] == "codebook of quickstart_smoke, arm decoupled, step 0"
    assert {k: result[k] for k in ("unique", "duplicates")} == {k: numbers[k] for k in ("unique", "duplicates")}


def evaluating_data():
    from protojax.data.naming import parse_data

    return parse_data(DATA)


def said(capsys, *arguments) -> tuple[int, str]:
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def written(tmp_path, **changes):
    path = tmp_path / "small.json"
    path.write_text(json.dumps({**PLAIN, **changes}))
    return path


# --------------------------------------------------------------------------------------------------------- eval
def test_the_record_says_what_was_measured_and_the_numbers_are_those_of_the_features(workdir, bank, tmp_path, capsys):
    out = tmp_path / "record.json"
    file = written(tmp_path)
    status, text = said(capsys, "eval", workdir, f"--data={DATA}", f"--protocol={file}", f"--out={out}")
    assert status == 0, text
    record = json.loads(out.read_text())
    expected = protocol.load(file)
    assert record["protocol"] == expected.record()
    assert (record["run"]["step"], record["data"]["bank"]["size"]) == (0, 96)
    assert {r["protocol"] for r in record["results"].values()} == {expected.hash}
    assert list(record["results"]) == ["knn", "prototypes", "rank"]
    features, spec = bank
    test = evaluating.features(workdir, expected, evaluating_data(), "test")[0]
    accuracy, _ = knn_accuracy(
        features.backbone, features.labels["fine"], test.backbone, test.labels["fine"],
        num_classes=len(spec.classes["fine"]), ks=(1, 5),
    )  # fmt: skip
    assert record["results"]["knn"]["numbers"]["knn"]["fine"] == {str(k): v for k, v in accuracy.items()}
    assert list(record["results"]["prototypes"]["numbers"]["controls"]) == ["random_unique"]  # no step 0 of these data
    lines = [line for line in text.splitlines() if line.startswith("knn/fine/")]
    assert len(lines) == 2
    assert all(line.split()[-1] == expected.hash for line in lines)


def test_features_are_those_of_the_loaded_encoder(workdir, bank):
    """One device with any batch, or eight: equal to rounding."""
    from protojax.data.synthetic import open_synthetic

    images = open_synthetic("train", **SIZES).take(np.arange(96))["image"]
    encode = loading.load(workdir)
    np.testing.assert_allclose(bank[0].backbone, encode(images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bank[0].image, encode(images, "image"), rtol=1e-4, atol=1e-5)


def test_views_are_of_the_images_and_depend_on_the_seed_alone(workdir):
    found = protocol.make({**PLAIN, "evaluations": {"geometry": {"views": 3, "images": 40}}, "seed": 5})
    record = evaluating.evaluate(workdir, found, evaluating_data())
    numbers = record["results"]["geometry"]["numbers"]["geometry"]
    opened = evaluating.open_run(workdir, found)
    from protojax.data.synthetic import open_synthetic

    records = open_synthetic("train", **SIZES)
    once, again, other = (evaluating.view_bank(opened, records, 3, 40, seed).extra for seed in (5, 5, 6))
    assert once["views/image"].shape[:2] == (40, 3)
    np.testing.assert_array_equal(once["views/backbone"], again["views/backbone"])
    assert np.abs(once["views/backbone"] - other["views/backbone"]).max() > 1e-3
    assert np.abs(once["views/image"][:, 0] - once["views/image"][:, 2]).max() > 1e-3
    assert numbers["alignment"]["image"] == pytest.approx(alignment(once["views/image"]), rel=1e-6)
    assert numbers["lidar"]["backbone"] == pytest.approx(lidar(once["views/backbone"]), rel=1e-6)


def test_resize_and_crop_are_of_the_view_that_the_network_sees(workdir):
    image = np.zeros((8, 24, 24, 3), np.uint8)
    image[:, 6:18, 6:18] = 255  # the central square of half the side

    def view(change):
        return evaluating.open_run(workdir, protocol.make({**PLAIN, **change})).recipe.plain_view

    batch = {"image": image}
    sizes = [jax.eval_shape(view(c), batch)["global"].shape[2:4] for c in ({}, {"resize": 8}, {"crop": 0.5})]
    assert sizes == [(16, 16), (8, 8), (16, 16)]
    seen = np.asarray(jax.jit(view({"crop": 0.5, "resize": 12}))(batch)["global"])
    assert np.ptp(seen[..., 0]) == pytest.approx(0.0, abs=1e-5)  # nothing but the square


def test_transfer_learns_from_one_source_and_is_scored_on_the_shared_classes(workdir, tmp_path, capsys):
    """The other source names two more classes; what is left is the same images, so nearest neighbours agree."""
    file = written(tmp_path, evaluations={"knn": {}, "few_shot": {"shots": [1], "seeds": [0]}}, test_split="train")
    bank = DATA.replace("classes=4", "classes=6")
    status, text = said(capsys, "eval", workdir, f"--data={DATA}", f"--bank={bank}", f"--protocol={file}", "--json")
    assert status == 0, text
    record = json.loads(text)
    assert record["data"]["bank"]["classes"] == record["data"]["test"]["classes"] == {"fine": 4}
    assert set(record["results"]) == {"knn", "few_shot"}
    status, text = said(capsys, "eval", workdir, f"--data={DATA}", f"--bank={bank}", "--protocol=knn")
    assert status == 2
    assert "transfer needs one label key" in text


def test_groups_by_what_the_run_was_trained_on(monkeypatch):
    """By name: the bank numbers its classes in another order, and has one that the run never saw."""
    names, counts = ("pear", "apple", "fig"), (150, 3, 50)
    trained = from_arrays(
        "own",
        np.zeros((sum(counts), 2, 2, 3), np.uint8),
        {"fine": np.repeat(np.arange(3), counts)},
        {"fine": names},
    )
    monkeypatch.setattr(evaluating, "_records", lambda opened, data, split, role: trained)
    classes = {"fine": ("apple", "fig", "lime", "pear")}
    bank = SourceSpec("bank", 2000, 1, 1, {}, classes, {"fine": np.full(4, 500)})
    ask = lambda rule: {k: v.tolist() for k, v in evaluating._groups(None, bank, ("fine",), rule)["fine"].items()}  # noqa: E731
    assert ask("inat") == {"head": [0, 1, 2, 3], "medium": [], "tail": []}
    assert ask("training:inat") == {"head": [3], "medium": [1], "tail": [0, 2]}
    assert ask("training:terciles") == {"head": [1, 3], "medium": [0], "tail": [2]}
    with pytest.raises(ValueError, match=r"'training:inat': own, .* has no labels 'coarse', only"):
        evaluating._groups(None, bank, ("coarse",), "training:inat")


def test_a_measure_that_learns_from_another_source(workdir):
    """Its numbers are those of `evaluate` with that bank, the run's own test split scored."""
    plain = {**PLAIN, "groups": "training:terciles", "evaluations": {"knn": {}}}
    numbers = measuring.Evaluated("full", plain, bank="quickstart:smoke").take(workdir, None)
    config = freeze(configs_path.load("quickstart:smoke"))
    record = evaluating.evaluate(workdir, protocol.make(plain), None, config.data)
    assert numbers["data"] == {k: v["size"] for k, v in record["data"].items()}
    assert numbers["knn"] == record["results"]["knn"]["numbers"]["knn"]
    assert numbers["groups"] == record["results"]["knn"]["numbers"]["groups"]
    assert numbers["protocol"] == protocol.make(plain).hash != protocol.make(PLAIN).hash


def test_data_without_labels_leave_out_what_needs_them(workdir, tmp_path, capsys):
    np.savez(tmp_path / "plain.npz", train_images=np.zeros((8, 16, 16, 3), np.uint8),
             test_images=np.zeros((8, 16, 16, 3), np.uint8))  # fmt: skip
    file = written(tmp_path, labels=None)
    status, text = said(capsys, "eval", workdir, f"--data={tmp_path / 'plain.npz'}", f"--protocol={file}", "--json")
    assert status == 0, text
    record = json.loads(text)
    assert set(record["results"]) == {"prototypes", "rank"}
    assert record["skipped"] == {"knn": "needs labels, which the data have not"}
    assert "left out: knn" in eval_command.lines(record)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--protocol=nothing"], "unknown protocol 'nothing'"),
        (["--data=nowhere"], "neither a source"),
        ([f"--data={DATA},sides=3"], "has no option 'sides'; did you mean 'side'?"),
        ([f"--data={DATA}", "--protocol=knn"], "is larger than the bank of 96 rows"),
        ([f"--data={DATA}", "--protocol=knn", "--step=7"], "no checkpoint at step 7"),
    ],
)
def test_mistakes_end_in_one_line(workdir, capsys, arguments, message):
    status, text = said(capsys, "eval", workdir, *arguments)
    assert (status, text.count("\n")) == (2, 1)
    assert message in text


# -------------------------------------------------------------------------------------------------------- embed
def test_embed_writes_features_labels_positions_and_the_protocol(workdir, bank, tmp_path, capsys):
    features, spec = bank
    file = written(tmp_path)
    for suffix in ("npz", "parquet"):
        out = tmp_path / f"features.{suffix}"
        status, text = said(capsys, "embed", workdir, f"--data={DATA}", f"--protocol={file}", f"--out={out}")
        assert status == 0, text
        assert protocol.load(file).hash in text
    with np.load(tmp_path / "features.npz") as found:
        np.testing.assert_array_equal(found["backbone"], features.backbone)
        np.testing.assert_array_equal(found["labels_fine"], features.labels["fine"])
        np.testing.assert_array_equal(found["positions"], np.arange(96))
        assert tuple(found["classes_fine"]) == spec.classes["fine"]
        assert str(found["protocol"]) == protocol.load(file).hash
        assert json.loads(str(found["about"]))["step"] == 0
    table = parquet.read_table(tmp_path / "features.parquet")
    rows = np.stack(table["image"].to_numpy(zero_copy_only=False))
    np.testing.assert_array_equal(rows, features.image)
    np.testing.assert_array_equal(table["labels_fine"].to_numpy(), features.labels["fine"])
    about = table.schema.metadata
    assert about[b"protojax.protocol"].decode() == protocol.load(file).hash
    assert json.loads(about[b"protojax.classes_fine"]) == list(spec.classes["fine"])


@pytest.mark.parametrize(
    ("out", "hide", "message"),
    [
        ("features.csv", None, "expected a name that ends in .npz or .parquet"),
        ("no/such/features.npz", None, "make it first"),
        ("features.parquet", "pyarrow", "pip install pyarrow, or write --out=features.npz"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_anything_is_computed(
    tmp_path, capsys, monkeypatch, out, hide, message
):
    if hide:
        monkeypatch.setitem(sys.modules, hide, None)
    status, text = said(capsys, "embed", tmp_path / "no-run", f"--out={tmp_path / out}")
    assert status == 2
    assert message in text


# -------------------------------------------------------------------------------------------------------- teach
def test_beliefs_are_votes_without_the_row_itself():
    """Against enumeration, with duplicates of a row (which do vote) in front of it."""
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((30, 4))
    bank[20:26] = bank[3]
    labels = rng.integers(0, 3, 30)
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    found = teaching.beliefs(bank, labels, None, num_classes=3, k=4, temperature=0.5)
    for i in range(30):
        others = np.delete(np.arange(30), i)
        cosines = unit[others] @ unit[i]
        near = others[np.argsort(-np.round(cosines, 6), kind="stable")[:4]]
        votes = np.bincount(labels[near], np.exp(unit[near] @ unit[i] / 0.5), minlength=3)
        np.testing.assert_allclose(found[i], votes / votes.sum(), atol=1e-5, err_msg=str(i))
    with pytest.raises(ValueError, match="k = \\[30\\] is larger than the bank of 29 rows"):
        teaching.beliefs(bank, labels, None, num_classes=3, k=30)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        teaching.beliefs(bank, labels, bank, num_classes=3, temperature=0.0)


def test_a_checkpoint_writes_images_with_its_beliefs(workdir, tmp_path, capsys):
    out = tmp_path / "teacher.npz"
    status, text = said(capsys, "teach", workdir, f"--data={DATA}", "--k=3", f"--out={out}")
    assert status == 0, text
    assert "largest belief on the true class" in text
    splits = soft_labels.images(root=out)
    assert [splits[s].size for s in ("train", "val")] == [86, 10]
    target = splits["test"]
    np.testing.assert_allclose(target.targets.sum(axis=1), 1.0, atol=1e-6)
    assert target.images.dtype == np.uint8
    from protojax.data.synthetic import open_synthetic

    records = open_synthetic("test", **SIZES)
    np.testing.assert_array_equal(target.images, records.take(np.arange(records.size))["image"])
    assert target.categories == records.classes["fine"]
    status, text = said(capsys, "teach", workdir, f"--data={DATA}", "--label=genus", f"--out={out}")
    assert status == 2
    assert "has no labels 'genus'" in text
    status, text = said(capsys, "teach", workdir, f"--out={tmp_path / 'teacher.csv'}")
    assert status == 2
    assert "ends in .npz" in text
