"""The alignment workload on the one loop: its configurations, its failures before and in training, its use after."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from protojax import alignment_arms, experiment, running
from protojax import step as step_lib
from protojax.commands.search import search
from protojax.config import freeze
from protojax.loading import load
from protojax.workloads.alignment_loading import embed
from protojax.workloads.alignment_parts import decayed, position_codes
from tests.toy import config_dict

QUICK_ARMS = ("perceiver", "direct", "sigmoid", "prefix_single", "frozen_resampler")


def small(argument: str = "smoke", **changes):
    """The quickstart at smoke size, with changes by dotted key."""
    c = config_dict("alignment_quickstart", argument)
    with c.unlocked():
        for key, value in changes.items():
            *path, last = key.split("__")
            node = c
            for name in path:
                node = node[name]
            node[last] = value
    return c


def shapes_of_a_step(config):
    recipe = experiment.build(freeze(config))
    batch = recipe.sources["train"].batch(0)
    state = jax.eval_shape(lambda b: step_lib.init_state(recipe, b), batch)
    after, numbers, _ = jax.eval_shape(lambda s, b: step_lib.step(recipe, s, b), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    return recipe, state, numbers


# ---------------------------------------------------------------------------------------------- configurations
def check_arm(arm):
    recipe, state, numbers = shapes_of_a_step(small(f"{arm},smoke"))
    assert recipe.total_steps == 2
    assert recipe.teacher is None
    assert recipe.estimator is None
    names = {"loss/total", "loss/contrastive_full", "loss/prefix_objective", "loss/chance"}
    assert names | {f"loss/prefix_{d}" for d in (32, 16, 8)} <= set(numbers)
    assert ("loss/sampled_dim" in numbers) == (arm == "prefix_single")
    if arm == "perceiver":
        groups = recipe.subtrees(state.params)
        assert {"resampler/latents", "resampler/key_value", "resampler/layer0/query", "text_project/kernel"} <= set(
            groups
        )


@pytest.mark.parametrize("arm", QUICK_ARMS)
def test_arms_build_and_step(arm):
    check_arm(arm)


@pytest.mark.slow
@pytest.mark.parametrize("arm", sorted(set(alignment_arms.ARMS) - set(QUICK_ARMS)))
def test_every_other_arm_builds_and_steps(arm):
    check_arm(arm)


@pytest.mark.parametrize("name", ["bos", "constant_image", "shuffled_pairs", "lr_zero"])
def test_failure_configs_name_what_must_fire(name):
    path = Path(__file__).parent.parent / "configs" / "failures" / f"alignment_{name}.py"
    assert "\nFires: " in path.read_text()
    c = config_dict(f"failures/alignment_{name}", "smoke")
    assert c.arm in alignment_arms.ARMS
    assert freeze(c).method.workload == "alignment"


@pytest.mark.parametrize("argument", ["smoke", "patches,smoke"])
def test_emoji_configuration_builds(argument):
    recipe, _, _ = shapes_of_a_step(config_dict("alignment_emoji", argument))
    assert recipe.sources["train"].spec.size == 1523


def test_published_sizes_are_accepted_and_unsorted_widths_are_sorted():
    for name in ("alignment_pixmo", "alignment_coco", "alignment_folder"):
        assert freeze(config_dict(name, "")).method.alignment is not None
    with pytest.warns(UserWarning, match="were sorted to"):
        experiment.build(freeze(small(method__alignment__prefix_dims=(8, 32, 16))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method__alignment__text_pool": "bos"}, "sees only the start token"),
        ({"method__alignment__prefix_dims": (16, 8)}, "full width D = 32"),
        ({"method__alignment__image_path": "pool"}, "image_path must be one of"),
        ({"method__alignment__heads": 3}, "not a multiple of heads 3"),
        ({"method__alignment__temperature": 0.0}, "positive number"),
        ({"method__alignment__image_features": "conv"}, "holds image tokens"),
        ({"method__alignment__text_dropout": 1.0}, r"lie in \[0, 1\)"),
        ({"data__batch_size": 1}, "have no negatives: the loss is 0 by definition"),
        ({"method__optim__planned_fraction": 0.0}, r"planned_fraction must lie in \(0, 1\]"),
    ],
)
def test_what_is_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(ValueError, match=message):
        shapes_of_a_step(small(**changes))


def test_decay_reaches_kernels_alone():
    _, state, _ = shapes_of_a_step(small())
    flags = decayed(state.params)
    named = {
        jax.tree_util.keystr(p, simple=True, separator="/"): f for p, f in jax.tree_util.tree_leaves_with_path(flags)
    }
    off = {n.rsplit("/", 1)[-1] for n, f in named.items() if not f}
    on = {n.rsplit("/", 1)[-1] for n, f in named.items() if f}
    assert {"latents", "norm_scale", "norm_bias", "bias"} <= off
    assert on == {"kernel", "key_value"}
    codes = position_codes(4)
    assert codes.shape == (16, 16)
    assert len(np.unique(codes.round(5), axis=0)) == 16


def test_unclamped_cosine_rises_again_and_the_clamped_one_stays_at_zero():
    for arm, last in (("unclamped_cosine", True), ("perceiver", False)):
        c = small(f"{arm},smoke", method__steps=100)
        rate = experiment.build(freeze(c)).schedules["learning_rate"]
        assert (float(rate(np.int32(99))) > 1e-3) == last


# -------------------------------------------------------------------------------------------------- whole runs
TINY = {
    "data__source__preset": "easy", "data__source__size": 512, "data__source__test_size": 64, "data__batch_size": 32,
    "method__steps": 260, "method__alignment__num_latents": 8, "method__alignment__latent_width": 32,
    "evals__every": 0.5, "run__progress": False, "run__tensorboard": False, "run__log_every": 1,
}  # fmt: skip


def tiny(argument: str):
    return small(f"{argument},smoke", **TINY)


@pytest.mark.slow
def test_constant_text_stays_at_ln_batch_and_is_named_while_its_twin_learns(tmp_path: Path):
    summaries = {}
    for arm in ("bos_perceiver", "perceiver"):
        summaries[arm] = running.train_config(freeze(tiny(arm)), tmp_path / arm, say=lambda text: None)
    failed, learned = summaries["bos_perceiver"], summaries["perceiver"]
    records = [json.loads(line) for line in (tmp_path / "bos_perceiver" / "metrics.jsonl").read_text().splitlines()]
    late = [r["metrics"] for r in records if r["kind"] == "train"][-50:]
    for name in ("contrastive_full", "prefix_32", "prefix_16", "prefix_8"):
        assert np.mean([m[f"loss/{name}"] for m in late]) == pytest.approx(math.log(32), abs=1e-3)
    found = failed["alignment"]
    for side, d, k in (("i2t", "32", "1"), ("t2i", "8", "10"), ("i2t", "16", "5")):
        assert found[side][d]["recall"][k] == pytest.approx(found[side][d]["chance"][k], rel=1e-3)
    errors = {f["detector"] for f in failed["findings"] if f["severity"] == "error"}
    assert {"constant_side", "chance_loss"} <= errors
    assert learned["alignment"]["r1"]["32"] > 10 * learned["alignment"]["chance"]["1"]
    assert not [f for f in learned["findings"] if f["severity"] == "error"]
    assert "text embeddings" in (tmp_path / "bos_perceiver" / "report.html").read_text()


@pytest.mark.slow
def test_a_folder_with_captions_becomes_an_aligner_that_can_be_searched(tmp_path: Path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows, colours = ["path,caption"], {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220)}
    for i in range(60):
        name = list(colours)[i % 3]
        noise = np.random.default_rng(i).integers(-20, 20, (16, 16, 3))
        Image.fromarray(np.clip(np.asarray(colours[name]) + noise, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a {name} square number {i}")
    (folder / "captions.csv").write_text("\n".join(rows))
    c = config_dict("alignment_folder", "smoke")
    with c.unlocked():
        c.data.root, c.data.source.canvas, c.method.steps = str(folder), 16, 60
        c.method.alignment.image_size, c.method.alignment.tower_widths = 16, (8, 16, 16)
        c.run.progress = c.run.tensorboard = False
    workdir = tmp_path / "run"
    running.train_config(freeze(c), workdir, say=lambda text: None)
    assert "Nearest images to test captions" in (workdir / "report.html").read_text()
    encode = load(workdir)
    full, short = encode.encode_text(["a red square"]), encode.encode_text(["a red square"], 8)
    np.testing.assert_allclose(short[0], full[0, :8] / np.linalg.norm(full[0, :8]), atol=1e-6)
    images = np.zeros((3, 16, 16, 3), np.uint8)
    assert encode.encode(images, 16).shape == (3, 16)
    with pytest.raises(ValueError, match=r"trained the prefixes \[32, 16, 8\], got 12"):
        encode.encode(images, 12)
    with pytest.raises(TypeError, match="expected uint8"):
        encode.encode(images.astype(np.float32))
    said = embed(workdir, tmp_path / "all.npz", width=8)
    with np.load(tmp_path / "all.npz") as archive:
        assert archive["image"].shape[1] == archive["text"].shape[1] == 8
        np.testing.assert_allclose(np.linalg.norm(archive["text"], axis=1), 1.0, atol=1e-6)
    assert "captions" in said
    lines = search(workdir, "a red square", width=8, top=2)
    assert len(lines) == 6
    assert "nearest captions" in lines[0]
    assert "square number" in lines[1]
    assert search(workdir, str(folder / "0.png"), top=1)[2].startswith("nearest images")
    with pytest.raises(ValueError, match="--top must be at least 1"):
        search(workdir, "x", top=0)
