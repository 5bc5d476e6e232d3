"""CLIP and SigLIP without PyTorch: what their texts and files must satisfy, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from protojax.models.pretrained.config import read_config
from protojax.models.pretrained.networks import logits, pooled_position
from protojax.towers import load
from protojax.towers.pictures import open_preprocessing
from protojax.towers.texts import canonical, open_tokeniser
from protojax.towers.weights import open_weights

from .pretrained_folder import (
    FOLDER,
    LENGTH,
    REFERENCES,
    SIDE,
    config_of,
    random_tensors,
    reference_inputs,
    write_folder,
    write_safetensors,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("clip")), batch_size=8)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return load(write_folder(tmp_path_factory.mktemp("siglip"), "siglip"), batch_size=8)


def states(towers, ids, mask=None):
    found, _ = jax.jit(towers.text.apply)(towers.variables["text"], np.asarray(ids, np.int32), mask)
    return np.asarray(found["embedding"])


# ------------------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("name", REFERENCES)
def test_towers_give_what_transformers_gave(tmp_path, name):
    """Stored outputs of transformers in float64; ours are float32 at full precision."""
    kind, eos = REFERENCES[name]
    towers = load(write_folder(tmp_path, kind, text={"eos_token_id": eos}))
    images, ids, mask = reference_inputs()
    with np.load(FOLDER / "pretrained.npz") as stored:
        expected = {key.split("/", 1)[1]: stored[key] for key in stored.files if key.split("/")[0] == name}
    image = jax.jit(towers.image.apply)(towers.variables["image"], images)[0]["embedding"]
    np.testing.assert_allclose(unit(image), expected["bare/image_embeds"], atol=1e-5)
    for part, given in (("bare", None), ("masked", mask)):
        text = states(towers, ids, given)
        np.testing.assert_allclose(unit(text), expected[f"{part}/text_embeds"], atol=1e-5)
        np.testing.assert_allclose(towers.logits(image, text), expected[f"{part}/logits_per_image"], atol=1e-4)


def unit(rows):
    return np.asarray(rows) / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_features_are_unit_and_no_row_depends_on_the_batch_around_it(clip, siglip):
    for towers in (clip, siglip):
        together = towers.encode_images(PIXELS)
        assert together.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
        np.testing.assert_allclose(towers.encode_images(PIXELS[1:2]), together[1:2], atol=1e-6)
        texts = towers.encode_texts(["a red apple", "a green pear"])
        np.testing.assert_allclose(towers.encode_texts(["a green pear"]), texts[1:], atol=1e-6)
        assert np.abs(texts[0] - texts[1]).max() > 1e-2


def test_a_clip_text_is_what_stands_before_its_end(clip):
    """Whatever follows the end token, masked or not, changes nothing; what stands before it does."""
    ids = np.zeros((2, LENGTH), np.int32)
    ids[:, :4] = [[13, 3, 6, 39], [13, 4, 6, 39]]
    other = np.where(np.arange(LENGTH)[None] > 3, 7, ids)
    mask = np.arange(LENGTH)[None] <= np.asarray([[3], [3]])
    np.testing.assert_allclose(states(clip, other), states(clip, ids), atol=1e-5)
    np.testing.assert_allclose(states(clip, ids, mask), states(clip, ids), atol=1e-5)
    assert np.abs(states(clip, ids)[0] - states(clip, ids)[1]).max() > 1e-2


def test_siglip_sees_both_ways_and_its_mask_hides_padding(siglip):
    ids = np.full((1, LENGTH), 39, np.int32)
    ids[0, :3] = [0, 3, 6]
    later = ids.copy()
    later[0, 7] = 5
    mask = np.arange(LENGTH)[None] < 4
    assert np.abs(states(siglip, ids) - states(siglip, later)).max() > 1e-3
    np.testing.assert_allclose(states(siglip, later, mask), states(siglip, ids, mask), atol=1e-5)


def test_the_position_that_speaks():
    ids = jnp.asarray([[5, 9, 2, 9, 0], [1, 2, 3, 4, 9]])
    assert pooled_position(ids, "eos", 9).tolist() == [1, 4]
    assert pooled_position(ids, "eos", 2).tolist() == [2, 1]
    assert pooled_position(ids, "argmax", 0).tolist() == [1, 4]
    assert pooled_position(ids, "last", 0).tolist() == [4, 4]
    assert read_config(config_of("clip", text={"eos_token_id": 2})).text.pool == "argmax"
    assert read_config(config_of("clip")).text[3:] == ("eos", 39)


def test_logits_are_scaled_cosines_with_a_bias(siglip):
    image, text = (np.asarray(rows, np.float32) for rows in ([[3.0, 4.0]], [[6.0, 8.0], [-4.0, 3.0]]))
    np.testing.assert_allclose(logits(image, text, np.log(10.0), -2.0), [[8.0, -2.0]], atol=1e-5)
    scale, bias = (float(siglip.variables[k]) for k in ("logit_scale", "logit_bias"))
    found = siglip.logits(siglip.encode_images(PIXELS), siglip.encode_texts(["a cat"]))
    assert found.shape == (3, 1)
    assert np.all(np.abs(found - bias) <= np.exp(scale) * (1 + 1e-5))


def test_the_gradient_reaches_every_parameter(siglip):
    """Towers may be tuned: nothing in them stops a gradient."""

    def loss(variables):
        found, _ = siglip.image.apply(variables, jnp.asarray(PIXELS, jnp.float32) / 255)
        return jnp.square(found["embedding"]).sum()

    gradient = jax.jit(jax.grad(loss))(siglip.variables["image"])["params"]
    dead = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.any(g)]
    assert not dead


# ---------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize(("dtype", "near"), [("F16", 2e-3), ("BF16", 1e-2)])
def test_half_precision_is_read_as_float32(tmp_path, dtype, near):
    whole = open_weights(write_folder(tmp_path / "whole"))
    half = open_weights(write_folder(tmp_path / "half", dtype=dtype))
    for a, b in zip(jax.tree.leaves(whole.variables), jax.tree.leaves(half.variables), strict=True):
        assert b.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=near, atol=1e-6)
    assert half.digest != whole.digest


def test_shards_are_one_model(tmp_path):
    whole = open_weights(write_folder(tmp_path))
    tensors = list(random_tensors(config_of("clip")).items())
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, (name, _) in enumerate(tensors)}
    (tmp_path / "model.safetensors").unlink()
    for file in set(files.values()):
        write_safetensors(tmp_path / file, {name: value for name, value in tensors if files[name] == file})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert open_weights(tmp_path).digest == whole.digest
    name = tensors[3][0]
    index.write_text(json.dumps({"weight_map": files | {name: files[tensors[2][0]]}}))
    with pytest.raises(ValueError, match=f"lacks {name}, which model.safetensors.index.json places there"):
        open_weights(tmp_path)
    (tmp_path / files[name]).unlink()
    with pytest.raises(ValueError, match="which is missing: download all shards"):
        open_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {name: "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="no file of this folder"):
        open_weights(tmp_path)


def rewrite(folder: Path, change) -> None:
    tensors = random_tensors(config_of("clip"))
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"holds no config\.json; it holds model\.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "bert"}'),
            "model_type is 'bert', expected 'clip' or",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"holds no weights: expected model\.safetensors"),
        (cut, "is cut off"),
        (lambda f: rewrite(f, lambda t: t.pop("logit_scale")), "1 tensors are missing: logit_scale"),
        (lambda f: rewrite(f, lambda t: t.update(classifier=np.ones(2))), "1 tensors have no place: classifier"),
        (
            lambda f: rewrite(f, lambda t: t.update({"text_projection.weight": np.ones((8, 16))})),
            r"text_projection\.weight has shape \[8, 16\], expected \[16, 16\]",
        ),
        (
            lambda f: write_safetensors(f / "model.safetensors", random_tensors(config_of("siglip"))),
            r"not those of this config\.json \(clip\): .* missing: .*; .* no place: logit_bias",
        ),
        (
            lambda f: write_safetensors(f / "model.safetensors", random_tensors(config_of("clip")), "I8"),
            "expected floating-point numbers",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, spoil, message):
    spoil(write_folder(tmp_path))
    with pytest.raises(ValueError, match=message):
        open_weights(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist; expected a folder that holds config\.json"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        load(write_folder(tmp_path / "there"), dtype="int8")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        load(tmp_path / "file")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("clip", {"text": {"hidden_act": "relu6"}}, "hidden_act 'relu6' is unknown; known: quick_gelu"),
        ("clip", {"text": {"hidden_size": 15}}, "hidden_size 15 is no multiple of num_attention_heads 2"),
        ("clip", {"text": {"eos_token_id": [1, 2]}}, r"eos_token_id must be one integer, got \[1, 2\]"),
        ("clip", {"vision": {"image_size": [16, 24]}}, "image_size must be a positive integer"),
        ("clip", {"vision": {"layer_norm_eps": 0}}, "layer_norm_eps must be a positive number, got 0"),
        ("clip", {"projection_dim": None}, "projection_dim must be a positive integer, got None"),
        ("siglip", {"vision": {"vision_use_head": False}}, "this model has no image embedding"),
        ("siglip", {"text": {"projection_size": 8}}, "texts are projected to 8 numbers and images have 16"),
        ("siglip", {"text_config": 3}, "text_config must be an object, got int"),
    ],
)
def test_configs_that_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(config_of(kind, **changes))


# -------------------------------------------------------------------------------------------- texts and images
def test_texts_are_cut_but_keep_their_end(clip, siglip):
    for towers, first in ((clip, [13]), (siglip, [])):
        found = towers.tokeniser(["red", "Red, " * 20])
        assert found.ids[0, : len(first) + 2].tolist() == [*first, 3, 39]
        assert found.ids[1, -1] == 39
        assert found.mask.sum(axis=1).tolist() == [len(first) + 2, LENGTH]
        assert found.cut == 1
        with pytest.raises(ValueError, match="at least one string, none of them blank"):
            towers.tokeniser(["red", " "])
    assert canonical("  The\tRed, red Apple\u2581(ripe)! ") == "the red red apple ripe"


def test_siglip_is_given_its_mask_only_where_its_files_say_so(siglip):
    """It was trained without; a tokenizer_config.json with attention_mask in model_input_names asks for it."""
    assert not siglip.tokeniser.masked
    (siglip.folder / "tokenizer_config.json").write_text('{"model_input_names": ["input_ids", "attention_mask"]}')
    asked = open_tokeniser(siglip.folder, siglip.config)
    (siglip.folder / "tokenizer_config.json").unlink()
    assert asked.masked
    assert asked.digest != siglip.tokeniser.digest


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        (
            "clip",
            lambda f: (f / "tokenizer.json").unlink(),
            r"expected tokenizer\.json, or vocab\.json and merges\.txt",
        ),
        ("clip", lambda f: (f / "tokenizer.json").write_text("{}"), r"is not a tokenizer\.json"),
        ("siglip", lambda f: (f / "tokenizer.json").unlink(), r"expected tokenizer\.json or spiece\.model"),
        (
            "siglip",
            lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}'),
            "names 'GemmaTokenizer', expected SiglipTokenizer for model_type 'siglip'",
        ),
        (
            "clip",
            lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": {"content": "cat"}}'),
            "ends texts with id 10, config.json pools at eos_token_id 39",
        ),
        (
            "clip",
            lambda f: (f / "special_tokens_map.json").write_text('{"pad_token": "!"}'),
            "has none of the marks !",
        ),
    ],
)
def test_tokenizers_that_are_refused(tmp_path, kind, spoil, message):
    write_folder(tmp_path, kind)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_tokeniser(tmp_path, read_config(config_of(kind)))


def test_a_sentencepiece_model_without_its_package(tmp_path, monkeypatch):
    write_folder(tmp_path, "siglip")
    (tmp_path / "tokenizer.json").rename(tmp_path / "spiece.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ValueError, match=r"needs the package 'sentencepiece': pip install .* or put the tokenizer\.json"
    ):
        open_tokeniser(tmp_path, read_config(config_of("siglip")))


def test_a_text_beyond_the_positions_is_refused(clip):
    with pytest.raises(ValueError, match=f"texts of {LENGTH + 1} tokens, this tower reads at most {LENGTH}"):
        jax.eval_shape(clip.text.apply, clip.variables["text"], jnp.zeros((1, LENGTH + 1), jnp.int32))


def test_an_image_of_the_right_size_is_only_normalised(clip):
    """(pixel / 255 - mean) / std with CLIP's numbers where the file names none."""
    preprocessing = clip.preprocessing
    np.testing.assert_array_equal(preprocessing.fit(Image.fromarray(PIXELS[0])), PIXELS[0])
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    expected = (PIXELS / 255.0 - np.asarray(mean)) / np.asarray(std)
    np.testing.assert_allclose(preprocessing.normalise(jnp.asarray(PIXELS)), expected, atol=1e-6)
    assert preprocessing.fit(Image.new("RGBA", (40, 20))).tolist() == np.full((SIDE, SIDE, 3), 255).tolist()
    with pytest.raises(TypeError, match=r"expected uint8 \[N,16,16,3\], got float64"):
        clip.encode_images(PIXELS / 255.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, r"holds no preprocessor_config\.json"),
        ({"crop_size": 24}, "makes images of 24 x 24 pixels, the tower of config.json reads 16 x 16"),
        ({"do_center_crop": False}, "makes images of their own size"),
        ({"size": {"longest_edge": 9}}, "size must be pixels, {'shortest_edge': pixels} or"),
        ({"resample": 9}, "resample 9 is none of Pillow's"),
        ({"image_std": [1.0, 0.0, 1.0]}, "image_std must be positive"),
        ({"image_mean": [1.0]}, "image_mean must be a number or three of them"),
    ],
)
def test_preprocessings_that_are_refused(tmp_path, changes, message):
    if changes is not None:
        given = {"size": SIDE, "crop_size": SIDE, **changes}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        open_preprocessing(tmp_path, "clip", SIDE)


def test_files_of_version_5_nest_the_preprocessing(tmp_path):
    given = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    flat = open_preprocessing(tmp_path, "clip", SIDE)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": given}))
    assert open_preprocessing(tmp_path, "clip", SIDE) == flat
    assert flat.digest != flat._replace(resample=2).digest
