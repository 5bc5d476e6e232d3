"""Small transformers networks with weights from NumPy seeds: what the parity tests compare with.

Weights and inputs are functions of tensor names, so only names, shapes and outputs are stored (`reference/*.npz`).
Written by `python -m tests.models.reference_models` with the extra `parity`; all in float64.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "reference"
# ours (backbone options) and the transformers config of the same network
RESNETS: dict[str, Any] = {
    "resnet_basic": (
        {"depths": (2, 1), "kind": "basic", "widths": (8, 16)},
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"},
    ),
    "resnet_bottleneck": (
        {"depths": (1, 2), "kind": "bottleneck", "widths": (8, 12)},
        {"embedding_size": 8, "hidden_sizes": [32, 48], "depths": [1, 2], "layer_type": "bottleneck"},
    ),
}
VITS: dict[str, Any] = {
    "vit": (
        {"width": 24, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 20, "hidden": 40, "epsilon": 1e-6},
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 40,
            "image_size": 20,
            "patch_size": 4,
            "layer_norm_eps": 1e-6,
        },
    )
}
SIZES = {"resnet": {"images": (3, 37, 44, 3)}, "vit": {"native": (2, 20, 20, 3), "smaller": (2, 12, 16, 3)}}


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """U(-1, 1), float64, from a seed that is the name's checksum."""
    return 2.0 * np.random.default_rng(zlib.crc32(name.encode())).random(shape) - 1.0


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A state dict in which nothing is zero, one or symmetric, and activations keep their size."""
    state = {}
    for name, shape in shapes.items():
        value = uniform(name, shape)
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            value = 1.0 + 0.5 * value
        elif len(shape) in (2, 4):
            value = value * np.sqrt(3.0 / np.prod(shape[1:]))
        state[name] = value
    return state


def images(name: str) -> dict[str, np.ndarray]:
    kind = name.split("_")[0]
    return {part: uniform(f"{kind}/{part}", shape) for part, shape in SIZES[kind].items()}


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(state dict, stored outputs) of one reference."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        outputs = {key: stored[key] for key in stored.files}
    shapes = json.loads(str(outputs.pop("shapes")))
    return weights({key: tuple(shape) for key, shape in shapes.items()}), outputs


def compute(name: str) -> dict[str, np.ndarray]:
    """Names, shapes and outputs from transformers itself (needs PyTorch)."""
    import torch
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    if name in RESNETS:
        model = ResNetModel(ResNetConfig(**RESNETS[name][1])).double()
    else:
        # sdpa: the eager path takes the softmax in float32
        model = ViTModel(ViTConfig(**VITS[name][1], attn_implementation="sdpa")).double()
    counted = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    shapes = {key: tuple(value.shape) for key, value in counted.items()}
    state = {key: torch.from_numpy(value) for key, value in weights(shapes).items()}
    model.load_state_dict(state, strict=False)
    inputs = {part: torch.from_numpy(value).permute(0, 3, 1, 2) for part, value in images(name).items()}
    outputs: dict[str, Any] = {"shapes": np.array(json.dumps(shapes)), "parameters": np.array(model.num_parameters())}
    with torch.no_grad():
        if name in RESNETS:
            outputs["eval"] = model.eval()(inputs["images"]).pooler_output.flatten(1).numpy()
            outputs["train"] = model.train()(inputs["images"]).pooler_output.flatten(1).numpy()
            after = model.state_dict()
            outputs |= {f"after/{key}": after[key].numpy() for key in shapes if "running" in key}
        else:
            model.eval()
            for part, pixels in inputs.items():
                hidden = model(pixels, interpolate_pos_encoding=part != "native").last_hidden_state
                outputs[part] = hidden.numpy()
    return outputs


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in (*RESNETS, *VITS):
        np.savez_compressed(FOLDER / f"{name}.npz", **compute(name))


if __name__ == "__main__":
    main()
