"""Nested contrastive losses: the streamed value is the definition's, in float64, with its gradients; no B x B array."""

from __future__ import annotations

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from protojax import parallel, parallel_engine
from protojax.ops.contrastive import negatives, nested_contrastive, nested_sigmoid
from tests.ops.test_memory import largest_buffer

B, D, WIDTHS = 24, 12, (4, 6, 12)
SHARPNESS = 1 / 0.07


def pairs(seed: int = 0):
    draw = np.random.default_rng(seed)
    image, text = draw.normal(size=(2, B, D))
    ids = draw.integers(0, 16, size=B).astype(np.int32)
    mask = np.arange(B) < B - 3
    return jnp.asarray(image), jnp.asarray(text), jnp.asarray(ids), jnp.asarray(mask)


def materialised(image, text, ids, mask, widths=WIDTHS, sharpness=SHARPNESS):
    """The definition, with its B x B table."""
    losses = []
    own = jnp.eye(image.shape[0], dtype=bool)
    counted = own | ((ids[:, None] != ids[None, :]) & mask[:, None] & mask[None, :])
    for width in widths:
        x, y = (a[:, :width] / jnp.linalg.norm(a[:, :width], axis=1, keepdims=True) for a in (image, text))
        logits = jnp.where(counted, sharpness * (x @ y.T), -jnp.inf)
        nce = 0.5 * (jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)) - jnp.diag(logits)
        losses.append(jnp.sum(jnp.where(mask, nce, 0.0)) / jnp.sum(mask.astype(nce.dtype)))
    return jnp.stack(losses)


@pytest.mark.usefixtures("x64")
def test_streamed_equals_materialised_in_value_and_gradient():
    image, text, ids, mask = pairs()
    weights = jnp.asarray([0.3, 1.0, -0.5])

    def ours(image, text, sharpness):
        found = nested_contrastive(image, text, widths=WIDTHS, sharpness=sharpness, caption_id=ids, mask=mask, tile=16)
        return jnp.sum(weights * found.losses), found

    def theirs(image, text, sharpness):
        return jnp.sum(weights * materialised(image, text, ids, mask, sharpness=sharpness))

    scale = jnp.asarray(SHARPNESS)
    (_, found), bars = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(image, text, scale)
    np.testing.assert_allclose(found.losses, materialised(image, text, ids, mask), rtol=1e-13)
    for bar, expected in zip(bars, jax.grad(theirs, (0, 1, 2))(image, text, scale), strict=True):
        np.testing.assert_allclose(bar, expected, atol=1e-12 * float(jnp.max(jnp.abs(expected))))
    # Masked rows may hold anything, and take no gradient.
    dirty = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(
        jnp.where(mask[:, None], image, jnp.nan), text, scale
    )
    np.testing.assert_array_equal(dirty[0][1].losses, found.losses)
    assert not np.any(dirty[1][0][~np.asarray(mask)])


@pytest.mark.usefixtures("x64")
def test_constant_text_gives_chance_and_constant_images_reach_it():
    image, text, _, _ = pairs()
    constant = jnp.broadcast_to(text[:1], text.shape)
    loss = lambda a, b: nested_contrastive(a, b, widths=WIDTHS, sharpness=SHARPNESS, tile=B)  # noqa: E731
    found = loss(image, constant)
    assert float(found.chance) == pytest.approx(math.log(B), rel=1e-14)
    assert np.all(np.asarray(found.losses) > math.log(B))  # rows give ln B exactly, columns more
    same = loss(jnp.broadcast_to(image[:1], image.shape), constant)
    np.testing.assert_allclose(same.losses, math.log(B), rtol=1e-13)
    # A prefix of a prefix is the shorter prefix; a permutation of the batch changes nothing.
    cut = nested_contrastive(image[:, :6], text[:, :6], widths=(4, 6), sharpness=SHARPNESS, tile=B)
    np.testing.assert_allclose(cut.losses, loss(image, text).losses[:2], rtol=1e-13)
    order = np.random.default_rng(1).permutation(B)
    np.testing.assert_allclose(loss(image[order], text[order]).losses, loss(image, text).losses, rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_sigmoid_equals_its_definition_and_its_chance_is_the_best_constant():
    image, text, ids, mask = pairs()
    bias = -3.0

    def definition(image, text):
        out = []
        for width in WIDTHS:
            x, y = (a[:, :width] / jnp.linalg.norm(a[:, :width], axis=1, keepdims=True) for a in (image, text))
            logits = SHARPNESS * (x @ y.T) + bias
            own = jnp.eye(B, dtype=bool)
            term = jax.nn.softplus(jnp.where(own, -logits, logits))
            counted = (own | (ids[:, None] != ids[None, :])) & mask[:, None] & mask[None, :]
            out.append(jnp.sum(jnp.where(counted, term, 0.0)) / jnp.sum(mask.astype(term.dtype)))
        return jnp.stack(out)

    def ours(image, text):
        options = {"widths": WIDTHS, "sharpness": SHARPNESS, "bias": bias, "caption_id": ids, "mask": mask, "tile": 16}
        return nested_sigmoid(image, text, **options).losses

    np.testing.assert_allclose(ours(image, text), definition(image, text), rtol=1e-13)
    for bar, expected in zip(
        jax.jit(jax.jacrev(ours, (0, 1)))(image, text), jax.jacrev(definition, (0, 1))(image, text), strict=True
    ):
        np.testing.assert_allclose(bar, expected, atol=1e-13)
    constant = jnp.ones((B, D))
    best = min(
        float(nested_sigmoid(constant, constant, widths=(D,), sharpness=1.0, bias=b - 1.0).losses[0])
        for b in (-math.log(B - 1), -math.log(B - 1) + 0.1, -math.log(B - 1) - 0.1)
    )
    found = nested_sigmoid(constant, constant, widths=(D,), sharpness=1.0, bias=-math.log(B - 1) - 1.0)
    assert float(found.losses[0]) == pytest.approx(float(found.chance), rel=1e-12) == best


def test_negatives_are_counted_by_id():
    ids, valid = jnp.asarray([3, 3, 5, 2**31 - 1, 2**31 - 1]), jnp.asarray([True, True, True, True, False])
    np.testing.assert_array_equal(negatives(ids, valid), [2, 2, 3, 3, 0])


# ------------------------------------------------------------------------------------------ devices and memory
def test_sharded_equals_one_device_and_gathers_text_once_for_all_prefixes():
    image, text, ids, mask = (np.asarray(a) for a in pairs())
    image, text = image.astype(np.float32), text.astype(np.float32)
    mesh = parallel.make_mesh()
    rows = NamedSharding(mesh, P(parallel.ALL))

    def value(image, text, ids, mask):
        found = nested_contrastive(image, text, widths=WIDTHS, sharpness=SHARPNESS, caption_id=ids, mask=mask)
        return jnp.sum(found.losses)

    moved = [jax.device_put(a, rows) for a in (image, text, ids, mask)]
    with parallel_engine.engaged(mesh):
        program = jax.jit(jax.value_and_grad(value, (0, 1))).lower(*moved).compile()
    found, bars = program(*moved)
    one = jax.devices()[0]
    # Forward and backward each need the other side once: whole text rows, not one block a prefix.
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", program.as_text())
    assert 1 <= sum(shape == f"{B},{D}" for shape in gathered) <= 2, gathered
    expected, there = jax.jit(jax.value_and_grad(value, (0, 1)))(
        *(jax.device_put(a, one) for a in (image, text, ids, mask))
    )
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for bar, other in zip(bars, there, strict=True):
        np.testing.assert_allclose(bar, other, atol=2e-6 * float(jnp.max(jnp.abs(other))))


def compiled(batch: int, widths=(16, 32, 64)):
    def loss(image, text):
        return jnp.sum(nested_contrastive(image, text, widths=widths, sharpness=SHARPNESS).losses)

    rows = jax.ShapeDtypeStruct((batch, 64), jnp.float32)
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(rows, rows).compile()


def test_memory_does_not_grow_with_the_square_of_the_batch():
    large, larger = compiled(16_384), compiled(32_768)
    temporaries = [program.memory_analysis().temp_size_in_bytes for program in (large, larger)]
    assert temporaries[1] < 1.5 * temporaries[0]  # the table would take four times as much
    assert temporaries[1] < 32_768**2 * 4 / 6
    assert largest_buffer(larger) < 32_768**2 / 32


# ------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": np.zeros((B, D - 1), np.float32)}, "same pairs"),
        ({"widths": (4, 4)}, "given twice"),
        ({"widths": (1, 12)}, r"\[1\] lie outside 2..12"),
        ({"widths": (13,)}, r"\[13\] lie outside"),
        ({"caption_id": jnp.zeros((3,), jnp.int32)}, "caption_id and mask must be"),
        ({"tile": 0}, "at least 1"),
    ],
)
def test_what_is_refused(change, message):
    rows = np.ones((B, D), np.float32)
    options = {"image": rows, "text": rows, "widths": WIDTHS, "sharpness": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        nested_contrastive(options.pop("image"), options.pop("text"), **options)


def test_one_pair_has_no_loss():
    for function, more in itertools.product(
        (nested_contrastive, nested_sigmoid), ({"widths": (2,), "sharpness": 1.0},)
    ):
        options = more | ({"bias": 0.0} if function is nested_sigmoid else {})
        with pytest.raises(ValueError, match="one pair"):
            function(jnp.ones((1, 4)), jnp.ones((1, 4)), **options)
