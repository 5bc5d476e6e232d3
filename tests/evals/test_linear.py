"""Linear probes: the closed form is scikit-learn's ridge, choices never look at test, labels matter."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from protojax.evals.linear import ridge_probe, ridge_weights, softmax_probe


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
    softmax = softmax_probe(
        train, labels, test, test_labels, num_classes=3, steps=200, batch_size=64, learning_rates=(0.03, 0.3)
    )
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
    assert abs(ridge_probe(train, labels, test, test_labels, num_classes=3).accuracy - 1 / 3) < bound
    options = {"num_classes": 3, "steps": 30, "batch_size": 32, "decays": (0.0,), "learning_rates": (0.01, 0.1)}
    assert abs(softmax_probe(train, labels, test, test_labels, **options).accuracy - 1 / 3) < bound


@pytest.mark.parametrize(
    ("probe", "change", "message"),
    [
        (ridge_probe, {"decays": (0.0,)}, "decays: expected positive numbers"),
        (ridge_probe, {"held_out": 0.0}, "leaves one side empty"),
        (ridge_probe, {"num_classes": 2}, r"train labels: labels must be in 0\.\.1"),
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
