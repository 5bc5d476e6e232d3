"""The partial estimator's own loss, and DINO's centre of logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from protojax.api import EstimatorSpec
from protojax.estimators import capi, frozen, learned, mixture, with_logit_center
from protojax.ops.transport import balanced_potentials

SPEC = EstimatorSpec(5, 12, 50)


def test_capi_step_equals_adamw_on_the_materialised_loss(key):
    """Two steps with a masked row: gradient of -1/N sum t ln s with every N x K array written out, then optax.adamw."""
    features = jax.random.normal(key, (12, 5))
    mask = jnp.arange(12) != 4
    estimator = capi(7, learning_rate=0.01, weight_decay=0.1)
    S = estimator.init(key, SPEC)
    explicit = S["components"]["prototypes"]
    optimizer = optax.adamw(0.01, b1=0.9, b2=0.95, weight_decay=0.1)
    state = optimizer.init(explicit)
    rows = features[np.asarray(mask)]
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    uniform = jnp.full((7,), -np.log(7.0), jnp.float32)

    def loss(prototypes):
        keys = prototypes / jnp.linalg.norm(prototypes, axis=1, keepdims=True)
        fixed = jax.lax.stop_gradient(keys)
        potentials = balanced_potentials(rows, fixed, uniform, jnp.zeros(7), temperature=0.06, iterations=3)
        target = jax.nn.softmax(rows @ fixed.T / 0.06 + potentials[None], axis=1)
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(rows @ keys.T / 0.12, axis=1), axis=1))

    step = jax.jit(lambda S, rows, i: estimator.update(S, estimator.statistics(S, rows), rows, i, key))
    for i in range(2):
        value, gradient = jax.value_and_grad(loss)(explicit)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, explicit)
            explicit = optax.apply_updates(explicit, updates)
        S, info = step(S, {"features": features, "mask": mask}, i)
        np.testing.assert_allclose(info["estimator/clustering_loss"][0], value, rtol=1e-5)
        # Adam divides by the gradient's size: rounding of small entries is amplified to a share of the step of 0.01.
        np.testing.assert_allclose(S["components"]["prototypes"], explicit, atol=2e-5)


def test_capi_clusters_by_its_own_loss(key):
    """Repeated steps on fixed features lower the clustering loss, without any head or encoder."""
    rows = {"features": jax.random.normal(key, (12, 5)), "mask": jnp.ones(12, bool)}
    estimator = capi(4, learning_rate=0.05)
    S = estimator.init(key, SPEC)
    step = jax.jit(lambda S, i: estimator.update(S, estimator.statistics(S, rows), rows, i, key))
    losses = []
    for i in range(40):
        S, info = step(S, i)
        losses.append(float(info["estimator/clustering_loss"][0]))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_logit_center_is_dinos_running_mean_of_logits(key, momentum):
    """For prototypes that do not move, -bias equals the running mean of the batch means of all N x K logits."""
    estimator = with_logit_center(frozen(6), momentum)
    S = estimator.init(key, SPEC)
    prototypes, center = S["components"]["prototypes"], np.zeros(6)
    for i in range(4):
        features = jax.random.normal(jax.random.fold_in(key, i), (12, 5)) + 1.0
        mask = np.arange(12) < 9
        rows = {"features": features, "mask": jnp.asarray(mask)}
        S, _ = estimator.update(S, estimator.statistics(S, rows), rows, i, key)
        kept = np.asarray(features)[mask]
        logits = kept / np.linalg.norm(kept, axis=1, keepdims=True) @ np.asarray(prototypes).T
        center = momentum * center + (1 - momentum) * logits.mean(0)
        target, prediction = estimator.codebooks(S, {})
        np.testing.assert_allclose(-target.bias, center, atol=1e-6)
        np.testing.assert_array_equal(prediction.bias, 0.0)


def test_logit_center_scores_ema_head_and_replaces_other_biases(key):
    """Joint: the centre follows whichever head the target comes from. Over a centred mixture the teacher's logits
    minus their mean are (h - g) . w, whatever bias the mixture had."""
    rows = {"features": jax.random.normal(key, (12, 5)) + 1.0, "mask": jnp.ones(12, bool)}
    joint = learned(6, features="unit", center_momentum=0.0)
    S, head = joint.init(key, SPEC), joint.head(key, SPEC)
    S, _ = joint.update(S, joint.statistics(S, rows), rows, 0, key)
    for scale in (head, jax.tree.map(lambda a: -3.0 * a, head)):
        target, _ = joint.codebooks(S, scale)
        np.testing.assert_allclose(target.bias, -(target.prototypes @ S["shared"]["logit_mean"]), atol=1e-6)
    around = with_logit_center(mixture(6, features="unit", start="random"), 0.0)
    S = around.init(key, SPEC)
    S, _ = around.update(S, around.statistics(S, rows), rows, 0, key)
    target, prediction = around.codebooks(S, {})
    unit_rows = rows["features"] / jnp.linalg.norm(rows["features"], axis=1, keepdims=True)
    scores = unit_rows @ target.prototypes.T + target.bias[None, :]
    np.testing.assert_allclose(jnp.mean(scores, axis=0), 0.0, atol=1e-6)
    np.testing.assert_array_equal(target.prototypes, prediction.prototypes)
