"""What every objective promises, whatever it computes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.api import OFF, Codebook, EstimatorSpec
from protojax.estimators import balanced, capi, coupled, learned, mixture, queue_sinkhorn, with_logit_center
from protojax.objectives import carp, check_inputs, combine, dino, ibot, input_names, koleo, koleo_proto, swav

V, T, B, D, K = 4, 2, 6, 8, 12
SPEC = EstimatorSpec(dim=D, rows=T * B, total_steps=10)
BUILDERS = {
    "carp": lambda: carp(block=4),
    "carp_unit": lambda: carp(block=6, temperature=0.2, teacher_temperature=0.1),
    "dino": lambda: dino(total_steps=10),
    "swav": lambda: swav(),
    "ibot": lambda: ibot(),
    "koleo": lambda: koleo(tile=5),
    "koleo_proto": lambda: koleo_proto(tile=5),
    "combined": lambda: combine(
        main=(1.0, carp(block=4)), spread=(("linear", 0.1, 0.0), koleo_proto()), total_steps=10
    ),
}
WITH_VIEWS = [name for name in BUILDERS if name != "koleo_proto"]


@functools.cache
def built(name):
    objective = BUILDERS[name]()
    return objective, jax.jit(jax.value_and_grad(lambda inputs, fixed: scalar(objective, inputs, fixed), has_aux=True))


def scalar(objective, moving, fixed):
    """Loss as a function of everything that could carry a gradient."""
    return objective.loss({}, {**fixed, **moving})


def inputs_of(key, mask=None):
    keys = jax.random.split(key, 7)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    head = unit(jax.random.normal(keys[2], (K, D)))
    target = unit(head + 0.3 * jax.random.normal(keys[3], (K, D)))
    bias = 0.1 * jax.random.normal(keys[4], (K,))
    moving = {
        "student": {
            "image": jax.random.normal(keys[0], (V, B, D)),
            "tokens": jax.random.normal(keys[5], (T, B, 3, D)),
        },
        "teacher": {
            "image": jax.random.normal(keys[1], (T, B, D)),
            "tokens": jax.random.normal(keys[6], (T, B, 3, D)),
        },
        "target": Codebook(target, bias),
        "prediction": Codebook(head, jnp.zeros(K)),
    }
    fixed = {
        "mask": jnp.ones(B, bool) if mask is None else jnp.asarray(mask),
        "batch": {},
        "head": {"prototypes": {"prototypes": head}},
        "step": jnp.asarray(3, jnp.int32),
        "key": keys[4],
    }
    return moving, fixed


def any_nonzero(tree):
    return any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", BUILDERS)
def test_finite_and_gradients_go_where_they_should(name, key):
    """To the student and the prediction codebook, exactly zero to the teacher and the target codebook; metrics are
    scalar (sum, count) pairs, the loss among them; the parameters are as `init` makes them."""
    objective, value_and_grad = built(name)
    moving, fixed = inputs_of(key)
    check_inputs(objective, {**moving, **fixed})
    assert jax.tree.leaves(objective.init(key, SPEC)) == []
    (loss, metrics), gradient = value_and_grad(moving, fixed)
    assert loss.shape == ()
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))
    assert all(total.shape == count.shape == () for total, count in metrics.values())
    assert float(metrics["loss"][0]) == float(loss)
    assert float(metrics["loss"][1]) == 1.0
    assert any_nonzero(gradient["student"]) == (name in WITH_VIEWS)
    assert any_nonzero(gradient["prediction"].prototypes) == (name != "koleo")
    assert not any_nonzero(gradient["teacher"])
    assert not any_nonzero(gradient["target"])


@pytest.mark.parametrize("name", WITH_VIEWS)
def test_masked_rows_count_zero(name, key):
    """Masked images may hold NaN: the loss is that of the others, their gradient is zero; with none left it is 0."""
    _, value_and_grad = built(name)
    mask = np.arange(B) < 4
    moving, fixed = inputs_of(key, mask)
    poison = lambda x: jnp.where(mask.reshape((1, B) + (1,) * (x.ndim - 2)), x, jnp.nan)  # noqa: E731
    views = {"student": jax.tree.map(poison, moving["student"])}
    (loss, _), gradient = value_and_grad(moving, fixed)
    (poisoned, _), poisoned_gradient = value_and_grad({**moving, **views}, fixed)
    np.testing.assert_array_equal(loss, poisoned)
    jax.tree.map(np.testing.assert_array_equal, gradient["student"], poisoned_gradient["student"])
    assert not any_nonzero(jax.tree.map(lambda x: x[:, ~mask], gradient["student"]))
    short = {k: jax.tree.map(lambda x: x[:, :4], moving[k]) for k in ("student", "teacher")}
    (alone, _), _ = built(name)[1]({**moving, **short}, {**fixed, "mask": jnp.ones(4, bool)})
    np.testing.assert_allclose(loss, alone, rtol=1e-5)
    (nothing, metrics), gradient = value_and_grad(moving, {**fixed, "mask": jnp.zeros(B, bool)})
    assert all(float(count) == 0.0 for _, count in metrics.values())
    assert float(nothing) == 0.0
    assert not any_nonzero(gradient["student"])


@pytest.mark.parametrize("name", ["carp", "dino"])
def test_prototypes_get_gradient_when_joint_and_exactly_none_when_decoupled(name, key):
    """Through the real estimators: gradient of the loss with respect to the head and to the whole estimator state."""
    objective = BUILDERS[name]()
    moving, fixed = inputs_of(key)
    rows = {"features": moving["teacher"]["image"].reshape(-1, D), "mask": jnp.ones(T * B, bool)}
    for estimator, joint in [
        (learned(K), True),
        (capi(K), True),
        (queue_sinkhorn(K), True),
        (coupled(K, start="random"), True),
        (mixture(K, start="random"), False),
        (with_logit_center(balanced(K, start="random")), False),
    ]:
        S, head = estimator.init(key, SPEC), estimator.head(key, SPEC)
        S, _ = jax.jit(lambda S, e=estimator: e.update(S, e.statistics(S, rows), rows, 0, key))(S)

        def loss(head, components, e=estimator, s=S):
            target, prediction = e.codebooks({**s, "components": components}, head)
            books = {"target": target, "prediction": prediction}
            return objective.loss({}, {**fixed, **moving, **books})[0]

        to_head, to_state = jax.jit(jax.grad(loss, (0, 1)))(head, S["components"])
        assert any_nonzero(to_head) == joint
        assert not any_nonzero(to_state)


def test_missing_inputs_fail_at_build_time_with_both_lists(key):
    moving, fixed = inputs_of(key)
    shapes = jax.eval_shape(lambda: {**moving, **fixed})
    assert {"head/prototypes", "student/image", "mask"} <= input_names(shapes)
    check_inputs(dino(teacher_temperature=0.05), shapes)
    check_inputs(dino(teacher_temperature=0.05), input_names(shapes))
    with pytest.raises(ValueError, match=r"missing \['teacher/image'\]; required \[.*'key'.*\]; available \['batch'"):
        check_inputs(carp(), {**shapes, "teacher": {}, "batch": {"image": 0}})
    decoupled = {**shapes, "head": {"prototypes": {}, "objective": {}}}
    with pytest.raises(ValueError, match=r"head/prototypes: prototypes are not learned in a decoupled arm.*'learned'"):
        check_inputs(combine(carp=(1.0, carp()), koleo=(0.1, koleo_proto())), decoupled)


@pytest.mark.parametrize("name", ["dino", "swav", "ibot"])
def test_a_prototype_that_is_switched_off_is_not_there(name, key):
    """Three prototypes more, their bias OFF, wherever they point: the same loss and gradients."""
    _, value_and_grad = built(name)
    moving, fixed = inputs_of(key)
    off = jnp.concatenate([moving["target"].prototypes[:2], -moving["target"].prototypes[:1]])
    wider = {
        k: Codebook(jnp.concatenate([moving[k].prototypes, off]), jnp.concatenate([moving[k].bias, jnp.full(3, OFF)]))
        for k in ("target", "prediction")
    }
    (loss, _), gradient = value_and_grad(moving, fixed)
    (same, _), wide = value_and_grad({**moving, **wider}, fixed)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient["student"], wide["student"])
    assert not np.any(np.asarray(wide["prediction"].prototypes)[K:])


def test_logit_centre_leaves_switched_off_what_is(key):
    estimator = with_logit_center(balanced(K, adapt=1, memory=4 * K, start="random"))
    S = estimator.init(key, SPEC)
    S["components"]["active"] = jnp.arange(K) < 5
    target, prediction = estimator.codebooks(S, {})
    for book in (target, prediction):
        np.testing.assert_array_equal(np.asarray(book.bias) == OFF, np.arange(K) >= 5)
