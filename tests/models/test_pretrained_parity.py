"""CLIP and SigLIP from a folder give what `transformers` gives from it: embeddings, logits, pixels, tokens, configs.

Weights are random and small, made and saved by transformers itself. Needs the extra `parity`.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from PIL import Image

from protojax.models.pretrained.config import read_config
from protojax.towers import load
from protojax.towers.pictures import open_preprocessing
from protojax.towers.texts import open_tokeniser
from protojax.towers.weights import open_weights

pytestmark = pytest.mark.parity

# float32 through a dozen products of width 32, values of order 1
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CLIP_VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
               "image_size": 27, "patch_size": 8}  # fmt: skip
CLIP_TEXT = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2,
             "vocab_size": 60, "max_position_embeddings": 12}  # fmt: skip
WORDS = ["a photo of a cat", "A dog's  tail, wagging!", "naïve café 2024 — ünïcode", "x", "a cat " * 12]


def torch_model(kind: str, folder: Path, text=(), vision=(), **top):
    """A random model of transformers, saved to the folder with `save_pretrained`."""
    import torch
    import transformers

    name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    config = getattr(transformers, f"{name}Config")(
        text_config=CLIP_TEXT | dict(text), vision_config=CLIP_VISION | dict(vision), **top
    )
    model = getattr(transformers, f"{name}Model")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            value.copy_(centre + 0.25 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def expected(model, ids, images, mask):
    """(image embeddings, text embeddings, their tokens, logits per image) of transformers, unit where it normalises."""
    import torch

    given = {"input_ids": ids, "pixel_values": images.transpose(0, 3, 1, 2).copy()}
    given |= {} if mask is None else {"attention_mask": mask}
    with torch.no_grad():
        found = model(**{k: torch.tensor(v if v.dtype == np.float32 else v.astype(np.int64)) for k, v in given.items()})
    states = (found.vision_model_output.last_hidden_state, found.text_model_output.last_hidden_state)
    return [np.asarray(v.numpy()) for v in (found.image_embeds, found.text_embeds, *states, found.logits_per_image)]


def check(model, folder: Path, ids, mask):
    towers = load(folder)
    images = np.random.default_rng(1).normal(size=(3, 27, 27, 3)).astype(np.float32)
    apply = {
        name: jax.jit(lambda *inputs, name=name: getattr(towers, name).apply(*inputs)[0]) for name in ("image", "text")
    }
    ours = apply["image"](towers.variables["image"], images)
    for given in (None, mask):
        image, text, patches, tokens, logits = expected(model, ids, images, given)
        found = apply["text"](towers.variables["text"], ids, given)
        np.testing.assert_allclose(unit(ours["embedding"]), image, **CLOSE)
        np.testing.assert_allclose(ours["tokens"], patches[:, -ours["tokens"].shape[1] :], **CLOSE)
        np.testing.assert_allclose(unit(found["embedding"]), text, **CLOSE)
        np.testing.assert_allclose(found["tokens"], tokens, **CLOSE)
        np.testing.assert_allclose(towers.logits(ours["embedding"], found["embedding"]), logits, **CLOSE)


@pytest.mark.parametrize(("eos", "hidden_act"), [(2, "quick_gelu"), (57, "gelu")])
def test_clip_equals_transformers(tmp_path, eos, hidden_act):
    """eos 2: a text speaks at its largest id; 57: at its first 57, wherever that stands; padding masked or not."""
    act = {"hidden_act": hidden_act}
    model = torch_model("clip", tmp_path, act | {"eos_token_id": eos, "pad_token_id": 0}, act, projection_dim=20)
    ids = np.random.default_rng(2).integers(3, 57, (4, 12)).astype(np.int32)
    ends = np.asarray([3, 11, 7, 1])
    ids = np.where(np.arange(12)[None] > ends[:, None], 0, ids)
    ids[np.arange(4), ends] = 57
    ids[0, 9] = 57  # a second end token counts for nothing
    ids[1, 4] = 59 if eos == 2 else 58  # above the end token: the old rule reads here
    check(model, tmp_path, ids, np.arange(12)[None] <= ends[:, None])


@pytest.mark.parametrize("projection", [None, 32])
def test_siglip_equals_transformers(tmp_path, projection):
    """A text speaks at its last position, padding or not; it is projected to the width of the images."""
    wide = {"hidden_size": 32, "num_attention_heads": 4}
    text = wide if projection is None else {"projection_size": projection}
    model = torch_model("siglip", tmp_path, text)
    ids = np.random.default_rng(2).integers(0, 60, (4, 12)).astype(np.int32)
    check(model, tmp_path, ids, np.arange(12)[None] < np.asarray([3, 12, 7, 1])[:, None])


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("clip", {}),
        ("clip", {"text_config": {"hidden_size": 768, "num_attention_heads": 12}, "projection_dim": 768}),
        ("clip", {"text_config": {"hidden_size": 99}, "text_config_dict": {"num_hidden_layers": 3, "eos_token_id": 2}}),
        ("clip", {"vision_config": {"patch_size": 14}, "vision_config_dict": None, "text_config": {"vocab_size": 7}}),
        ("siglip", {}),
        ("siglip", {"vision_config": {"patch_size": 14, "hidden_size": 96, "layer_norm_eps": 1e-3},
                    "text_config": {"projection_size": 96, "hidden_act": "gelu"}}),
    ],
)  # fmt: skip
def test_configs_are_read_with_the_defaults_of_transformers(kind, given):
    import transformers

    theirs = {"clip": transformers.CLIPConfig, "siglip": transformers.SiglipConfig}[kind].from_dict(
        json.loads(json.dumps(given))
    )
    ours = read_config({"model_type": kind, **given})
    for tower, config in ((ours.vision, theirs.vision_config), (ours.text, theirs.text_config)):
        assert tower.transformer[:4] == (config.hidden_size, config.intermediate_size, config.num_hidden_layers,
                                         config.num_attention_heads)  # fmt: skip
        assert tower.transformer.epsilon == config.layer_norm_eps
        assert {"gelu": "gelu", "quick_gelu": "quick_gelu"}.get(config.hidden_act, "gelu_tanh") == (
            tower.transformer.activation
        )
    assert ours.vision[1:] == (theirs.vision_config.image_size, theirs.vision_config.patch_size, 3)
    assert ours.text[1:3] == (theirs.text_config.vocab_size, theirs.text_config.max_position_embeddings)
    assert ours.embedding == (theirs.projection_dim if kind == "clip" else theirs.text_config.projection_size)
    legacy = theirs.text_config.eos_token_id == 2
    assert ours.text.pool == ("last" if kind == "siglip" else "argmax" if legacy else "eos")


def test_a_pickled_checkpoint_gives_the_same_towers(tmp_path):
    import torch

    model = torch_model("clip", tmp_path, projection_dim=20)
    safe = open_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert open_weights(tmp_path).digest == safe.digest


def pictures() -> list[Image.Image]:
    """Larger, smaller, one narrow, one transparent, one with a palette, one grey."""
    rng = np.random.default_rng(3)

    def draw(height, width, channels=3):
        rough = rng.integers(0, 256, (height // 3 + 2, width // 3 + 2, channels), np.uint8).squeeze()
        return Image.fromarray(rough).resize((width, height), Image.Resampling.BILINEAR)

    return [draw(61, 90), draw(90, 61), draw(17, 19), draw(20, 70), draw(40, 50, 4), draw(45, 45).quantize(17),
            draw(50, 33, 1), draw(27, 27)]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("clip", {"size": {"shortest_edge": 30}, "crop_size": {"height": 27, "width": 27}}),
        ("clip", {"size": 27, "crop_size": 27, "resample": 2, "do_normalize": False}),
        ("clip", {"do_resize": False, "crop_size": 27, "image_mean": [0.1, 0.2, 0.3]}),
        ("siglip", {"size": {"height": 27, "width": 27}}),
        ("siglip", {"size": {"height": 27, "width": 27}, "do_rescale": False, "image_std": [2.0, 3.0, 4.0]}),
    ],
)
def test_pixels_equal_those_of_the_image_processor(tmp_path, kind, options):
    """The uint8 halves are equal; normalising in float32, not float64, differs by units in the last place."""
    import transformers

    processor = {"clip": "CLIPImageProcessorPil", "siglip": "SiglipImageProcessorPil"}[kind]
    processor = getattr(transformers, processor)(**options)
    processor.save_pretrained(tmp_path)
    preprocessing = open_preprocessing(tmp_path, kind, 27)
    for image in pictures():
        theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        ours = np.asarray(preprocessing.normalise(jnp.asarray(preprocessing.fit(image)[None])))[0]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-6)


def test_ids_of_clip_equal_those_of_its_tokenizer(tmp_path):
    """From tokenizer.json, and from vocab.json with merges.txt; texts that are too long are cut the same way."""
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "t</w>"), ("c", "at</w>"), ("p", "h"), ("o", "t"), ("ph", "ot"), ("phot", "o</w>"), ("o", "f</w>")]
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=12)
    expected_ids = theirs(WORDS, padding="max_length", truncation=True, max_length=12)["input_ids"]
    config = read_config({"model_type": "clip", "text_config": {"vocab_size": len(vocabulary), "eos_token_id":
                         vocabulary["<|endoftext|>"], "max_position_embeddings": 12}})  # fmt: skip
    theirs.save_pretrained(tmp_path / "json")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (tmp_path / "files" / "merges.txt").write_text("\n".join(lines) + "\n")
    for folder in ("json", "files"):
        found = open_tokeniser(tmp_path / folder, config)(WORDS)
        np.testing.assert_array_equal(found.ids, expected_ids)
        assert found.cut == sum(len(ids) > 12 for ids in theirs(WORDS)["input_ids"]) > 0


def test_ids_of_siglip_equal_those_of_its_tokenizer(tmp_path):
    import sentencepiece
    import transformers

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"a photo of a {x} cat or the {x}s dog" for x in ("big", "small", "naive", "brown")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spiece"), vocab_size=60, hard_vocab_limit=False, pad_id=-1,
        bos_id=-1, eos_id=1, unk_id=0, minloglevel=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # protobuf's, about its own classes
        theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"), model_max_length=12)
    expected_ids = theirs(WORDS, padding="max_length", truncation=True, max_length=12)["input_ids"]
    config = read_config({"model_type": "siglip", "text_config": {"vocab_size": 60, "max_position_embeddings": 12}})
    found = open_tokeniser(tmp_path, config)(WORDS)
    np.testing.assert_array_equal(found.ids, expected_ids)
    assert found.mask.sum() == sum(min(len(ids), 12) for ids in theirs(WORDS)["input_ids"])
