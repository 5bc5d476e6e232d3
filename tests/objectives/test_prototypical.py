"""CARP, DINO and KoLeo-Proto against slow twins written from their formulas, and `combine`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from protojax.api import Codebook, EstimatorSpec, Objective
from protojax.objectives import carp, combine, dino, koleo, koleo_proto
from protojax.objectives.koleo import neighbour_distance

V, T, B, D, K = 4, 2, 5, 6, 12
EPS = 1.1920929e-07


def inputs_of(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return {
        "student": {"image": array(V, B, D)},
        "teacher": {"image": array(T, B, D)},
        "target": Codebook(array(K, D), array(K)),
        "prediction": Codebook(array(K, D), array(K)),
        "mask": jnp.arange(B) != 3,
        "step": jnp.asarray(15, jnp.int32),
        "key": jax.random.key(seed),
    }


def plain(inputs):
    """NumPy views of the unmasked images, unit rows of them, and the codebooks."""
    mask = np.asarray(inputs["mask"])
    views = [np.asarray(inputs[k]["image"])[:, mask] for k in ("student", "teacher")]
    books = [tuple(np.asarray(a) for a in inputs[k]) for k in ("prediction", "target")]
    return views, [v / np.linalg.norm(v, axis=-1, keepdims=True) for v in views], books


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_carp_equals_a_slow_twin(x64, temperature):
    """Loops over blocks, rows and pairs; the permutation is that of the key."""
    inputs, block = inputs_of(), 4
    views, unit_views, ((p, p_bias), (t, t_bias)) = plain(inputs)
    student, teacher = views if temperature is None else unit_views
    tau = 1.0 if temperature is None else temperature
    order = np.asarray(jax.random.permutation(inputs["key"], K))
    consistency, regulariser = [], []
    for start in range(0, K, block):
        chosen = order[start : start + block]
        ps = softmax((student @ p[chosen].T + p_bias[chosen]) / tau, axis=-1)
        qs = softmax((teacher @ t[chosen].T + t_bias[chosen]) / (0.5 * tau if temperature else tau), axis=-1)
        for i in range(V):
            for j in range(T):
                if i != j:
                    for n in range(4):
                        consistency.append(-np.log(np.clip(np.sum(ps[i, n] * qs[j, n]), EPS, 1 - EPS)))
        usage = np.concatenate([ps.reshape(-1, block), qs.reshape(-1, block)]).mean(0)
        regulariser.append(np.log(block) + np.sum(usage * np.log(usage)))
    options = {} if temperature is None else {"temperature": temperature, "teacher_temperature": 0.5 * temperature}
    value, metrics = carp(block=block, regulariser=0.7, **options).loss({}, inputs)
    np.testing.assert_allclose(metrics["consistency"][0], np.mean(consistency), rtol=1e-10)
    np.testing.assert_allclose(metrics["regulariser"][0], np.mean(regulariser), rtol=1e-10)
    np.testing.assert_allclose(value, np.mean(consistency) + 0.7 * np.mean(regulariser), rtol=1e-10)
    np.testing.assert_allclose(metrics["chance"][0], np.log(4))


def test_carp_scores_uniform_assignments_at_chance_and_draws_blocks_anew():
    """Features that tell nothing: consistency = ln(block), regulariser = 0. Another key gives other blocks."""
    inputs = inputs_of(dtype=np.float32)
    flat = {k: {"image": jnp.zeros_like(inputs[k]["image"])} for k in ("student", "teacher")}
    books = {k: Codebook(inputs[k].prototypes, jnp.zeros(K)) for k in ("target", "prediction")}
    _, metrics = carp(block=6).loss({}, {**inputs, **flat, **books})
    np.testing.assert_allclose(metrics["consistency"][0], metrics["chance"][0], rtol=1e-6)
    np.testing.assert_allclose(metrics["regulariser"][0], 0.0, atol=1e-6)
    values = {float(carp(block=6).loss({}, {**inputs, "key": jax.random.key(i)})[0]) for i in range(3)}
    assert len(values) == 3


def test_dino_equals_a_slow_twin_and_its_gradient_autodiff(x64):
    """Every pair of different views with N x K softmaxes written out, at the scheduled teacher temperature."""
    inputs = inputs_of(1)
    objective = dino(student_temperature=0.2, teacher_temperature=("linear", 0.1, 0.3, 0.0, 0.5), total_steps=60)
    _, (student, teacher), ((p, p_bias), (t, t_bias)) = plain(inputs)
    tau = 0.1 + 0.2 * 15 / 30
    targets = softmax((teacher @ t.T + t_bias) / tau, axis=-1)
    predictions = log_softmax((student @ p.T + p_bias) / 0.2, axis=-1)
    pairs = [-np.mean(np.sum(targets[j] * predictions[i], axis=-1)) for i in range(V) for j in range(T) if i != j]
    value, metrics = objective.loss({}, inputs)
    np.testing.assert_allclose(value, np.mean(pairs), rtol=1e-10)
    np.testing.assert_allclose(metrics["temperature"][0], tau)
    entropy = -np.mean(np.sum(targets[0] * np.log(targets[0]), axis=-1))
    np.testing.assert_allclose(metrics["teacher_entropy"][0], entropy, rtol=1e-10)

    def materialised(image, book):
        rows = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
        logits = (jnp.einsum("vbd,kd->vbk", rows, book.prototypes) + book.bias[None, None]) / 0.2
        scores = jax.nn.log_softmax(logits, axis=-1)[:, np.asarray(inputs["mask"])]
        each = -jnp.einsum("jnk,ink->ij", jnp.asarray(targets), scores) / targets.shape[1]
        return jnp.sum(each * (1.0 - jnp.eye(V, T))) / (V * T - T)

    def streamed(image, book):
        return objective.loss({}, {**inputs, "student": {"image": image}, "prediction": book})[0]

    arguments = inputs["student"]["image"], inputs["prediction"]
    for ours, expected in zip(
        jax.tree.leaves(jax.grad(streamed, (0, 1))(*arguments)),
        jax.tree.leaves(jax.grad(materialised, (0, 1))(*arguments)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("tile", [2, 100])
def test_koleo_of_features_equals_a_slow_twin(x64, tile):
    """Distances among a view's unmasked rows written out, the other views no neighbours; the gradient parts them."""
    mask = np.asarray([True, True, False, True, True, True])
    image = jax.random.normal(jax.random.key(3), (2, 6, 4), jnp.float64)

    def twin(image):
        kept = image[:, mask]
        rows = kept / jnp.linalg.norm(kept, axis=-1, keepdims=True)
        square = jnp.sum((rows[:, :, None] - rows[:, None]) ** 2, axis=-1) + 1e3 * jnp.eye(5)[None]
        return -jnp.mean(jnp.log(jnp.sqrt(jnp.min(square, axis=-1))))

    def ours(image):
        return koleo(tile=tile).loss({}, {"student": {"image": image}, "mask": jnp.asarray(mask)})

    (value, metrics), gradient = jax.value_and_grad(ours, has_aux=True)(image)
    np.testing.assert_allclose(value, twin(image), rtol=1e-10)
    np.testing.assert_allclose(gradient, jax.grad(twin)(image), rtol=1e-8, atol=1e-12)
    further = ours(image - 0.01 * gradient)[1]["nearest"][0]
    assert float(further) > float(metrics["nearest"][0])


@pytest.mark.parametrize("unmasked", [0, 1])
def test_koleo_without_a_neighbour_is_zero(unmasked):
    inputs = {"student": {"image": jnp.ones((2, 3, 4))}, "mask": jnp.arange(3) < unmasked}
    (value, metrics) = koleo().loss({}, inputs)
    assert float(value) == 0.0
    assert all(float(count) == 0.0 for _, count in metrics.values())


@pytest.mark.parametrize("tile", [3, 12, 100])
def test_koleo_proto_equals_a_slow_twin(x64, tile):
    """All pairwise distances written out; tiles change nothing; the gradient is the twin's and parts neighbours."""
    inputs = inputs_of(2)

    def twin(prototypes):
        rows = prototypes / jnp.linalg.norm(prototypes, axis=1, keepdims=True)
        square = jnp.sum((rows[:, None] - rows[None]) ** 2, axis=-1) + 1e3 * jnp.eye(K)
        return -jnp.mean(jnp.log(jnp.sqrt(jnp.min(square, axis=1))))

    def ours(prototypes):
        book = Codebook(prototypes, jnp.zeros(K))
        return koleo_proto(tile=tile).loss({}, {**inputs, "prediction": book})[0]

    prototypes = inputs["prediction"].prototypes
    np.testing.assert_allclose(ours(prototypes), twin(prototypes), rtol=1e-10)
    np.testing.assert_allclose(jax.grad(ours)(prototypes), jax.grad(twin)(prototypes), rtol=1e-8, atol=1e-12)
    moved = prototypes - 0.01 * jax.grad(ours)(prototypes)
    assert float(jnp.min(neighbour_distance(moved))) > float(jnp.min(neighbour_distance(prototypes)))


def test_koleo_of_coincident_prototypes_is_finite():
    same = jnp.ones((3, 4))
    value, gradient = jax.value_and_grad(lambda p: -jnp.mean(jnp.log(neighbour_distance(p))))(same)
    np.testing.assert_allclose(value, -np.log(1e-8), rtol=1e-5)
    assert np.isfinite(np.asarray(gradient)).all()
    with pytest.raises(ValueError, match="at least 2 prototypes, got 1"):
        neighbour_distance(jnp.ones((1, 4)))


# ---------------------------------------------------------------------------------------------------- combine
def noise_term(scale):
    """An objective with a parameter that reports the randomness it was given."""

    def loss(params, inputs):
        value = params["a"] * jax.random.normal(inputs["key"], ())
        return value, {"loss": (value, jnp.ones(()))}

    return Objective(frozenset({"key"}), lambda key, spec: {"a": jnp.asarray(scale, jnp.float32)}, loss)


def test_combine_adds_weighted_terms_with_own_keys_and_parameters(key):
    inputs = inputs_of(dtype=np.float32)
    spec = EstimatorSpec(D, B, 30)
    both = combine(x=(2.0, noise_term(1.0)), y=(("linear", 0.0, 1.0), noise_term(3.0)), total_steps=30)
    params = both.init(key, spec)
    assert sorted(params) == ["x", "y"]
    value, metrics = both.loss(params, inputs)
    x, y = float(metrics["x/loss"][0]), float(metrics["y/loss"][0])
    np.testing.assert_allclose(value, 2.0 * x + 0.5 * y, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"][0], value)
    assert abs(x - y / 3.0) > 1e-3
    assert both.requires == {"key", "mask", "step"}
    alone = combine(y=(1.0, noise_term(3.0)))
    np.testing.assert_allclose(alone.loss({"y": params["y"]}, inputs)[0], y, rtol=1e-6)
    nested = combine(z=(0.5, alone))
    np.testing.assert_allclose(nested.loss({"z": {"y": params["y"]}}, {**inputs})[1]["z/loss"][1], 1.0)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: carp(block=1), ValueError, "carp, block: expected an integer of at least 2, got 1"),
        (lambda: carp(temperature=0.0), ValueError, "carp, temperature: expected a positive number"),
        (lambda: carp(teacher_temperature=0.1), ValueError, "teacher_temperature needs temperature"),
        (lambda: dino(), ValueError, "a schedule needs total_steps"),
        (lambda: dino(student_temperature=-1.0), ValueError, "student_temperature: expected a positive number"),
        (lambda: dino(teacher_temperature=("liner", 1, 2), total_steps=3), ValueError, "did you mean 'linear'"),
        (lambda: koleo(tile=0), ValueError, "koleo, tile: expected an integer of at least 1"),
        (lambda: koleo_proto(tile=0), ValueError, "tile: expected an integer of at least 1"),
        (lambda: combine(), ValueError, "at least one name"),
        (lambda: combine(a=carp()), TypeError, r"combine, a: expected \(weight, objective\)"),
        (lambda: combine(a=(("linear", 0, 1), carp())), ValueError, "as weight needs total_steps"),
        (lambda: carp(block=5).loss({}, inputs_of(dtype=np.float32)), ValueError, "multiple of block.*K = 12"),
        (
            lambda: dino(teacher_temperature=0.1).loss(
                {}, {**inputs_of(dtype=np.float32), "student": {"image": jnp.zeros((1, B, D))}}
            ),
            ValueError,
            "T = 2, V = 1",
        ),
    ],
)
def test_bad_options_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
