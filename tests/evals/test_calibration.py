"""Calibration equals scikit-learn and explicit enumeration; a calibrated predictor has none, and is told apart."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from protojax.evals.calibration import calibration_scores, classwise_ece, ece, fit_temperature, reliability


def prediction(rows: int = 400, classes: int = 4, seed: int = 0, scale: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [M,C], and labels drawn from them: calibrated by construction."""
    rng = np.random.default_rng(seed)
    probabilities = softmax(scale * rng.standard_normal((rows, classes)), axis=1)
    labels = (probabilities.cumsum(axis=1) < rng.random((rows, 1))).sum(axis=1)
    return probabilities, labels


def enumerate_ece(probabilities, labels, bins):
    """The definition, row by row."""
    inside = [[] for _ in range(bins)]
    for row, label in zip(probabilities, labels, strict=True):
        best = int(np.argmax(row))
        place = next(i for i in range(bins) if row[best] <= np.linspace(0, 1, bins + 1)[i + 1])
        inside[place].append((float(best == label), float(row[best])))
    return sum(abs(sum(a for a, _ in b) - sum(c for _, c in b)) for b in inside) / len(labels)


@pytest.mark.parametrize("case", ["random", "unbalanced", "ties", "on_edges", "certain", "one_row"])
@pytest.mark.parametrize("bins", [1, 5, 15])
def test_ece_equals_enumeration(case, bins):
    probabilities, labels = prediction(120)
    if case == "unbalanced":
        labels = np.where(np.arange(120) < 117, 2, 0)
    elif case == "ties":
        probabilities = np.full((120, 4), 0.25)
    elif case == "on_edges":
        probabilities = np.eye(4)[labels] * 0.2 + 0.2
    elif case == "certain":
        probabilities = np.eye(4)[(labels + (np.arange(120) % 3 == 0)) % 4]
    elif case == "one_row":
        probabilities, labels = probabilities[:1], labels[:1]
    assert ece(probabilities, labels, bins) == pytest.approx(enumerate_ece(probabilities, labels, bins), abs=1e-12)


def test_reliability_of_a_column_equals_scikit_learn():
    """Two classes, the predicted one's confidence as scikit-learn's binary curve over its non-empty bins."""
    probabilities, labels = prediction(500, 2)
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    for binning, strategy in (("width", "uniform"), ("mass", "quantile")):
        table = reliability(probabilities, labels, 10, binning=binning)
        accuracy, mean = calibration_curve(hit, confidence, n_bins=10, strategy=strategy)
        filled = [i for i, n in enumerate(table["count"]) if n]
        np.testing.assert_allclose([table["accuracy"][i] for i in filled], accuracy, atol=1e-12)
        np.testing.assert_allclose([table["confidence"][i] for i in filled], mean, atol=1e-12)
        assert sum(table["count"]) == 500
        assert all(table["accuracy"][i] is None for i in range(10) if i not in filled)


def test_scores_equal_scikit_learn():
    probabilities, labels = prediction()
    scores = calibration_scores(probabilities, labels)
    assert scores["nll"] == pytest.approx(log_loss(labels, probabilities), rel=1e-12)
    brier = sum(brier_score_loss(labels == c, probabilities[:, c]) for c in range(4))
    assert scores["brier"] == pytest.approx(brier, rel=1e-12)
    binary = np.mean([_column_ece(probabilities[:, c], labels == c) for c in range(4)])
    assert scores["ece_classwise"] == pytest.approx(binary, rel=1e-12)


def _column_ece(column, hit):
    accuracy, mean = calibration_curve(hit, column, n_bins=15)
    counts = np.histogram(column, np.linspace(0, 1, 16))[0]
    return float(np.abs(accuracy - mean) @ counts[counts > 0] / len(column))


def test_a_calibrated_predictor_has_none_and_an_overconfident_one_has_its_gap():
    """A bin's gap has mean below sqrt(1/(4 n_b)); over B bins the error's mean is below sqrt(B / (4 M))."""
    probabilities, labels = prediction(20_000)
    bound = 2.0 * np.sqrt(15 / (4 * 20_000))
    for binning in ("width", "mass"):
        assert ece(probabilities, labels, binning=binning) < bound
    rng = np.random.default_rng(1)
    certain = np.eye(2)[np.where(rng.random(5000) < 0.7, 0, 1)] * 0.98 + 0.01
    assert ece(certain, np.zeros(5000, int)) == pytest.approx(0.29, abs=0.03)  # in both bins: right 70%, sure 99%


def test_labels_that_say_nothing_leave_the_gap_to_chance():
    """Shuffled labels are right 1/C of the time: the error is confidence - 1/C within 5 standard deviations."""
    probabilities, labels = prediction(4000, scale=6.0)
    labels = np.random.default_rng(2).permutation(np.arange(4000) % 4)
    expected = probabilities.max(axis=1).mean() - 0.25
    assert abs(ece(probabilities, labels, 1) - expected) < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_one_hot_targets_are_labels_and_a_bayes_predictor_of_soft_ones_is_exact():
    probabilities, labels = prediction(90)
    for binning in ("width", "mass"):
        assert ece(probabilities, np.eye(4)[labels], binning=binning) == ece(probabilities, labels, binning=binning)
    scores = calibration_scores(probabilities, probabilities)
    assert max(scores[k] for k in ("ece", "ece_mass", "ece_classwise", "largest_gap", "brier")) < 1e-12


def test_the_order_of_rows_does_not_matter_even_with_ties():
    probabilities, labels = prediction(100)
    probabilities = np.round(probabilities @ np.eye(4) * 4) / 4 + 1e-9
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(100)
    for binning in ("width", "mass"):
        once = ece(probabilities, labels, 7, binning=binning)
        assert ece(probabilities[order], labels[order], 7, binning=binning) == pytest.approx(once, abs=1e-12)


def test_the_fitted_temperature_undoes_a_wrong_one():
    probabilities, labels = prediction(20_000)
    assert fit_temperature(3.0 * np.log(probabilities), labels) == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(np.log(probabilities), probabilities) == pytest.approx(1.0, rel=1e-6)
    assert fit_temperature(5.0 * np.eye(3), np.arange(3)) == pytest.approx(0.01)  # separable: as sharp as allowed


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32])
def test_short_floats_are_read_as_they_are(dtype):
    probabilities, labels = prediction(50)
    short = probabilities.astype(dtype)
    assert ece(short, labels) == ece(short.astype(np.float64), labels)


def test_one_class_is_always_right():
    assert calibration_scores(np.ones((5, 1)), np.zeros(5, int))["ece"] == 0.0
    assert classwise_ece(np.ones((5, 1)), np.zeros(5, int)) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": np.zeros((0, 3))}, "expected a non-empty matrix"),
        ({"probabilities": np.full((4, 3), np.nan)}, r"4 of 4 rows hold NaN or infinity \(first: row 0\)"),
        ({"probabilities": np.arange(12.0).reshape(4, 3)}, "are these logits"),
        ({"probabilities": np.tile([1.5, -0.5, 0.0], (4, 1))}, "smallest entry -0.5"),
        ({"labels": np.array([0, 1, 2, 3])}, r"labels must be in 0\.\.2, got 0\.\.3"),
        ({"labels": np.zeros(3, int)}, "expected 4 integer labels"),
        ({"labels": np.full((4, 2), 0.5)}, r"targets: expected shape \(4, 3\)"),
        ({"bins": 0}, "bins: expected a whole number >= 1"),
        ({"binning": "log"}, "binning must be 'width' or 'mass'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"probabilities": np.full((4, 3), 1 / 3), "labels": np.arange(4) % 3, "bins": 5} | change
    with pytest.raises(ValueError, match=message):
        ece(**arguments)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite non-empty matrix"):
        fit_temperature(np.array([[np.inf, 0.0]]), np.zeros(1, int))
