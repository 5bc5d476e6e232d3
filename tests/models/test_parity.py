"""Our networks compute what `transformers` computes from the same weights; named sizes have the published counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.models import count_parameters, make_encoder
from protojax.models.convert import from_hf_resnet, from_hf_vit
from protojax.models.functional import functional
from protojax.models.resnet import ResNet
from protojax.models.vit import ViT

from . import reference_models as reference

# transformers' ResNetModel (no classifier) and ViTModel without its pooler
COUNTS = {
    "resnet18": 11_176_512,
    "resnet34": 21_284_672,
    "resnet50": 23_508_032,
    "resnet101": 42_500_160,
    "vit_ti": 5_524_416,
    "vit_s": 21_665_664,
    "vit_b": 85_798_656,
    "vit_l": 303_301_632,
}
# float64: about 1e3 operations deep at 1.1e-16, values of order 1
EXACT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("name", reference.RESNETS)
@pytest.mark.usefixtures("x64")
def test_resnet_equals_transformers(name):
    state, expected = reference.load(name)
    network = functional(ResNet, **reference.RESNETS[name][0], dtype="float64")
    variables = from_hf_resnet(state)
    assert count_parameters(variables["params"]) == expected["parameters"]
    images = jnp.asarray(reference.images(name)["images"])
    features, _ = jax.jit(network.apply)(variables, images)
    np.testing.assert_allclose(features["pooled"], expected["eval"], **EXACT)

    features, stats = jax.jit(lambda v, x: network.apply(v, x, train=True))(variables, images)
    np.testing.assert_allclose(features["pooled"], expected["train"], **EXACT)
    after = {key: expected.get(f"after/{key}", value) for key, value in state.items()}
    wanted = from_hf_resnet(after)["stats"]
    counted = lambda path, leaf: leaf + 1 if path[-1].key == "updates" else leaf  # noqa: E731  (ours alone)
    wanted = jax.tree_util.tree_map_with_path(counted, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), stats, wanted)


@pytest.mark.usefixtures("x64")
def test_vit_equals_transformers_at_native_and_other_sizes():
    state, expected = reference.load("vit")
    network = functional(ViT, **reference.VITS["vit"][0], dtype="float64")
    variables = from_hf_vit(state)
    pooler = sum(value.size for name, value in state.items() if name.startswith("pooler"))
    assert count_parameters(variables["params"]) + pooler == expected["parameters"]
    for part, images in reference.images("vit").items():
        features, _ = jax.jit(network.apply)(variables, jnp.asarray(images))
        np.testing.assert_allclose(features["pooled"], expected[part][:, 0], **EXACT)
        np.testing.assert_allclose(features["tokens"], expected[part][:, 1:], **EXACT)


@pytest.mark.parametrize("attention", [None, "xla"])
def test_float32_vit_agrees_with_the_float64_reference(attention):
    state, expected = reference.load("vit")
    network = functional(ViT, **reference.VITS["vit"][0], attention=attention)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), from_hf_vit(state))
    features, _ = jax.jit(network.apply)(variables, jnp.asarray(reference.images("vit")["native"], jnp.float32))
    # about 100 roundings of 6e-8 along the deepest path, values up to 4
    np.testing.assert_allclose(features["tokens"], expected["native"][:, 1:], rtol=0, atol=2e-5)


def test_names_of_transformers_4_give_the_same_tree():
    state, _ = reference.load("vit")
    renames = (
        (".attention.q_proj", ".attention.attention.query"),
        (".attention.k_proj", ".attention.attention.key"),
        (".attention.v_proj", ".attention.attention.value"),
        (".attention.o_proj", ".attention.output.dense"),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
    )
    older = {}
    for name, value in state.items():
        for new, old in renames:
            name = name.replace(new, old)
        older["encoder.layer" + name.removeprefix("layers") if name.startswith("layers.") else name] = value
    jax.tree.map(np.testing.assert_array_equal, from_hf_vit(older), from_hf_vit(state))


@pytest.mark.parametrize("name", COUNTS)
def test_named_sizes_have_the_published_parameter_count(name):
    encoder = make_encoder(name, "identity")
    inputs = {"global": jax.ShapeDtypeStruct((2, 2, 224, 224, 3), jnp.float32)}
    variables = jax.eval_shape(encoder.init, jax.random.key(0), inputs)
    assert count_parameters(variables["params"]) == COUNTS[name]
    embeddings, stats = jax.eval_shape(lambda v, x, k: encoder.apply(v, x, True, k), variables, inputs, None)
    width = {"resnet18": 512, "resnet34": 512, "vit_ti": 192, "vit_s": 384, "vit_b": 768, "vit_l": 1024}.get(name, 2048)
    assert embeddings["backbone"].shape == (2, 2, width)
    assert jax.tree.map(jnp.shape, stats) == jax.tree.map(jnp.shape, variables["stats"])


def test_conversion_names_what_is_missing_or_left_over():
    state, _ = reference.load("resnet_basic")
    with pytest.raises(ValueError, match=r"tensors have no place in this network: extra\.weight"):
        from_hf_resnet(state | {"extra.weight": np.zeros(2)})
    state.pop("embedder.embedder.convolution.weight")
    with pytest.raises(ValueError, match=r"no 'embedder\.embedder\.convolution\.weight'"):
        from_hf_resnet(state)
    state, _ = reference.load("vit")
    headless = {name: value for name, value in state.items() if not name.startswith("layers.")}
    with pytest.raises(ValueError, match="no transformer layers found"):
        from_hf_vit(headless)


@pytest.mark.parity
@pytest.mark.parametrize("name", [*reference.RESNETS, *reference.VITS])
def test_stored_references_are_what_transformers_gives_today(name):
    computed = reference.compute(name)
    with np.load(reference.FOLDER / f"{name}.npz") as stored:
        assert set(stored.files) == set(computed)
        for key in stored.files:
            if key == "shapes":
                assert str(stored[key]) == str(computed[key])
            else:
                np.testing.assert_allclose(computed[key], stored[key], **EXACT)


@pytest.mark.parity
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_transformers(name):
    import torch
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    resnets = {
        "resnet18": ([2, 2, 2, 2], "basic", [64, 128, 256, 512]),
        "resnet34": ([3, 4, 6, 3], "basic", [64, 128, 256, 512]),
        "resnet50": ([3, 4, 6, 3], "bottleneck", [256, 512, 1024, 2048]),
        "resnet101": ([3, 4, 23, 3], "bottleneck", [256, 512, 1024, 2048]),
    }
    vits = {"vit_ti": (192, 12, 3), "vit_s": (384, 12, 6), "vit_b": (768, 12, 12), "vit_l": (1024, 24, 16)}
    with torch.device("meta"):
        if name in resnets:
            depths, kind, sizes = resnets[name]
            model = ResNetModel(ResNetConfig(depths=depths, layer_type=kind, hidden_sizes=sizes))
        else:
            width, depth, heads = vits[name]
            config = ViTConfig(
                hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width
            )
            model = ViTModel(config, add_pooling_layer=False)
    assert model.num_parameters() == COUNTS[name]
