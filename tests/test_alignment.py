"""The alignment workload on the one loop: its configurations, its failures before and in training, its use after."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from protojax import alignment_arms, experiment, running, train
from protojax import session as session_lib
from protojax import step as step_lib
from protojax.api import FeatureBank, Probe
from protojax.commands.search import search
from protojax.config import freeze
from protojax.data.pairs import Pairs, Texts, image_content
from protojax.data.pairs_text import hashed_texts
from protojax.evals.alignment import alignment_evaluation
from protojax.loading import load
from protojax.workloads import alignment_parts as parts
from protojax.workloads.alignment_loading import embed
from protojax.workloads.alignment_parts import decayed, position_codes
from tests.data.test_pairs import nlvr
from tests.toy import config_dict

QUICK_ARMS = ("perceiver", "direct", "sigmoid", "prefix_single", "shared_resampler")


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
    assert ("loss/sampled_dim" in numbers) == (arm in ("prefix_single", "original"))
    if arm == "perceiver":
        groups = recipe.subtrees(state.params)
        wanted = {"resampler/latents", "resampler/key_value", "resampler/layer0/query/kernel", "text_project/kernel"}
        assert wanted <= set(groups)
        # Every leaf by itself: one without a gradient is named, and not hidden by its neighbours.
        assert len(groups) == len(jax.tree.leaves(state.params))


@pytest.mark.parametrize("arm", QUICK_ARMS)
def test_arms_build_and_step(arm):
    check_arm(arm)


@pytest.mark.slow
@pytest.mark.parametrize("arm", sorted(set(alignment_arms.ARMS) - set(QUICK_ARMS)))
def test_every_other_arm_builds_and_steps(arm):
    check_arm(arm)


@pytest.mark.parametrize("name", ["bos", "constant_image", "shuffled_pairs", "lr_zero", "prefix_order"])
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


def test_pictures_come_with_the_evaluations_that_their_texts_allow(tmp_path: Path):
    recipe, _, _ = shapes_of_a_step(config_dict("alignment_pictures", "smoke"))
    assert set(recipe.sources) == {"train", "test", "classes", "class_names"}
    assert recipe.sources["classes"].spec.size == 81
    c = config_dict("alignment_pictures", "nlvr,smoke")
    with c.unlocked():
        c.data.root = str(nlvr(tmp_path / "nlvr.npz", count=90))
    recipe, _, _ = shapes_of_a_step(c)
    assert set(recipe.sources) == {"train", "test", "dev_matching", "test_matching"}
    assert recipe.sources["test_matching"].spec.classes["true"] == ("false", "true")
    assert set(experiment.build(freeze(small())).sources) == {"train", "test", "bank"}
    assert freeze(config_dict("alignment_pictures", "tiles")).data.source.name == "pairs_npz"
    with pytest.raises(ValueError, match="choose one of grocery, tiles, nlvr, got tiles, nlvr"):
        config_dict("alignment_pictures", "tiles,nlvr")


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
        ({"method__alignment__shared_resampler": True, "method__alignment__image_path": "direct"}, "got 'direct'"),
        (
            {"method__alignment__shared_resampler": True, "method__alignment__text_pool": "unmasked_mean"},
            "text_pool='unmasked_mean' has no meaning with it",
        ),
        ({"data__batch_size": 1}, "have no negatives: the loss is 0 by definition"),
        ({"method__optim__planned_fraction": 0.0}, r"planned_fraction must lie in \(0, 1\]"),
    ],
)
def test_what_is_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(ValueError, match=message):
        shapes_of_a_step(small(**changes))


def captioned(texts: Texts, caption=None) -> Pairs:
    shapes, read = image_content(np.zeros((3, 8, 8, 3), np.uint8), "three")
    rows = tuple(np.asarray([i], np.int32) for i in (caption or range(3)))
    return Pairs("three", 3, shapes, read, rows, texts)


def test_texts_that_are_refused_before_training():
    settings = parts.aligner()
    cut = hashed_texts(["one two three", "one", "two"], longest=4)
    with pytest.warns(UserWarning, match=r"1 of 3 captions were cut .* \(their end token is kept\)"):
        parts.check_text(captioned(cut), settings)
    pools = {pool: rows for pool, rows in cut.pooled.items() if pool != "eos"}
    with pytest.raises(ValueError, match=r"no text states pooled by 'eos'; it has \['bos', .* needs text_eos beside"):
        parts.check_text(captioned(cut._replace(pooled=pools, cut=0)), settings)
    ids = np.asarray([[1, 5, 2], [1, 9, 2], [1, 4, 2]], np.int32)
    tokens = Texts(("a", "b", "c"), {}, True, "bpe-00-3-9", ids=ids, mask=np.ones((3, 3), bool))
    with pytest.raises(ValueError, match=r"must lie in 0\.\.8 \(the vocabulary\); 1 captions .* caption 1 with id 9"):
        parts.check_text(captioned(tokens), settings)
    blank = np.arange(3)[:, None] + np.zeros((1, 3)) < 2
    with pytest.raises(ValueError, match=r"1 captions hold padding alone, the first are \[2\]"):
        parts.check_text(captioned(tokens._replace(ids=np.minimum(ids, 8), mask=blank)), settings)
    with pytest.raises(ValueError, match="three has one distinct caption: the contrastive loss is 0 by definition"):
        parts.check_batch(captioned(cut, caption=[1, 1, 1]), 2)
    with pytest.raises(ValueError, match="texts come from two towers or pools: 'clip-1' and 'clip-2'"):
        parts.check_same_tower("clip-1", "clip-2", "training and test texts")


def test_an_empty_caption_is_its_start_and_end_and_nobodys_negative():
    ids = jnp.asarray([[1, 7, 8, 2, 0], [1, 9, 2, 0, 0]], jnp.int32)
    mask, own = ids > 0, {"caption_id": jnp.asarray([3, 4], jnp.int32)}
    # A rate of 1 is no configuration: here it drops every caption.
    out = parts.empty_some(jax.random.key(0), own | {"text_ids": ids, "text_mask": mask}, 1.0, None)
    np.testing.assert_array_equal(out["text_mask"], [[True, True, False, False, False]] * 2)
    np.testing.assert_array_equal(out["text_ids"][:, :2], [[1, 2]] * 2)
    assert int(out["caption_id"][0]) == int(out["caption_id"][1])
    kept = parts.empty_some(jax.random.key(0), own | {"text_ids": ids, "text_mask": mask}, 0.0, None)
    np.testing.assert_array_equal(kept["text_ids"], ids)
    np.testing.assert_array_equal(kept["text_mask"], mask)
    states = parts.empty_some(
        jax.random.key(0), own | {"text_states": jnp.ones((2, 5, 3)), "text_mask": mask}, 1.0, None
    )
    np.testing.assert_array_equal(states["text_mask"], [[True, False, False, False, False]] * 2)
    texts = hashed_texts(["a red apple", "a green apple"])
    pooled = parts.empty_some(
        jax.random.key(0), own | {"text": jnp.asarray(texts.pooled["eos"])}, 1.0, texts.empty["eos"]
    )
    np.testing.assert_array_equal(pooled["text"], np.stack([texts.empty["eos"]] * 2))


# ------------------------------------------------------------------------------------------------- evaluations
def known_bank(size: int, labels=None, seed: int = 0) -> FeatureBank:
    """Images and texts of one content [size,4]: text is the image, but for what the label 'true' denies."""
    content = np.random.default_rng(seed).normal(size=(size, 4)).astype(np.float32)
    labels = labels or {}
    text = np.where(labels["true"][:, None] == 1, content, -content) if "true" in labels else content
    ids = np.arange(size)
    return FeatureBank(np.zeros((size, 0), np.float32), content, labels, ids,
                       {"text": text, "caption_id": ids, "image_id": ids})  # fmt: skip


def test_what_is_evaluated_follows_the_data():
    truth = np.arange(10) % 2
    banks = {"test": known_bank(8, {"fine": np.arange(8)}), "classes": known_bank(8), "bank": known_bank(40, seed=1),
             "dev_matching": known_bank(10, {"true": truth}, 2),
             "test_matching": known_bank(10, {"true": truth}, 3)}  # fmt: skip
    factors = {name: 2.0 * banks[name].image for name in ("bank", "test")}
    options = {"widths": (4, 2), "temperature": 0.5, "batch": 4, "steps": 10, "epochs": 2.0}

    def found(step: int, splits=(), factors=None):
        evaluation = alignment_evaluation(splits=splits, factors=factors, **options)
        probe = Probe(step, banks.__getitem__, {}, None, {}, {})
        return evaluation.run(probe, jax.random.key(0))["alignment"]

    plain, whole = found(5), found(10, tuple(banks), factors)
    assert plain["r1"]["4"] == 1.0
    assert plain["epoch"] == 1.0
    assert not {"zero_shot", "zero_shot_names", "matching", "factors"} & set(plain)
    assert whole["zero_shot"]["accuracy"]["4"] == 1.0  # the texts of the classes are the images' own
    assert whole["matching"]["accuracy"]["4"] == whole["matching"]["auc"]["2"] == 1.0
    assert whole["factors"]["r2"] == pytest.approx(1.0, abs=1e-6)
    assert "factors" in found(0, tuple(banks), factors)
    assert "factors" not in found(5, tuple(banks), factors)
    assert set(whole["text"]["smallest_std"]) == {"4", "2"}
    lossy = whole["loss"]
    assert lossy["above_chance_2"] == pytest.approx(lossy["prefix_2"] - lossy["chance"])


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


@pytest.mark.slow
def test_one_resampler_for_both_sides_is_trained_embedded_and_searched(tmp_path: Path):
    c = config_dict("alignment_emoji", "shared_resampler,smoke")
    with c.unlocked():
        c.run.progress = c.run.tensorboard = False
    workdir = tmp_path / "run"
    running.train_config(freeze(c), workdir, say=lambda text: None)
    assert "Kept by prefix" in (workdir / "report.html").read_text()
    encode = load(workdir)
    red = encode.encode_text(["a red apple"])
    # Padding to another length changes nothing.
    np.testing.assert_allclose(
        encode.encode_text(["a red apple", "a much longer caption of a thing"])[:1], red, atol=1e-5
    )
    embed(workdir, tmp_path / "all.npz", width=16)
    with np.load(tmp_path / "all.npz") as archive:
        row = archive["captions"].tolist().index("red apple") if "red apple" in archive["captions"] else 0
        name = str(archive["captions"][row])
        np.testing.assert_allclose(encode.encode_text([name], 16)[0], archive["text"][row], atol=1e-5)
    assert len(search(workdir, "apple", top=1)) == 4
    with pytest.raises(ValueError, match="reads every position of a caption"):
        encode.encode_states(np.zeros((1, 256)))
    with pytest.raises(ValueError, match="come from two towers or pools: 'hashed-128-77' and 'other'"):
        encode.encode_texts(hashed_texts(["red apple"])._replace(fingerprint="other"))


@pytest.mark.slow
def test_a_run_that_broke_off_and_was_resumed_has_the_same_losses(tmp_path: Path):
    config = freeze(small("perceiver,smoke", **(TINY | {"method__steps": 8, "run__checkpoint_every": 0.25,
                                                        "run__report": False})))  # fmt: skip

    def losses(workdir: Path) -> dict[int, float]:
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return {r["step"]: r["metrics"]["loss/total"] for r in lines if r["kind"] == "train"}

    running.train_config(config, tmp_path / "whole", say=lambda text: None)
    recipe = experiment.build(config)
    batch = recipe.sources["train"].batch

    def failing(step):
        if step == 5:
            raise OSError("disk gone")
        return batch(step)

    sources = {**recipe.sources, "train": recipe.sources["train"]._replace(batch=failing)}
    options = session_lib.Options(tmp_path / "broken", config.run, dataclasses.replace(config.system, prefetch=0),
                            config.evals.every, running.fingerprint(config), say=lambda text: None)  # fmt: skip
    with pytest.raises(OSError, match="disk gone"):
        train.run(recipe._replace(sources=sources), options)
    running.train_config(config, tmp_path / "broken", say=lambda text: None)
    assert len(losses(tmp_path / "whole")) == 8
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
