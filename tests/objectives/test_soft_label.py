"""Theorems of the soft-label loss."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.objectives import combine, soft_label

B, C = 6, 4
TERMS = {
    "entropy": {"entropy_weight": 2.0, "min_entropy": 1.3},
    "maxsup": {"maxsup_weight": 0.1},
    "matched": {"entropy_matched_weight": 1.0},
    "spread": {"spread_weight": 1.0},
}


def distributions(seed: int = 0, rows: int = B) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(C), rows).astype(np.float32)


def inputs(logits, targets, mask=None):
    mask = jnp.ones(len(targets), bool) if mask is None else jnp.asarray(mask)
    return {"student": {"logits": jnp.asarray(logits)}, "batch": {"targets": jnp.asarray(targets)}, "mask": mask}


def value(objective, logits, targets, mask=None):
    return float(objective.loss({}, inputs(logits, targets, mask))[0])


def logits_of(seed: int = 1, scale: float = 2.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((B, C))).astype(np.float32)


def twin(logits, targets, eps=0.0, gamma=0.0, weights=None):
    """The formula in float64 NumPy."""
    z = logits.astype(np.float64)
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    t = (1 - eps) * targets.astype(np.float64) + eps / C
    t = np.maximum(t, 1e-9)
    t /= t.sum(1, keepdims=True)
    rows = ((1 - np.exp(log_p)) ** gamma * t * (np.log(t) - log_p)).sum(1)
    return float(np.mean(rows if weights is None else np.asarray(weights)[targets.argmax(1)] * rows))


@pytest.mark.parametrize("options", [{}, {"eps": 0.15}, {"gamma": 5.0}, {"eps": 0.2, "gamma": 2.0}])
def test_the_loss_is_the_formula(options):
    logits, targets = logits_of(), distributions()
    objective = soft_label(categories=C, label_smoothing=options.get("eps", 0.0), focal_gamma=options.get("gamma", 0.0))
    assert value(objective, logits, targets) == pytest.approx(twin(logits, targets, **options), rel=2e-6)
    weights = (1.0, 2.0, 0.5, 3.0)
    weighted = soft_label(categories=C, class_weighting="sample", class_weights=weights)
    assert value(weighted, logits, targets) == pytest.approx(twin(logits, targets, weights=weights), rel=2e-6)


def test_the_loss_is_zero_exactly_at_the_target():
    targets = distributions()
    objective = soft_label(categories=C)
    assert value(objective, np.log(targets), targets) == pytest.approx(0.0, abs=2e-7)
    assert value(objective, np.log(targets) + 3.0, targets) == pytest.approx(
        0.0, abs=1e-6
    )  # logits have a free constant
    for seed in range(5):
        assert value(objective, np.log(distributions(seed + 9)), targets) > 0.05


def test_the_gradient_is_the_difference_of_distributions():
    """d/da of KL(t' || softmax(a / T)), summed over samples, is (p - t') / T."""
    targets, a, temperature = distributions(), jnp.asarray(logits_of()), 2.5
    objective = soft_label(categories=C, label_smoothing=0.1)
    gradient = jax.grad(lambda a: B * objective.loss({}, inputs(a / temperature, targets))[0])(a)
    smooth = 0.9 * targets + 0.1 / C
    expected = (jax.nn.softmax(a / temperature, axis=-1) - smooth) / temperature
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def everything():
    return soft_label(categories=C, **{k: v for options in TERMS.values() for k, v in options.items()})


def test_permuting_categories_permutes_everything_and_masked_rows_count_zero():
    logits, targets, objective = logits_of(), distributions(), everything()
    order = np.asarray([2, 0, 3, 1])
    assert value(objective, logits[:, order], targets[:, order]) == pytest.approx(
        value(objective, logits, targets), rel=1e-6
    )
    mask = np.asarray([True, True, False, True, False, True])
    spoiled, poisoned = logits.copy(), targets.copy()
    spoiled[~mask], poisoned[~mask] = np.nan, np.inf
    gradient = jax.grad(lambda z: objective.loss({}, inputs(z, poisoned, mask))[0])(jnp.asarray(spoiled))
    assert np.isfinite(np.asarray(gradient)).all()
    assert not np.asarray(gradient)[~mask].any()
    assert value(objective, spoiled, poisoned, mask) == pytest.approx(
        value(objective, logits[mask], targets[mask]), rel=1e-6
    )
    assert value(objective, logits, targets, np.zeros(B, bool)) == 0.0


@pytest.mark.parametrize("name", TERMS)
def test_an_active_term_has_a_gradient_and_adds_up(name):
    sharp, targets = logits_of(scale=6.0), distributions(3)
    flat = 0.1 * logits_of()
    logits = flat if name == "spread" else sharp
    objective, plain = soft_label(categories=C, **TERMS[name]), soft_label(categories=C)
    terms = objective.terms({}, inputs(logits, targets))
    assert set(terms) == {"kl", name}
    total = sum(float(v) for _, v in terms.values())
    assert total == pytest.approx(value(objective, logits, targets), rel=1e-6)
    assert value(objective, logits, targets) != pytest.approx(value(plain, logits, targets), rel=1e-3)
    gradient = jax.grad(lambda z: objective.terms({}, inputs(z, targets))[name][1])(jnp.asarray(logits))
    assert np.abs(np.asarray(gradient)).max() > 1e-4


def test_a_term_of_weight_zero_is_not_built():
    """The spread of a batch of equal one-hot rows has no gradient without the floor in its root: nothing may touch
    it."""
    logits = np.tile(np.asarray([[200.0, 0.0, 0.0, 0.0]], np.float32), (B, 1))
    targets = distributions()
    assert set(soft_label(categories=C).terms({}, inputs(logits, targets))) == {"kl"}
    for objective in (soft_label(categories=C), everything()):
        gradient = jax.grad(lambda z, o=objective: o.loss({}, inputs(z, targets))[0])(jnp.asarray(logits))
        assert np.isfinite(np.asarray(gradient)).all()


def test_a_dead_penalty_has_exactly_no_gradient():
    """Entropies of logits of norm 1 stay above 1.0 nats for four categories: a threshold of 0.5 never acts."""
    objective = soft_label(categories=C, entropy_weight=5.0, min_entropy=0.5)

    def penalty(a):
        z = a / jnp.sqrt(jnp.sum(a * a, axis=-1, keepdims=True))
        return objective.terms({}, inputs(z, distributions()))["entropy"][1]

    got, gradient = jax.value_and_grad(penalty)(jnp.asarray(logits_of()))
    assert float(got) == 0.0
    assert not np.asarray(gradient).any()


def test_terms_pass_through_a_sum_with_their_weights():
    objective = combine(soft=(0.5, soft_label(categories=C, maxsup_weight=0.1)))
    found = objective.terms({}, inputs(logits_of(), distributions()))
    assert {k: pytest.approx(float(w)) for k, (w, _) in found.items()} == {"soft/kl": 0.5, "soft/maxsup": 0.05}
    total, _ = objective.loss({}, inputs(logits_of(), distributions()))
    assert sum(float(v) for _, v in found.values()) == pytest.approx(float(total), rel=1e-6)
    assert combine(one=(1.0, soft_label(categories=C)._replace(terms=None))).terms is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"categories": 1}, "at least 2 categories"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
        ({"entropy_weight": 1.0, "min_entropy": 1.5}, rf"can never be met.*ln {C} = {math.log(C):.3f}"),
        ({"maxsup_weight": -1.0}, "maxsup: expected a number >= 0"),
        ({"entropy_penalty": "cubic"}, "entropy_penalty: expected one of"),
        ({"class_weighting": "sample"}, r"one a category \(4\), got 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        soft_label(**{"categories": C, **options})
