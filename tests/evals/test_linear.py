"""Linear probes: the closed form is scikit-learn's ridge, choices never look at test, labels matter."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from protojax.evals.linear import (
    logistic_probe,
    logistic_weights,
    probabilities,
    ridge_probe,
    ridge_weights,
    softmax_probe,
)

SGD = {"num_classes": 3, "steps": 200, "batch_size": 64, "learning_rates": (0.03, 0.3)}


@pytest.fixture(scope="module")
def data():
    """Three overlapping Gaussian classes in 6 dimensions, on columns of very different scales and offsets."""
    rng = np.random.default_rng(0)
    means = 1.5 * rng.standard_normal((3, 6))
    labels = rng.permutation(np.arange(600) % 3)
    features = means[labels] + rng.standard_normal((600, 6))
    features = (features * 10.0 ** np.arange(-3, 3)[None, :] + 5.0).astype(np.float32)
    return features[:400], labels[:400], features[400:], labels[400:]


def test_ridge_weights_equal_scikit_learn(data):
    train, labels, _, _ = data
    decays = (1e-4, 1e-1, 10.0)
    weights, biases = ridge_weights(train, labels, decays, 4)  # class 3 has no example
    scale = train.astype(np.float64).var(axis=0).mean()
    for i, decay in enumerate(decays):
        model = Ridge(alpha=decay * scale * len(train), solver="svd").fit(train.astype(np.float64), np.eye(4)[labels])
        np.testing.assert_allclose(weights[i].T, model.coef_, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(biases[i], model.intercept_, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("decay", [1e-3, 1.0])
@pytest.mark.parametrize("case", ["random", "unbalanced", "duplicates"])
def test_logistic_weights_equal_scikit_learn(data, decay, case):
    """The objective is strictly convex in the weights: both find its minimum, to the tolerance of their gradients."""
    train, labels, _, _ = data
    train = (train[:120] - train.mean(axis=0)) / train.std(axis=0)
    labels = labels[:120] if case != "unbalanced" else np.where(np.arange(120) < 116, 1, np.arange(120) % 3)
    if case == "duplicates":
        train, labels = np.repeat(train[:30], 4, axis=0), np.tile([0, 1, 2, 0], 30)
    weights, biases = logistic_weights(train, labels, decay, 5)  # classes 3 and 4 have no row
    model = LogisticRegression(C=1 / (decay * 120), tol=1e-9, max_iter=5000).fit(train.astype(np.float64), labels)
    np.testing.assert_allclose((weights - weights[:, :3].mean(axis=1, keepdims=True)).T[:3], model.coef_, atol=1e-4)
    logits = train @ weights + biases[None, :]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        (shares / shares.sum(axis=1, keepdims=True))[:, :3], model.predict_proba(train), atol=2e-5
    )
    assert (biases[3:] == -np.inf).all()


def test_the_grid_trained_at_once_approaches_the_minimum(data):
    """200 steps of SGD end within 0.02 nat of where L-BFGS does, on the rows that both were fitted to."""
    train, labels, _, _ = data
    sgd = softmax_probe(train, labels, train, labels, **(SGD | {"learning_rates": (0.3,), "decays": (1e-2,)}))
    exact = logistic_probe(train, labels, train, labels, num_classes=3, decays=(1e-2,))
    nll = [-np.log(probabilities(r)[np.arange(400), labels]).mean() for r in (exact, sgd)]
    assert nll[1] == pytest.approx(nll[0], abs=0.02)


def test_one_class_is_all_that_can_be_said(data):
    train, labels, test, test_labels = data
    for probe in (ridge_probe, logistic_probe):
        result = probe(train, np.ones_like(labels), test, test_labels, num_classes=3)
        np.testing.assert_array_equal(result.correct, test_labels == 1)


def test_the_chosen_decay_is_best_on_held_out_train_and_test_labels_cannot_change_it(data):
    train, labels, test, test_labels = data
    result = ridge_probe(train, labels, test, test_labels, num_classes=3)
    best = max(accuracy for _, accuracy in result.held_out)
    assert result.chosen in [member for member, accuracy in result.held_out if accuracy == best]
    other = ridge_probe(train, labels, test, (test_labels + 1) % 3, num_classes=3)
    assert (other.chosen, other.held_out) == (result.chosen, result.held_out)
    assert result.accuracy == result.correct.mean()


def test_both_probes_find_what_logistic_regression_finds(data):
    """Three consistent linear classifiers on 400 rows agree to the noise of 200 test rows (4 standard deviations)."""
    train, labels, test, test_labels = data
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    reference = LogisticRegression(C=100.0, max_iter=1000).fit((train - mean) / std, labels)
    expected = reference.score((test - mean) / std, test_labels)
    softmax = softmax_probe(train, labels, test, test_labels, **SGD)
    assert expected > 0.8
    assert abs(softmax.accuracy - expected) < 4 * np.sqrt(expected * (1 - expected) / len(test))
    standardised = ((train - mean) / std).astype(np.float32), ((test - mean) / std).astype(np.float32)
    ridge = ridge_probe(standardised[0], labels, standardised[1], test_labels, num_classes=3)
    assert abs(ridge.accuracy - expected) < 4 * np.sqrt(expected * (1 - expected) / len(test))


def test_a_member_of_the_grid_does_not_depend_on_the_others(data):
    train, labels, test, test_labels = data
    options = {"num_classes": 3, "steps": 30, "batch_size": 32, "decays": (0.0,)}
    wide = softmax_probe(train, labels, test, test_labels, learning_rates=(0.01, 0.1), **options)
    alone = softmax_probe(train, labels, test, test_labels, learning_rates=(0.1,), **options)
    # Accuracies of the same 40 held-out rows; vmapped products may round differently, a row may flip.
    assert abs(dict((m["learning_rate"], a) for m, a in wide.held_out)[0.1] - alone.held_out[0][1]) <= 1 / 40


def test_probes_are_at_chance_on_shuffled_labels(data):
    train, _, test, _ = data
    rng = np.random.default_rng(1)
    labels, test_labels = rng.permutation(np.arange(400) % 3), rng.permutation(np.arange(200) % 3)
    bound = 5 * np.sqrt(2 / 9 / 200)
    for probe in (ridge_probe, logistic_probe):
        assert abs(probe(train, labels, test, test_labels, num_classes=3).accuracy - 1 / 3) < bound
    options = {"num_classes": 3, "steps": 30, "batch_size": 32, "decays": (0.0,), "learning_rates": (0.01, 0.1)}
    assert abs(softmax_probe(train, labels, test, test_labels, **options).accuracy - 1 / 3) < bound


@pytest.mark.parametrize(
    ("probe", "change", "message"),
    [
        (ridge_probe, {"decays": (0.0,)}, "decays: expected positive numbers"),
        (ridge_probe, {"held_out": 0.0}, "leaves one side empty"),
        (ridge_probe, {"num_classes": 2}, r"train labels: labels must be in 0\.\.1"),
        (logistic_probe, {"decays": ()}, "decays: expected positive numbers"),
        (softmax_probe, {"learning_rates": ()}, "expected positive learning_rates"),
        (softmax_probe, {"decays": (-1.0,)}, "decays >= 0"),
    ],
)
def test_bad_input_is_named(data, probe, change, message):
    with pytest.raises(ValueError, match=message):
        probe(*data, **({"num_classes": 3} | change))


def test_widths_must_agree(data):
    train, labels, test, test_labels = data
    with pytest.raises(ValueError, match="train features have width 6, test 5"):
        ridge_probe(train, labels, test[:, :5], test_labels, num_classes=3)
