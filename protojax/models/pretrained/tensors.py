"""Named tensors of a checkpoint (transformers' names) -> trees of the towers, all names and shapes checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from protojax.models.convert import stack_layers, transformer_layer
from protojax.models.pretrained.config import ImageTextConfig, Transformer

_LAYER = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
    "project": "self_attn.out_proj", "dense1": "mlp.fc1", "dense2": "mlp.fc2", "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}  # fmt: skip
_BUFFERS = ("embeddings.position_ids",)  # stored by early versions; 0, 1, 2, ...
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def expected_tensors(config: ImageTextConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config holds."""
    return dict(_vision_shapes(config)) | dict(_text_shapes(config)) | dict(_logit_shapes(config))


def _vision_shapes(config: ImageTextConfig) -> Shapes:
    vision, shape, prefix = config.vision, config.vision.transformer, "vision_model"
    patches = (vision.image_size // vision.patch_size) ** 2
    clip = config.kind == "clip"
    yield f"{prefix}.embeddings.patch_embedding.weight", (shape.width, vision.channels, *2 * (vision.patch_size,))
    yield f"{prefix}.embeddings.position_embedding.weight", (patches + clip, shape.width)
    yield from _layer_shapes(f"{prefix}.encoder", shape)
    yield from _norm_shapes(f"{prefix}.post_layernorm", shape.width)
    if clip:
        yield f"{prefix}.embeddings.class_embedding", (shape.width,)
        yield from _norm_shapes(f"{prefix}.pre_layrnorm", shape.width)  # the name is theirs
        yield "visual_projection.weight", (config.embedding, shape.width)
        return
    yield f"{prefix}.embeddings.patch_embedding.bias", (shape.width,)
    yield f"{prefix}.head.probe", (1, 1, shape.width)
    yield f"{prefix}.head.attention.in_proj_weight", (3 * shape.width, shape.width)
    yield f"{prefix}.head.attention.in_proj_bias", (3 * shape.width,)
    yield from _dense_shapes(f"{prefix}.head.attention.out_proj", shape.width, shape.width)
    yield from _norm_shapes(f"{prefix}.head.layernorm", shape.width)
    yield from _dense_shapes(f"{prefix}.head.mlp.fc1", shape.width, shape.hidden)
    yield from _dense_shapes(f"{prefix}.head.mlp.fc2", shape.hidden, shape.width)


def _text_shapes(config: ImageTextConfig) -> Shapes:
    text, shape, prefix = config.text, config.text.transformer, "text_model"
    yield f"{prefix}.embeddings.token_embedding.weight", (text.vocabulary, shape.width)
    yield f"{prefix}.embeddings.position_embedding.weight", (text.max_length, shape.width)
    yield from _layer_shapes(f"{prefix}.encoder", shape)
    yield from _norm_shapes(f"{prefix}.final_layer_norm", shape.width)
    if config.kind == "clip":
        yield "text_projection.weight", (config.embedding, shape.width)
    else:
        yield from _dense_shapes(f"{prefix}.head", shape.width, config.embedding)


def _logit_shapes(config: ImageTextConfig) -> Shapes:
    yield "logit_scale", () if config.kind == "clip" else (1,)
    if config.kind == "siglip":
        yield "logit_bias", (1,)


def _layer_shapes(prefix: str, shape: Transformer) -> Shapes:
    sizes = {"dense1": (shape.width, shape.hidden), "dense2": (shape.hidden, shape.width)}
    for i in range(shape.depth):
        for part, name in _LAYER.items():
            where = f"{prefix}.layers.{i}.{name}"
            if part.startswith("norm"):
                yield from _norm_shapes(where, shape.width)
            else:
                yield from _dense_shapes(where, *sizes.get(part, (shape.width, shape.width)))


def _dense_shapes(name: str, inputs: int, outputs: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm_shapes(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def check_tensors(config: ImageTextConfig, given: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError where a checkpoint's names and shapes are not its config's: missing, unexpected or wrong."""
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in given]
    unknown = sorted(name for name in given if name not in expected and not name.endswith(_BUFFERS))
    wrong = [
        f"{name} has shape {list(given[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape and (shape not in ((), (1,)) or given[name] not in ((), (1,)))
    ]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:4])}"
        for what, found in (("tensors are missing", missing), ("tensors have no place", unknown), ("differ", wrong))
        if found
    ]
    if problems:
        raise ValueError(
            f"the weights are not those of this config.json ({config.kind}): {'; '.join(problems)}. Take both files "
            "from the same model, with both towers"
        )


def to_variables(config: ImageTextConfig, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """{'image', 'text': variables of the towers; 'logit_scale', 'logit_bias': float32 scalars}.

    read(name) -> the tensor as float32; names and shapes must have passed `check_tensors`.
    """
    scale, bias = np.float32(read("logit_scale").reshape(())), np.float32(0.0)
    if config.kind == "siglip":
        bias = np.float32(read("logit_bias").reshape(()))
    return {
        "image": {"params": _vision_tree(config, read), "stats": {}},
        "text": {"params": _text_tree(config, read), "stats": {}},
        "logit_scale": scale,
        "logit_bias": bias,
    }


def _vision_tree(config: ImageTextConfig, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    prefix, width = "vision_model", config.vision.transformer.width
    kernel = read(f"{prefix}.embeddings.patch_embedding.weight")
    tree: dict[str, Any] = {
        "patch": {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, width)},
        "position": read(f"{prefix}.embeddings.position_embedding.weight"),
        "blocks": _blocks_tree(f"{prefix}.encoder", config.vision.transformer, read),
        "norm": _norm(f"{prefix}.post_layernorm", read),
    }
    if config.kind == "clip":
        tree["class_token"] = read(f"{prefix}.embeddings.class_embedding")
        tree["first_norm"] = _norm(f"{prefix}.pre_layrnorm", read)
        tree["project"] = {"kernel": read("visual_projection.weight").T}
        return tree
    tree["patch"]["bias"] = read(f"{prefix}.embeddings.patch_embedding.bias")
    head = f"{prefix}.head"
    weight, bias = read(f"{head}.attention.in_proj_weight"), read(f"{head}.attention.in_proj_bias")
    tree["pool"] = {
        "probe": read(f"{head}.probe").reshape(-1),
        "query": {"kernel": weight[:width].T, "bias": bias[:width]},
        "key_value": {"kernel": weight[width:].T, "bias": bias[width:]},
        "output": _dense(f"{head}.attention.out_proj", read),
        "norm": _norm(f"{head}.layernorm", read),
        "dense1": _dense(f"{head}.mlp.fc1", read),
        "dense2": _dense(f"{head}.mlp.fc2", read),
    }
    return tree


def _text_tree(config: ImageTextConfig, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    prefix = "text_model"
    clip = config.kind == "clip"
    return {
        "tokens": read(f"{prefix}.embeddings.token_embedding.weight"),
        "positions": read(f"{prefix}.embeddings.position_embedding.weight"),
        "blocks": _blocks_tree(f"{prefix}.encoder", config.text.transformer, read),
        "norm": _norm(f"{prefix}.final_layer_norm", read),
        "project": {"kernel": read("text_projection.weight").T} if clip else _dense(f"{prefix}.head", read),
    }


def _blocks_tree(prefix: str, shape: Transformer, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    return stack_layers([transformer_layer(read, f"{prefix}.layers.{i}", _LAYER) for i in range(shape.depth)])


def _dense(name: str, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    return {"kernel": read(f"{name}.weight").T, "bias": read(f"{name}.bias")}


def _norm(name: str, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    return {"scale": read(f"{name}.weight"), "bias": read(f"{name}.bias")}
