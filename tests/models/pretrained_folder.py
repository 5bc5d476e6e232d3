"""Folders of weights as Hugging Face lays them out, small and random, written without PyTorch; and what transformers
computes from the same weights (`reference/pretrained.npz`, written by `python -m tests.models.pretrained_folder` with
the extra `parity`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from PIL import Image

from protojax.models.pretrained.config import read_config
from protojax.models.pretrained.tensors import expected_tensors

from .reference_models import FOLDER, uniform, weights

SIDE, LENGTH = 16, 12
# name -> kind of towers and the end token in config.json; 2 is the old rule of CLIP
REFERENCES = {"clip": ("clip", 30), "clip_legacy": ("clip", 2), "siglip": ("siglip", 39)}
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I8": np.int8}
_WORDS = ("a", "photo", "of", "red", "green", "blue", "apple", "pear", "fruit", "kind", "cat", "dog")


def write_photos(root: Path, splits: Iterable[str], classes: Iterable[str], each: int) -> Path:
    """`each` random pictures a class and split below root/SPLIT/CLASS, no two of a class of one size."""
    rng = np.random.default_rng(0)
    for folder in (root / split / name for split in splits for name in classes):
        folder.mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), np.uint8)).save(folder / f"{i}.png")
    return root


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """A config.json of two small towers; `text` and `vision` change their groups, other keys the top."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = shape | {"image_size": SIDE, "patch_size": 8} | changes.pop("vision", {})
    text = shape | {"vocab_size": 40, "max_position_embeddings": LENGTH, "eos_token_id": 39} | changes.pop("text", {})
    return {"model_type": kind, "projection_dim": 16, "text_config": text, "vision_config": vision} | changes


def random_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights by their names of every tensor that the config asks for, and a buffer as early versions stored it."""
    tensors = {"text_model.embeddings.position_ids": np.arange(LENGTH, dtype=np.float32)[None]}
    return tensors | {k: np.asarray(v, np.float32) for k, v in weights(expected_tensors(read_config(config))).items()}


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> None:
    """8 bytes of length, a JSON header, raw numbers."""
    header, data = {}, b""
    for name, values in tensors.items():
        raw = np.ascontiguousarray(values.astype(_DTYPES[dtype])).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_folder(folder: Path, kind: str = "clip", *, dtype: str = "F32", **changes: Any) -> Path:
    """A whole folder: config.json, model.safetensors, tokenizer.json, preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(kind, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", random_tensors(config), dtype)
    sizes = {"clip": {"size": {"shortest_edge": SIDE}, "crop_size": SIDE}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(sizes.get(kind, {"size": {"height": SIDE, "width": SIDE}}))
    )
    write_tokenizer(folder, "<|endoftext|>" if kind == "clip" else "</s>")
    return folder


def write_tokenizer(folder: Path, end: str) -> None:
    """A tokenizer.json of whole words; the end token has the largest id, 39."""
    words = {word: i for i, word in enumerate((*_WORDS, "[UNK]", "<|startoftext|>"))} | {end: 39}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))


def reference_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images float32 [3,S,S,3], ids int32 [3,L] with end tokens in several places, mask bool [3,L])."""
    images = uniform("pretrained/images", (3, SIDE, SIDE, 3)).astype(np.float32)
    ids = (uniform("pretrained/ids", (3, LENGTH)) * 18 + 19).astype(np.int32)
    ends = np.asarray([2, 11, 6])
    ids[np.arange(3), ends] = 39
    ids[0, 5:7] = 39
    ids[np.arange(3), ends - 1] = 30  # where it is the end token, the first one speaks
    return images, ids, np.arange(LENGTH)[None] <= ends[:, None]


def compute(name: str) -> dict[str, np.ndarray]:
    """Unit embeddings and logits of transformers in float64, with and without the mask (needs PyTorch)."""
    import torch
    import transformers

    kind, eos = REFERENCES[name]
    given = config_of(kind, text={"eos_token_id": eos})
    library = {"clip": (transformers.CLIPModel, transformers.CLIPConfig)}
    model, config = library.get(kind, (transformers.SiglipModel, transformers.SiglipConfig))
    # sdpa: the eager path takes the softmax in float32
    network = model(config.from_dict({k: v for k, v in given.items() if k != "model_type"}, attn_implementation="sdpa"))
    network = network.double().eval()
    own = random_tensors(given)
    network.load_state_dict({k: torch.from_numpy(np.asarray(own[k])).double() for k in network.state_dict()})
    images, ids, mask = reference_inputs()
    inputs = {"pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2).double(),
              "input_ids": torch.from_numpy(ids).long()}  # fmt: skip
    found = {}
    with torch.no_grad():
        for part, more in (("bare", {}), ("masked", {"attention_mask": torch.from_numpy(mask).long()})):
            outputs = network(**inputs, **more)
            for key in ("image_embeds", "text_embeds", "logits_per_image"):
                found[f"{name}/{part}/{key}"] = getattr(outputs, key).numpy()
    return found


def main() -> None:
    arrays = {key: value for name in REFERENCES for key, value in compute(name).items()}
    np.savez_compressed(FOLDER / "pretrained.npz", **arrays)


if __name__ == "__main__":
    main()
