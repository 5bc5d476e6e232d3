"""config.json of CLIP and SigLIP, read as `transformers` reads it: nested groups, and its defaults for absent keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# transformers' names of the activations -> ours (`layers.ACTIVATIONS`)
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
}  # fmt: skip
_LEGACY_EOS = 2  # what config.json of the first CLIP models says, whose end token is 49407


class Transformer(NamedTuple):
    """width W, hidden width of the feed-forward part, depth, heads; activation: a name in `layers.ACTIVATIONS`;
    epsilon: of the layer norms."""

    width: int
    hidden: int
    depth: int
    heads: int
    activation: str
    epsilon: float


class VisionConfig(NamedTuple):
    """image_size, patch_size: pixels, of squares."""

    transformer: Transformer
    image_size: int
    patch_size: int
    channels: int


class TextConfig(NamedTuple):
    """vocabulary: tokens. max_length: positions. pool: which position speaks for a text: 'eos' the first token `eos`;
    'argmax' the largest id (what CLIP did before its config knew the end token); 'last' the last position."""

    transformer: Transformer
    vocabulary: int
    max_length: int
    pool: str
    eos: int


class ImageTextConfig(NamedTuple):
    """kind: 'clip' (class token, causal text, projections) or 'siglip' (attention pooling, text seen both ways, bias).
    embedding: width D of the common space."""

    kind: str
    vision: VisionConfig
    text: TextConfig
    embedding: int


_CLIP_TEXT = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # fmt: skip
_CLIP_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_SIGLIP_TEXT = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6, "eos_token_id": 49407,
}  # fmt: skip
_SIGLIP_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}  # fmt: skip
_DEFAULTS = {"clip": (_CLIP_VISION, _CLIP_TEXT), "siglip": (_SIGLIP_VISION, _SIGLIP_TEXT)}


def read_config(given: Mapping[str, Any]) -> ImageTextConfig:
    """The towers that a config.json describes.

    Raises ValueError for another `model_type`, values of another type or out of range, an unknown activation, and
    towers that do not meet in one width.
    """
    kind = given.get("model_type")
    if kind not in _DEFAULTS:
        raise ValueError(
            f"config.json: model_type is {kind!r}, expected 'clip' or 'siglip' with both towers; features of another "
            "model are made with its own library and saved as .npz (docs/prompts.md)"
        )
    vision, text = (
        _group(given, name, defaults)
        for name, defaults in zip(("vision_config", "text_config"), _DEFAULTS[kind], strict=True)
    )
    sizes = (_positive("vision_config", vision, key) for key in ("image_size", "patch_size", "num_channels"))
    read_vision = VisionConfig(_transformer("vision_config", vision), *sizes)
    if read_vision.image_size < read_vision.patch_size:
        raise ValueError(f"config.json: image_size {read_vision.image_size} is below patch_size "
                         f"{read_vision.patch_size}")  # fmt: skip
    pool, eos = _pool(text) if kind == "clip" else ("last", 0)
    vocabulary, positions = (_positive("text_config", text, k) for k in ("vocab_size", "max_position_embeddings"))
    read_text = TextConfig(_transformer("text_config", text), vocabulary, positions, pool, eos)
    return ImageTextConfig(kind, read_vision, read_text, _embedding(kind, given, vision, text))


def _group(given: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """One tower's keys. `NAME_dict` of early CLIP files, when it is not null, stands instead of `NAME`."""
    found = given.get(f"{name}_dict")
    if found is None:
        found = given.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"config.json: {name} must be an object, got {type(found).__name__}")
    return {**defaults, **(found or {})}


def _transformer(name: str, group: Mapping[str, Any]) -> Transformer:
    width, hidden, depth, heads = (
        _positive(name, group, key)
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    )
    if width % heads:
        raise ValueError(f"config.json: {name}.hidden_size {width} is no multiple of num_attention_heads {heads}")
    activation, epsilon = group["hidden_act"], group["layer_norm_eps"]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"config.json: {name}.hidden_act {activation!r} is unknown; known: {', '.join(_ACTIVATIONS)}")
    if not isinstance(epsilon, float | int) or isinstance(epsilon, bool) or not epsilon > 0:
        raise ValueError(f"config.json: {name}.layer_norm_eps must be a positive number, got {epsilon!r}")
    return Transformer(width, hidden, depth, heads, _ACTIVATIONS[activation], float(epsilon))


def _positive(name: str, group: Mapping[str, Any], key: str) -> int:
    value = group[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {name}.{key} must be a positive integer, got {value!r}")
    return value


def _pool(text: Mapping[str, Any]) -> tuple[str, int]:
    eos = text["eos_token_id"]
    if not isinstance(eos, int) or isinstance(eos, bool):
        raise ValueError(f"config.json: text_config.eos_token_id must be one integer, got {eos!r}")
    return ("argmax", 0) if eos == _LEGACY_EOS else ("eos", eos)


def _embedding(kind: str, given: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    if kind == "clip":
        return _positive("the top level", {"projection_dim": 512, **given}, "projection_dim")
    if vision["vision_use_head"] is not True:
        raise ValueError("config.json: vision_config.vision_use_head is false: this model has no image embedding")
    size = text.get("projection_size")
    size = text["hidden_size"] if size is None else _positive("text_config", text, "projection_size")
    if size != vision["hidden_size"]:
        raise ValueError(
            f"config.json: texts are projected to {size} numbers and images have {vision['hidden_size']}: "
            "text_config.projection_size and vision_config.hidden_size must be equal"
        )
    return size
