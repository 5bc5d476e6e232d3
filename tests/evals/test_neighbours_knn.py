"""k-NN equals explicit enumeration and scikit-learn; ties, duplicates and blocks change nothing."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from protojax.evals.knn import accuracy_by_group, knn_accuracy, knn_predict
from protojax.evals.neighbours import GRID, nearest_rows, unit_rows


def features(seed: int, rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def enumerate_votes(bank, labels, query, k, temperature, classes):
    """The definition, one query at a time, in exact integers for the order and math.exp for the votes."""
    cosine = unit_rows(query[None, :]) @ unit_rows(bank).T
    order = sorted(range(len(bank)), key=lambda j: (-round(float(cosine[0, j]) * GRID), j))[:k]
    votes = np.zeros(classes)
    for j in order:
        votes[labels[j]] += np.exp(round(float(cosine[0, j]) * GRID) / GRID / temperature)
    return int(np.flatnonzero(votes >= votes.max() * (1 - 1e-12))[0])


def test_equals_scikit_learn_on_random_features():
    bank, queries = features(0, 300, 12), features(1, 97, 12)
    labels = np.random.default_rng(2).integers(0, 7, 300)
    predicted = knn_predict(bank, labels, queries, num_classes=7, ks=(1, 10, 100, 300), block=32)
    for k in predicted:
        model = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1.0 - d) / 0.07)
        ).fit(bank.astype(np.float64), labels)
        np.testing.assert_array_equal(predicted[k], model.predict(queries.astype(np.float64)))


@pytest.mark.parametrize("case", ["duplicates", "integers", "one_class", "unbalanced", "zero_rows"])
def test_equals_enumeration_on_adversarial_cases(case):
    rng = np.random.default_rng(3)
    bank, queries = features(4, 60, 5), features(5, 20, 5)
    labels, classes = rng.integers(0, 4, 60), 4
    if case == "duplicates":
        bank = np.repeat(bank[:6], 10, axis=0)
        queries[:6] = bank[::10]
    elif case == "integers":  # many exact ties between different rows
        bank = rng.integers(-1, 2, (60, 5)).astype(np.float32)
        queries = rng.integers(-1, 2, (20, 5)).astype(np.float32)
    elif case == "one_class":
        labels[:] = 2
    elif case == "unbalanced":
        labels = np.where(np.arange(60) < 57, 3, np.arange(60) - 57)
    else:
        bank[::3], queries[:4] = 0.0, 0.0
    predicted = knn_predict(bank, labels, queries, num_classes=classes, ks=(1, 3, 20, 60), block=7)
    for k in predicted:
        expected = [enumerate_votes(bank, labels, q, k, 0.07, classes) for q in queries]
        np.testing.assert_array_equal(predicted[k], expected)


def test_neighbour_ties_go_to_the_lowest_index_and_class_ties_to_the_lowest_class():
    bank = np.ones((9, 4), np.float32)
    found = nearest_rows(np.ones((2, 4), np.float32), bank, 5, block=1, bank_block=2)
    np.testing.assert_array_equal(found.indices, np.tile(np.arange(5), (2, 1)))
    np.testing.assert_array_equal(found.cosines, 1.0)
    labels = np.array([5, 2, 5, 2, 1, 1, 0, 0, 0])
    predicted = knn_predict(bank, labels, bank[:1], num_classes=6, ks=(1, 4, 6))
    assert {k: int(v[0]) for k, v in predicted.items()} == {1: 5, 4: 2, 6: 1}


@pytest.mark.parametrize(("block", "bank_block"), [(1, 400), (64, 37), (13, 1), (512, 399)])
def test_blocks_do_not_change_a_bit(block, bank_block):
    bank = np.concatenate([features(0, 200, 33), features(0, 200, 33)])  # every row twice
    queries = features(1, 50, 33)
    whole = nearest_rows(queries, bank, 21, block=1024, bank_block=8192)
    parts = nearest_rows(queries, bank, 21, block=block, bank_block=bank_block)
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_array_equal(parts.cosines, whole.cosines)


def test_cosines_are_right_to_half_a_grid_step_at_any_scale():
    bank, queries = features(0, 40, 6) * np.float32(1e-30), features(1, 5, 6) * np.float32(1e30)
    found = nearest_rows(queries, bank, 40)
    for q, (row, cosines) in enumerate(zip(found.indices, found.cosines, strict=True)):
        for j, c in zip(row, cosines, strict=True):
            a, b = queries[q].astype(np.float64) * 1e-30, bank[j].astype(np.float64) * 1e30
            assert abs(c - a @ b / np.sqrt(a @ a * (b @ b))) <= 0.5 / GRID + 1e-12
        assert sorted(row.tolist()) == list(range(40))


def test_shuffled_labels_are_at_chance():
    """The hits on labels that say nothing are Binomial(Q, 1/C): within 5 standard deviations of the mean."""
    classes, count = 5, 1000
    rng = np.random.default_rng(0)
    bank_labels, labels = rng.permutation(np.arange(600) % classes), rng.permutation(np.arange(count) % classes)
    accuracy, _ = knn_accuracy(
        features(1, 600, 8), bank_labels, features(2, count, 8), labels, num_classes=classes, ks=(1, 20, 200)
    )
    sigma = np.sqrt(1 / classes * (1 - 1 / classes) / count)
    for value in accuracy.values():
        assert abs(value - 1 / classes) < 5 * sigma


def test_separated_classes_are_perfect_and_correctness_is_per_query():
    centres = np.eye(4, 6, dtype=np.float32)
    labels = np.arange(80) % 4
    bank = centres[labels] + 0.05 * features(0, 80, 6)
    wrong = labels.copy()
    wrong[3] = (wrong[3] + 1) % 4
    accuracy, correct = knn_accuracy(bank, labels, bank, wrong, num_classes=4, ks=(10,))
    assert accuracy[10] == 79 / 80
    np.testing.assert_array_equal(np.flatnonzero(~correct[10]), [3])


def test_small_temperatures_do_not_overflow():
    bank, labels = features(0, 30, 4), np.arange(30) % 3
    nearest = knn_predict(bank, labels, bank, num_classes=3, ks=(1, 30), temperature=1e-5)
    np.testing.assert_array_equal(nearest[30], nearest[1])  # all weight is on the nearest


def test_clamp_uses_every_row():
    bank, labels = features(0, 30, 4), np.arange(30) % 3
    both = knn_predict(bank, labels, bank, num_classes=3, ks=(30, 200), clamp=True)
    np.testing.assert_array_equal(both[200], both[30])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (10, 31)}, r"k = \[31\] is larger than the bank of 30 rows"),
        ({"ks": ()}, "ks: expected positive numbers"),
        ({"ks": (0, 5)}, "ks: expected positive numbers"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"num_classes": 2}, r"labels must be in 0\.\.1, got 0\.\.2"),
        ({"bank_labels": np.zeros(29, np.int64)}, "expected 30 integer labels"),
        ({"bank_labels": np.zeros(30, np.float32)}, "expected 30 integer labels"),
        ({"queries": np.zeros((3, 5), np.float32)}, "queries have width 5, the bank has width 4"),
        ({"queries": np.zeros((0, 4), np.float32), "query_labels": np.zeros(0, np.int64)}, "at least one row"),
        ({"queries": np.full((3, 4), np.nan, np.float32)}, "3 of 3 rows hold NaN or infinity"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "bank": features(0, 30, 4), "bank_labels": np.arange(30) % 3, "queries": features(1, 3, 4),
        "query_labels": np.zeros(3, np.int64), "num_classes": 3, "ks": (10,), "temperature": 0.07,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**arguments)


def test_nearest_rows_refuses_a_k_outside_the_bank():
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        nearest_rows(features(0, 2, 3), features(1, 4, 3), 5)


# --------------------------------------------------------------------------------------------------- groups
def test_groups_equal_enumeration_in_fractions():
    rng = np.random.default_rng(0)
    labels = rng.choice(6, size=200, p=[0.5, 0.25, 0.15, 0.06, 0.04, 0.0])
    correct = rng.random(200) < 0.4
    groups = {"head": np.array([0, 1]), "medium": [2], "tail": [3, 4, 5], "none": []}
    result = accuracy_by_group(correct, labels, groups)

    def share(mask):
        return Fraction(int(correct[mask].sum()), int(mask.sum()))

    for name, ids in groups.items():
        seen = [c for c in ids if (labels == c).any()]
        if not seen:
            assert result[name] is None
            assert result["macro"][name] is None
            continue
        assert result[name] == pytest.approx(float(share(np.isin(labels, ids))), rel=1e-15)
        assert result["macro"][name] == pytest.approx(float(sum(share(labels == c) for c in seen) / len(seen)))
    assert result["micro"] == pytest.approx(correct.mean())
    assert result["balanced"] == pytest.approx(float(sum(share(labels == c) for c in range(5)) / 5))


def test_a_class_in_two_groups_is_refused():
    with pytest.raises(ValueError, match=r"classes \[1\] are in more than one"):
        accuracy_by_group(np.ones(3, bool), np.arange(3), {"head": [0, 1], "tail": [1, 2]})


def test_lengths_of_correct_and_labels_must_agree():
    with pytest.raises(ValueError, match="vectors of one length"):
        accuracy_by_group(np.ones(3, bool), np.arange(4), {})
