"""The alignment objective: what its parts are called, how its modes relate, and what it refuses."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.api import EstimatorSpec
from protojax.objectives.image_text import image_text, prefix_dims_of, start_loss

B, D, DIMS = 16, 8, (8, 4, 2)
SPEC = EstimatorSpec(dim=D, rows=B, total_steps=10)


def inputs(seed: int = 0, ids=None, key: int = 0):
    draw = np.random.default_rng(seed)
    image, text = (jnp.asarray(draw.normal(size=(1, B, D)), jnp.float32) for _ in range(2))
    batch = {} if ids is None else {"caption_id": ids}
    return {"student": {"image": image, "text": text}, "mask": jnp.ones((B,), bool), "batch": batch,
            "key": jax.random.key(key)}  # fmt: skip


def run(data, **options):
    objective = image_text(width=D, prefix_dims=DIMS, **options)
    params = objective.init(jax.random.key(1), SPEC)
    total, metrics = objective.loss(params, data)
    return total, {name: float(s / n) for name, (s, n) in metrics.items()}, params


def test_every_mode_logs_the_same_names_with_the_same_values():
    found = {mode: run(inputs(), prefix_mode=mode)[1] for mode in ("mean", "sum", "single")}
    shared = ["contrastive_full", "chance", "above_chance", *(f"prefix_{d}" for d in DIMS)]
    for name in shared:
        values = [f[name] for f in found.values()]
        assert max(values) - min(values) <= 1e-5, name
    parts = [found["mean"][f"prefix_{d}"] for d in DIMS]
    assert found["mean"]["contrastive_full"] == pytest.approx(parts[0])
    assert found["mean"]["prefix_objective"] == pytest.approx(sum(parts) / 3)
    assert found["sum"]["prefix_objective"] == pytest.approx(3 * found["mean"]["prefix_objective"])  # sum = P x mean
    # Every part has its own chance level: what it would be if each prefix's loss were at chance.
    chance = math.log(B)
    for mode, widths in (("mean", 1), ("sum", 3), ("single", 1)):
        assert found[mode]["chance_prefix_objective"] == pytest.approx(widths * chance)
        assert found[mode]["chance_total"] == pytest.approx((0.25 + widths) * chance)
    drawn = [run(inputs(key=k), prefix_mode="single")[1] for k in range(12)]
    assert {f["sampled_dim"] for f in drawn} == set(DIMS)
    for f in drawn:
        assert f["prefix_objective"] == pytest.approx(f[f"prefix_{int(f['sampled_dim'])}"])
    assert found["mean"]["loss"] == pytest.approx(0.25 * parts[0] + sum(parts) / 3)
    assert run(inputs(), prefix_mode="none")[1]["prefix_objective"] == 0.0
    weighted = run(inputs(), prefix_weights=(0.0, 0.0, 2.0))[1]
    assert weighted["prefix_objective"] == pytest.approx(parts[2])


def test_the_expectation_of_a_drawn_width_is_the_mean():
    """Each width has the same probability: of 900 draws 300 +- 4 standard errors each, sqrt(900 x 1/3 x 2/3)."""
    data, objective = inputs(), image_text(width=D, prefix_dims=DIMS, prefix_mode="single")
    keys = jax.random.split(jax.random.key(7), 900)
    drawn = jax.jit(jax.vmap(lambda k: objective.loss({}, data | {"key": k})[1]["sampled_dim"][0]))(keys)
    counts = [int(np.sum(np.isclose(drawn, d))) for d in DIMS]
    assert sum(counts) == 900
    assert max(abs(c - 300) for c in counts) < 4 * math.sqrt(200)


def test_single_mode_has_the_gradient_of_the_drawn_width_alone():
    data, objective = inputs(key=3), image_text(width=D, prefix_dims=DIMS, prefix_mode="single", contrastive_weight=0.0)
    drawn = int(run(data, prefix_mode="single")[1]["sampled_dim"])

    def loss(image):
        return objective.loss({}, {**data, "student": {**data["student"], "image": image}})[0]

    bar = np.asarray(jax.grad(loss)(data["student"]["image"]))[0]
    assert np.all(bar[:, drawn:] == 0.0)
    assert np.all(np.any(bar[:, :drawn] != 0.0, axis=1))


def test_constant_embeddings_are_at_the_chance_level_of_every_part():
    constant = inputs() | {"student": {"image": jnp.ones((B, D)), "text": jnp.ones((B, D))}}
    for mode in ("mean", "sum", "single", "none"):
        found = run(constant, prefix_mode=mode)[1]
        assert found["prefix_objective"] == pytest.approx(found["chance_prefix_objective"], rel=1e-6)
        assert found["loss"] == pytest.approx(found["chance_total"], rel=1e-6)


def test_masked_pairs_weigh_nothing_and_duplicates_lower_chance():
    data = inputs(ids=jnp.asarray([0, 0, 0, 0, *range(1, B - 3)], jnp.int32))
    assert run(data)[1]["chance"] == pytest.approx((4 * math.log(B - 3) + (B - 4) * math.log(B)) / B, rel=1e-6)
    data = inputs() | {"mask": jnp.arange(B) < 10}
    data["student"] = jax.tree.map(lambda a: jnp.where(data["mask"][None, :, None], a, jnp.nan), data["student"])
    found = run(data)[1]
    assert found["chance"] == pytest.approx(math.log(10), rel=1e-6)
    assert math.isfinite(found["loss"])


def test_negatives_inside_groups_only():
    data = inputs()
    halves = [jax.tree.map(lambda a, i=i: a[:, i * 8 : i * 8 + 8], data["student"]) for i in (0, 1)]
    each = [run(data | {"student": half, "mask": jnp.ones((8,), bool)})[1]["contrastive_full"] for half in halves]
    found = run(data, negative_groups=2)[1]
    assert found["contrastive_full"] == pytest.approx(sum(each) / 2, rel=1e-5)
    assert found["chance"] == pytest.approx(math.log(8), rel=1e-6)
    with pytest.raises(ValueError, match="groups of at least 2"):
        run(data, negative_groups=3)


def test_learned_temperature_and_sigmoid_bias_take_gradients():
    objective = image_text(width=D, prefix_dims=DIMS, temperature_mode="learned", loss="sigmoid")
    params = objective.init(jax.random.key(0), SPEC)
    assert float(jnp.exp(params["log_sharpness"])) == pytest.approx(1 / 0.07, rel=1e-6)
    bars = jax.grad(lambda p: objective.loss(p, inputs())[0])(params)
    assert all(float(bar) != 0.0 for bar in bars.values())
    high = params | {"log_sharpness": jnp.float32(9.0)}
    assert float(objective.loss(high, inputs())[1]["temperature"][0]) == pytest.approx(0.01)


def test_first_loss_of_random_embeddings():
    draw = np.random.default_rng(0)
    image, text = (jnp.asarray(draw.normal(size=(128, 512)), jnp.float32) for _ in range(2))
    data = {"student": {"image": image, "text": text}, "mask": jnp.ones((128,), bool), "batch": {},
            "key": jax.random.key(0)}  # fmt: skip
    _, metrics = image_text().loss({}, data)
    found = float(metrics["contrastive_full"][0] / 128)
    assert found == pytest.approx(start_loss(512, 0.07, math.log(128)), abs=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_dims": (4, 2)}, "full width D = 8"),
        ({"prefix_dims": (8, 8)}, "given twice"),
        ({"prefix_dims": (16, 8)}, r"\[16\] lie outside 2..8"),
        ({"prefix_mode": "all"}, "prefix_mode must be one of"),
        ({"prefix_weights": (1.0,)}, "3 numbers >= 0"),
        ({"prefix_weights": (1.0, 1.0, 1.0), "prefix_mode": "single"}, "no meaning with"),
        ({"temperature": 0.0}, "positive number"),
        ({"temperature": 0.001}, "at least 0.01, got 0.001"),
        ({"temperature_mode": "free"}, "'fixed' or 'learned'"),
        ({"loss": "triplet"}, "'contrastive' or 'sigmoid'"),
        ({"negative_groups": 0}, "integer of at least 1"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        image_text(**{"width": D, "prefix_dims": DIMS, **options})


def test_unsorted_widths_are_sorted_with_a_warning():
    with pytest.warns(UserWarning, match=r"\[2, 8, 4\] were sorted to \[8, 4, 2\]"):
        assert prefix_dims_of(D, (2, 8, 4)) == DIMS
    with pytest.raises(ValueError, match=r"expected image embeddings"):
        run(inputs() | {"student": {"image": jnp.ones((2, B, D)), "text": jnp.ones((B, D))}})
