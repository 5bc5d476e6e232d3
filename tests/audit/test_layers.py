"""The prototype layer of every known project is found, the teacher's where there are two, and doubt is said."""

from __future__ import annotations

import numpy as np
import pytest

from protojax.audit import layers
from protojax.audit.files import load_prototypes
from protojax.audit.layers import AmbiguousError
from protojax.audit.tensors import FileError, Tensor
from tests.audit.writers import Saver, rows

BACKBONE = {"blocks.0.attn.qkv.weight": (24, 8), "blocks.0.mlp.fc1.weight": (32, 8), "pos_embed": (1, 5, 8)}


def network(prefix: str, **extra) -> dict:
    return {f"{prefix}{name}": shape for name, shape in {**BACKBONE, **extra}.items()}


def normed(name: str) -> dict:
    return {f"{name}.weight_g": (64, 1), f"{name}.weight_v": (64, 8)}


DINO = {**network("student.module.backbone."), **normed("student.module.head.last_layer"),
        **network("teacher.backbone."), **normed("teacher.head.last_layer")}  # fmt: skip
LAYOUTS = {
    "DINO": (DINO, "teacher.head.last_layer.weight_v", "DINO, CARP or iBOT"),
    "DINO, new weight norm": (
        {f"teacher.head.last_layer.parametrizations.weight.original{i}": s for i, s in enumerate([(64, 1), (64, 8)])},
        "teacher.head.last_layer.parametrizations.weight.original1", "DINO, CARP or iBOT",
    ),
    "DINOv2": ({**network("teacher.backbone."), **normed("teacher.dino_head.last_layer"),
                **network("student.backbone."), **normed("student.dino_head.last_layer")},
               "teacher.dino_head.last_layer.weight_v", "DINOv2 or DINOv3, image head"),
    "DINOv3": ({f"model.{net}.dino_head.last_layer.weight": (64, 8) for net in ("student", "model_ema")},
               "model.model_ema.dino_head.last_layer.weight", "DINOv2 or DINOv3, image head"),
    "SwAV": (network("module.", **{"prototypes.weight": (64, 8), "projection_head.0.weight": (16, 8)}),
             "module.prototypes.weight", "SwAV"),
    "CAPI": ({"model.student.head.last_layer.weight_v": (64, 8), "model.student.head.last_layer.weight_g": (64, 1),
              "model.teacher.head.layer.weight": (64, 8), "optimizer.state.0.exp_avg": (64, 8)},
             "model.teacher.head.layer.weight", "CAPI"),
    "MSN": ({"prototypes": (64, 8), **network("target_encoder.module."), **network("encoder.module.")},
            "prototypes", "MSN"),
    "a Flax tree": ({"params.codebook.kernel": (8, 64), "opt_state.mu.codebook.kernel": (8, 64)},
                    "params.codebook.kernel", "found by its name"),
    "one matrix": ({"w": (64, 8), "bias": (64,)}, "w", "the only matrix in the file"),
}  # fmt: skip


def tensors(shapes: dict) -> dict[str, Tensor]:
    return {
        name: Tensor(shape, "float32", lambda s=shape: np.ones(s, np.float32), name) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_known_layouts_are_found(name):
    shapes, key, layout = LAYOUTS[name]
    found = layers.find(tensors(shapes))
    assert (found.name, found.shape, found.layout) == (key, (64, 8), layout)


@pytest.mark.parametrize(
    ("shapes", "candidates"),
    [
        ({**normed("teacher.head.last_layer"), **normed("teacher.head.last_layer2")},
         ["teacher.head.last_layer.weight_v", "teacher.head.last_layer2.weight_v"]),  # iBOT: images and patches
        ({**normed("teacher.dino_head.last_layer"), **normed("teacher.ibot_head.last_layer")},
         ["teacher.dino_head.last_layer.weight_v", "teacher.ibot_head.last_layer.weight_v"]),
        ({"prototypes.prototypes0.weight": (64, 8), "prototypes.prototypes1.weight": (64, 8)},
         ["prototypes.prototypes0.weight", "prototypes.prototypes1.weight"]),
        ({"fc.weight": (1000, 8), "conv.weight": (16, 8)}, ["fc.weight", "conv.weight"]),  # largest K / D first
    ],
)  # fmt: skip
def test_doubt_lists_what_to_choose_from(shapes, candidates):
    with pytest.raises(AmbiguousError) as error:
        layers.find(tensors(shapes))
    assert [c.name for c in error.value.candidates] == candidates


def test_two_names_of_one_memory_are_one_layer(tmp_path):
    """iBOT with a shared head saves it as last_layer and last_layer2."""
    saver = Saver()
    shared = saver.storage(rows(0, 64, 8))
    view = saver.view(shared, 0, (64, 8), (8, 1))
    path = saver.zip(
        tmp_path / "ibot.pth", {"teacher": {"head.last_layer.weight": view, "head.last_layer2.weight": view}}
    )
    assert load_prototypes(path).key == "teacher.head.last_layer.weight"


NEW = "parametrizations.weight.original"


@pytest.mark.parametrize("names", [("weight_v", "weight_g"), (f"{NEW}1", f"{NEW}0")])
def test_weight_norm_is_resolved(names, tmp_path):
    """w_k = g_k v_k / |v_k|: a negative gain turns a row around."""
    v, g = rows(0, 16, 8) * 7.0, np.linspace(-2, 3, 16, dtype=np.float32)[:, None]
    saver = Saver()
    state = {f"head.last_layer.{names[0]}": saver.tensor(v), f"head.last_layer.{names[1]}": saver.tensor(g)}
    found = load_prototypes(saver.legacy(tmp_path / "dino.pth", {"teacher": state}))
    assert found.weight_norm
    np.testing.assert_allclose(found.rows, g * v / np.linalg.norm(v, axis=1, keepdims=True), rtol=1e-6)


def test_a_key_is_a_tensor_or_a_layer_and_a_misspelt_one_is_suggested():
    found = tensors({**DINO, "steps": (3,)})
    assert layers.named(found, "student.module.head.last_layer").name == "student.module.head.last_layer.weight_v"
    assert layers.named(found, "teacher.backbone.blocks.0.mlp.fc1").shape == (32, 8)
    with pytest.raises(FileError, match=r"no tensor 'teacher.head.last_layr'.*did you mean 'teacher.head.last_layer"):
        layers.named(found, "teacher.head.last_layr")
    with pytest.raises(FileError, match=r"steps is float32 \[3\], expected a matrix"):
        layers.named(found, "steps")


def test_a_file_without_a_matrix_says_what_it_holds():
    with pytest.raises(FileError, match=r"no matrix .* holds bias \[64\]"):
        layers.find(tensors({"bias": (64,)}))


def test_gains_of_another_number_are_refused():
    found = tensors({"head.last_layer.weight_v": (64, 8), "head.last_layer.weight_g": (5, 1)})
    with pytest.raises(FileError, match=r"has shape \[5, 1\], expected one number for each of the 64 rows"):
        layers.rows_of(found, layers.find(found))
