"""A frozen image tower in the step: its features are the cache's, its weights stay outside, crops are drawn there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from protojax import experiment, loading
from protojax import session as session_lib
from protojax import step as step_lib
from protojax.checkpoint import Checkpoints
from protojax.cli import main
from protojax.config import Component, Config, freeze
from protojax.data.views import ViewSpec
from protojax.workloads.prompts_towers import random_crops

from .models.pretrained_folder import SIDE, write_folder, write_photos
from .toy import config_dict

CLASSES = ("blue_cat", "green_pear", "red_apple")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three classes in three splits; one training picture is damaged, and one class has no picture for training."""
    root = write_photos(tmp_path_factory.mktemp("photos"), ("train", "val", "test"), CLASSES, 4)
    (root / "train" / "green_pear" / "1.png").write_bytes(b"not a picture")
    return root


def config(weights: Path, photos: Path, /, **options: Any) -> Config:
    c = freeze(config_dict("prompts_cars", "smoke"))
    given = {"weights": str(weights), "encode_batch": 8, **options}
    data = dataclasses.replace(c.data, source=Component("towers", given), root=str(photos))
    return dataclasses.replace(c, data=data, evals=dataclasses.replace(c.evals, batch_size=8))


def joined(recipe: Any, step: int = 0) -> dict[str, Any]:
    batch = step_lib.join(recipe.sources["train"].batch(step), recipe.constants)
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.filterwarnings("ignore:.*fewer than K")
def test_without_views_the_step_sees_the_features_of_the_one_pass(weights, photos):
    """Whatever stands between the files and the rows: a damaged picture, unseen classes, a draw of shots."""
    recipe = experiment.build(config(weights, photos, shots=2, unseen=0.4))
    batch = joined(recipe)
    assert batch["image"].shape == (8, SIDE, SIDE, 3)
    assert set(np.asarray(batch["label"]).tolist()) == {0, 1}
    inputs = jax.jit(recipe.views)(jax.random.key(0), batch)
    table = np.asarray(recipe.constants["features"])[np.asarray(batch["row"])]
    np.testing.assert_allclose(inputs["feature"], table, atol=2e-6)
    assert np.ptp(table, axis=0).max() > 0.01  # rows that were mixed up would be seen
    embeddings, _ = recipe.encoder.apply({}, inputs, True, None)
    np.testing.assert_allclose(embeddings["image"][0], table, atol=2e-6)
    rows = recipe.rows(inputs, batch, {})
    np.testing.assert_allclose(rows["features"], table, atol=2e-6)
    looked_up, _ = recipe.encoder.apply({}, recipe.plain_view(batch), False, None)
    np.testing.assert_array_equal(looked_up["image"][0], table)


def literals(text: str, array: np.ndarray) -> list[str]:
    """Constants of this shape in a compiled program, those of one repeated number left out."""
    shape = f"tensor<{'x'.join(map(str, array.shape))}xf32>"
    return [line for line in text.splitlines() if shape in line and ("dense<[" in line or 'dense<"' in line)]


@pytest.mark.filterwarnings("ignore:.*fewer than K")
def test_the_tower_is_an_argument_of_the_step_and_in_no_state(weights, photos, tmp_path):
    c = config(weights, photos, views="crops")
    recipe = experiment.build(c)
    session = session_lib.make_session(recipe, session_lib.Options(tmp_path, c.run, c.system, 1.0, {}))
    accumulator = step_lib.empty_accumulator(session.numbers)
    lowered = session.one.lower(session.shapes, accumulator, recipe.sources["train"].batch(0), session.constants)
    kernel = max(jax.tree.leaves(recipe.constants["tower"]), key=lambda leaf: leaf.size)
    assert not literals(lowered.as_text(), kernel)
    closed = jax.jit(lambda x: x @ jnp.asarray(kernel)).lower(jnp.zeros((1, len(kernel)), jnp.float32))
    assert literals(closed.as_text(), kernel)  # so a tower that is closed over would be seen
    assert [leaf.shape for leaf in jax.tree.leaves(session.shapes.params)] == [(3, 2, 16)]  # the offsets, and no more
    state = jax.jit(lambda b: step_lib.init_state(recipe, b))(joined(recipe))

    def loss(offsets, tower):
        batch = joined(recipe)
        batch["constants"] = {**batch["constants"], "tower": tower}
        params = jax.tree.map(lambda _: offsets, state.params)
        data = {"inputs": recipe.views(jax.random.key(0), batch), "teacher": {}, "batch": batch}
        return step_lib.loss_fn(recipe, params, state, state.estimator, data)[0]

    tower = jax.tree.map(jnp.asarray, recipe.constants["tower"])
    to_offsets, to_tower = jax.jit(jax.grad(loss, argnums=(0, 1)))(jax.tree.leaves(state.params)[0], tower)
    assert np.any(to_offsets)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(to_tower))


@pytest.mark.filterwarnings("ignore:.*fewer than K")
def test_crops_are_drawn_by_the_key_and_leave_plain_pictures_alone(weights, photos):
    """A picture of one colour is its own crop: crops and whole pictures go through one normalisation."""
    recipe, whole = (experiment.build(config(weights, photos, views=v)) for v in ("crops", "none"))
    batch = joined(recipe)
    look = jax.jit(lambda key, batch: recipe.views(key, batch)["feature"])
    first, again, other = (look(jax.random.key(k), batch) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(first, axis=1), 1.0, rtol=1e-5)
    colours = jnp.asarray(np.random.default_rng(1).integers(0, 256, (8, 1, 1, 3)), jnp.uint8)
    plain = {**batch, "image": jnp.broadcast_to(colours, (8, SIDE, SIDE, 3))}
    unseen = jax.jit(lambda batch: whole.views(jax.random.key(0), batch)["feature"])(plain)
    np.testing.assert_allclose(look(jax.random.key(2), plain), unseen, atol=1e-5)


def test_a_crop_of_everything_is_the_picture_or_its_mirror():
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (16, 12, 12, 3)), jnp.uint8)
    spec = ViewSpec(12, 1, (1.0, 1.0), ratio=(1.0, 1.0), jitter_probability=0.0, grey_probability=0.0)
    found, levels = np.asarray(random_crops(jax.random.key(0), spec, images)), np.asarray(images, np.float32)
    same, mirrored = (np.abs(found - other).max(axis=(1, 2, 3)) < 1e-3 for other in (levels, levels[:, :, ::-1]))
    assert (same | mirrored).all()
    assert same.any()
    assert mirrored.any()


def test_one_command_trains_on_a_folder_and_keeps_the_best_state(weights, photos, tmp_path, capsys):
    source = {"name": "towers", "weights": str(weights), "encode_batch": 8, "views": "crops"}
    arguments = ["--config=prompts_cars:smoke", f"--workdir={tmp_path}", f"--config.data.root={photos}",
                 f"--config.data.source={source}", "--config.evals.batch_size=8", "--config.evals.every=0.5",
                 "--config.run.progress=False", "--config.run.tensorboard=False"]  # fmt: skip
    assert main(["train", *arguments]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"]: r["metrics"]["prompts"] for r in lines if r["kind"] == "eval"}
    assert list(found) == [0, 1, 2]
    assert summary["prompts"]["accuracy"] == found[2]["accuracy"]  # what is published is the last
    best = max((1, 2), key=lambda step: found[step]["validation"]["top1"])
    assert summary["best"] == {"metric": "prompts/validation/top1", "step": best,
                               "value": found[best]["validation"]["top1"]}  # fmt: skip
    held = Checkpoints(tmp_path / "best", read_only=True)
    assert held.steps() == [best]
    assert not [name for name in held.record(best)["checksums"] if "tower" in name]
    held.close()
    model = loading.load(tmp_path, "best")
    assert model.prompts.shape == (3, 2, 16)
    capsys.readouterr()
    assert main(["eval", str(tmp_path), "--step=best", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["step"] == best
    assert again["prompts"]["validation"]["top1"] == found[best]["validation"]["top1"]
    assert main(["eval", str(tmp_path), "--step=worst"]) == 2
    assert "checkpoint: expected 'last', 'best' or a step, got 'worst'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": ""}, r"needs data.source.weights, a folder of CLIP or SigLIP, and data.root"),
        ({"views": "crop"}, r"data.source, views: expected one of .*did you mean 'crops'"),
        ({"base": "texts"}, r"data.source, base: expected one of .*did you mean 'text'"),
        ({"views": "crops", "crop_scale": (0.5, 0.2)}, r"scale must be \(low, high\)"),
        ({"templates": "none"}, "templates='none' leaves no texts; use base='class_mean'"),
        ({"splits": ("train",)}, "has no split 'test'"),
        ({"label": "coarse"}, "has no label 'coarse'"),
        ({"wieghts": "x"}, "no option 'wieghts' .did you mean 'weights'"),
    ],
)
def test_options_that_are_refused(weights, photos, options, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(config(weights, photos, **options))


@pytest.mark.filterwarnings("ignore:.*fewer than K")
def test_a_class_without_picture_is_left_out_and_a_picture_that_vanished_is_named(weights, tmp_path):
    rng = np.random.default_rng(3)
    for split, names in (("train", CLASSES[1:]), ("test", CLASSES)):
        for name in names:
            for i in range(4):
                file = tmp_path / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file)
    rows = "\n".join(f"{f.relative_to(tmp_path)},{f.parent.name},{f.parent.parent.name}"
                     for f in sorted(tmp_path.rglob("*.png")))  # fmt: skip
    (tmp_path / "photos.csv").write_text(f"path,label,split\n{rows}\n")
    with pytest.raises(ValueError, match=r"1 classes have no image in 'train', first \['blue_cat'\]"):
        experiment.build(config(weights, tmp_path / "photos.csv"))
    recipe = experiment.build(config(weights, tmp_path / "photos.csv", drop_empty_classes=True))
    assert recipe.best == ""  # no validation split, nothing to choose by
    assert recipe.sources["train"].spec.classes["label"] == CLASSES[1:]
    batch = joined(recipe)
    feature = jax.jit(recipe.views)(jax.random.key(0), batch)["feature"]
    np.testing.assert_allclose(feature, recipe.constants["features"][np.asarray(batch["row"])], atol=2e-6)
    (tmp_path / "train" / CLASSES[1] / "0.png").unlink()
    with pytest.raises(ValueError, match="1 pictures could be read when the run began and cannot now"):
        recipe.sources["train"].batch(0)
