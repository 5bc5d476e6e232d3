"""Weights of `transformers` models as our trees.

Each function takes a state dict of numpy arrays, `{name: x.numpy() for name, x in model.state_dict().items()}`, and
returns {'params', 'stats'} of the backbone alone, which are `variables['params']['backbone']` and
`variables['stats']['backbone']` of an encoder (`stats` has no 'backbone' where the backbone has no batch norm).
Tensor names are those of transformers 4 and 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

StateDict = Mapping[str, np.ndarray]


def from_hf_resnet(state: StateDict) -> dict[str, Any]:
    """`transformers.ResNetModel` (layer type basic or bottleneck, the defaults for stride placement) -> tree of
    `resnet.ResNet` with the 'imagenet' stem. Convolutions O,I,H,W become H,W,I,O.

    Raises ValueError on a missing tensor and on tensors that are left over (another architecture).
    """
    reader = _Reader(state)
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}

    def convert(prefix: str, p: dict[str, Any], s: dict[str, Any], conv: str, norm: str) -> None:
        p[conv] = {"kernel": reader(f"{prefix}.convolution.weight").transpose(2, 3, 1, 0)}
        p[norm] = {"scale": reader(f"{prefix}.normalization.weight"), "bias": reader(f"{prefix}.normalization.bias")}
        var = reader(f"{prefix}.normalization.running_var")
        # Established moments: the next update weighs 1 - momentum, as it would in PyTorch.
        s[norm] = {
            "mean": reader(f"{prefix}.normalization.running_mean"),
            "var": var,
            "updates": np.asarray(1e6, var.dtype),
        }

    convert("embedder.embedder", params, stats, "stem_conv", "stem_norm")
    for stage, block in reader.indices(r"encoder\.stages\.(\d+)\.layers\.(\d+)\."):
        prefix, name = f"encoder.stages.{stage}.layers.{block}", f"stage{stage + 1}_block{block + 1}"
        params[name], stats[name] = {}, {}
        for (i,) in reader.indices(re.escape(prefix) + r"\.layer\.(\d+)\."):
            convert(f"{prefix}.layer.{i}", params[name], stats[name], f"conv{i + 1}", f"norm{i + 1}")
        if reader.has(f"{prefix}.shortcut.convolution.weight"):
            convert(f"{prefix}.shortcut", params[name], stats[name], "shortcut_conv", "shortcut_norm")
    reader.finish(ignore=("num_batches_tracked",))
    return {"params": params, "stats": stats}


def from_hf_vit(state: StateDict) -> dict[str, Any]:
    """`transformers.ViTModel` (the pooler, which follows the class token, is left out) -> tree of `vit.ViT` with
    pool='class'. Dense weights are transposed, query, key and value joined, layers stacked.

    Raises ValueError on a missing tensor and on tensors that are left over (another architecture).
    """
    reader = _Reader(state)
    patch = reader("embeddings.patch_embeddings.projection.weight")
    params = {
        "class_token": reader("embeddings.cls_token").reshape(-1),
        "position": reader("embeddings.position_embeddings")[0],
        "patch": {
            "kernel": patch.transpose(2, 3, 1, 0).reshape(-1, patch.shape[0]),
            "bias": reader("embeddings.patch_embeddings.projection.bias"),
        },
        "norm": {"scale": reader("layernorm.weight"), "bias": reader("layernorm.bias")},
    }
    old = reader.indices(r"encoder\.layer\.(\d+)\.")
    if old:
        layers = [transformer_layer(reader, f"encoder.layer.{i}", _VIT_NAMES_4) for (i,) in old]
    else:
        layers = [transformer_layer(reader, f"layers.{i}", _VIT_NAMES_5) for (i,) in reader.indices(r"layers\.(\d+)\.")]
    if not layers:
        raise ValueError("no transformer layers found: expected names like 'layers.0...' or 'encoder.layer.0...'")
    params["blocks"] = stack_layers(layers)
    reader.finish(ignore=("pooler.dense.weight", "pooler.dense.bias"))
    return {"params": params, "stats": {}}


_VIT_NAMES_4 = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "project": "attention.output.dense",
    "dense1": "intermediate.dense",
    "dense2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
_VIT_NAMES_5 = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "project": "attention.o_proj",
    "dense1": "mlp.fc1",
    "dense2": "mlp.fc2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}


def stack_layers(layers: Sequence[Mapping[str, Mapping[str, np.ndarray]]]) -> dict[str, dict[str, np.ndarray]]:
    """Trees of equal layers -> one tree whose arrays lead with an axis of layers."""
    return {
        part: {name: np.stack([layer[part][name] for layer in layers]) for name in values}
        for part, values in layers[0].items()
    }


def transformer_layer(
    reader: Callable[[str], np.ndarray], prefix: str, names: Mapping[str, str]
) -> dict[str, dict[str, np.ndarray]]:
    """One layer of tensors `prefix.<names[part]>.weight` and `.bias` as the tree of a `vit.TransformerBlock`."""

    def dense(part: str) -> dict[str, np.ndarray]:
        name = f"{prefix}.{names[part]}"
        return {"kernel": reader(f"{name}.weight").T, "bias": reader(f"{name}.bias")}

    query, key, value = dense("query"), dense("key"), dense("value")
    layer = {name: dense(name) for name in ("project", "dense1", "dense2")}
    layer["qkv"] = {name: np.concatenate([query[name], key[name], value[name]], axis=-1) for name in ("kernel", "bias")}
    for norm in ("norm1", "norm2"):
        name = f"{prefix}.{names[norm]}"
        layer[norm] = {"scale": reader(f"{name}.weight"), "bias": reader(f"{name}.bias")}
    return layer


class _Reader:
    """Reads tensors by name and remembers which, so that none is forgotten."""

    def __init__(self, state: StateDict):
        self.state = {name: np.asarray(value) for name, value in state.items()}
        self.left = set(self.state)

    def __call__(self, name: str) -> np.ndarray:
        if name not in self.state:
            raise ValueError(f"the state dict has no {name!r}; it starts with {', '.join(sorted(self.state)[:3])}")
        self.left.discard(name)
        return self.state[name]

    def has(self, name: str) -> bool:
        return name in self.state

    def indices(self, pattern: str) -> list[tuple[int, ...]]:
        found = (re.match(pattern, name) for name in self.state)
        return sorted({tuple(int(group) for group in match.groups()) for match in found if match})

    def finish(self, ignore: tuple[str, ...]) -> None:
        left = sorted(name for name in self.left if not name.endswith(ignore))
        if left:
            raise ValueError(f"{len(left)} tensors have no place in this network: {', '.join(left[:4])}")
