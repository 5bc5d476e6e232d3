"""Retrieval equals the mean over every order of tied rows, by enumeration, and scikit-learn where nothing ties."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from protojax.evals.neighbours import all_cosines, nearest_rows
from protojax.evals.retrieval import (
    best_positive,
    expected_average_precision,
    expected_rank,
    expected_recall,
    retrieve,
)


def enumerate_orders(scores, positive, ks):
    """(R@k for each k, average precision, rank of the first positive): means over all orders that the scores allow."""
    rows = [j for j in range(len(scores)) if np.isfinite(scores[j])]
    found = []
    for order in permutations(rows):
        if any(scores[a] < scores[b] for a, b in pairwise(order)):
            continue
        hits = np.array([positive[j] for j in order], float)
        precision = np.sum(hits * hits.cumsum() / np.arange(1, len(hits) + 1)) / hits.sum()
        found.append([*(float(hits[:k].any()) for k in ks), precision, float(np.argmax(hits) + 1)])
    return np.mean(found, axis=0)


@pytest.mark.parametrize(
    "scores",
    [
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
        [0.9, 0.5, 0.5, 0.5, 0.1, 0.1],
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
        [0.2, 0.2, 0.9, 0.9, -np.inf, 0.2],
    ],
)
def test_numbers_are_means_over_all_orders_of_tied_rows(scores):
    for bits in range(1, 64):
        positive = np.array([bool(bits >> j & 1) for j in range(6)]) & np.isfinite(scores)
        if not positive.any():
            continue
        table, mask = np.array([scores]), positive[None, :]
        best = best_positive(table, mask)
        given = [expected_recall(best, k)[0] for k in (1, 2, 3, 6)]
        given += [expected_average_precision(table, mask)[0], expected_rank(best)[0]]
        np.testing.assert_allclose(given, enumerate_orders(np.array(scores), positive, (1, 2, 3, 6)), atol=1e-12)


def test_average_precision_equals_scikit_learn_without_ties():
    rng = np.random.default_rng(0)
    queries, gallery = rng.standard_normal((20, 6)), rng.standard_normal((80, 6))
    labels, gallery_labels = rng.integers(0, 4, 20), rng.integers(0, 4, 80)
    result = retrieve(queries, labels, gallery, gallery_labels, num_classes=4)
    cosines = np.concatenate([c for _, c in all_cosines(queries, gallery)])
    expected = [average_precision_score(gallery_labels == y, c) for y, c in zip(labels, cosines, strict=True)]
    np.testing.assert_allclose(result.average_precision, expected, atol=1e-12)
    nearest = nearest_rows(queries, gallery, 10).indices
    for k in (1, 5, 10):
        hit = (gallery_labels[nearest[:, :k]] == labels[:, None]).any(axis=1)
        np.testing.assert_allclose(result.recall[k], hit, atol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_a_constant_encoder_is_exactly_at_chance(constant):
    """One positive among M = 50: R@k = k / M and mean rank (M + 1) / 2, whatever the order of rows."""
    features, labels = np.full((50, 3), constant, np.float32), np.arange(50)
    means = retrieve(features, labels, features, labels, num_classes=50).means()
    assert means["recall"] == {"1": pytest.approx(1 / 50), "5": pytest.approx(5 / 50), "10": pytest.approx(10 / 50)}
    assert means["mean_rank"] == pytest.approx(25.5)
    assert means["map"] == pytest.approx(np.mean(1 / np.arange(1, 51)))


def test_shuffled_labels_are_at_chance():
    """Hits on labels that say nothing are Binomial(Q, 1/C): within 5 standard deviations."""
    rng = np.random.default_rng(1)
    queries, gallery = rng.standard_normal((500, 8)), rng.standard_normal((300, 8))
    labels, gallery_labels = rng.permutation(np.arange(500) % 5), rng.permutation(np.arange(300) % 5)
    means = retrieve(queries, labels, gallery, gallery_labels, num_classes=5).means()
    assert abs(means["recall"]["1"] - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 500)


def test_a_query_in_the_gallery_is_left_out_of_its_own_ranking():
    features, labels = np.random.default_rng(2).standard_normal((12, 4)), np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3])
    result = retrieve(features, labels, features, labels, num_classes=4, ks=(1,), own=np.arange(12))
    for i in range(11):
        others = np.delete(np.arange(12), i)
        alone = retrieve(
            features[i : i + 1], labels[i : i + 1], features[others], labels[others], num_classes=4, ks=(1,)
        )
        assert result.recall[1][i] == alone.recall[1][0]
        assert result.average_precision[i] == pytest.approx(alone.average_precision[0], rel=1e-12)
    assert np.isnan(result.rank[11])  # the only one of its class
    assert (result.without, result.means()["queries"]) == (1, 11)


def test_blocks_change_nothing_and_duplicates_tie():
    rng = np.random.default_rng(3)
    gallery = np.tile(rng.standard_normal((20, 5)), (3, 1)).astype(np.float16)
    whole = np.concatenate([c for _, c in all_cosines(gallery, gallery)])
    parts = np.concatenate([c for _, c in all_cosines(gallery, gallery, entries=130)])
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_array_equal(whole[:, :20], whole[:, 40:])


def test_scores_within_the_tolerance_are_equal():
    scores, positive = np.array([[0.5, 0.5 + 1e-7, 0.4]]), np.array([[True, False, False]])
    assert expected_rank(best_positive(scores, positive))[0] == 2.0
    assert expected_rank(best_positive(scores, positive, tolerance=1e-6))[0] == 1.5


def test_ties_are_chains_so_that_a_constant_side_is_at_chance_however_its_scores_are_spaced():
    for step in (0.4e-6, 0.8e-6, 1.6e-6):
        scores = np.tile(0.5 + step * np.random.default_rng(0).permutation(40), (40, 1))  # all queries score alike
        scores[:, :7] = 0.3, 0.3, 0.3 + 0.9e-6, 0.7, 0.7 + 0.5e-6, 0.7 + 1.4e-6, -0.2
        best = best_positive(scores, np.eye(40, dtype=bool), tolerance=1e-6)
        for k in (1, 5, 10, 40):
            np.testing.assert_allclose(expected_recall(best, k).mean(), k / 40, rtol=1e-12)
        np.testing.assert_allclose(expected_rank(best).mean(), 20.5, rtol=1e-12)


def test_chains_keep_rows_outside_the_gallery_and_queries_without_a_positive_apart():
    scores = np.array([[0.5, 0.5 + 9e-7, 0.5 + 18e-7, -np.inf, 0.1], [-np.inf] * 5, [0.2, 0.1, -np.inf, -np.inf, 0.3]])
    positive = np.zeros((3, 5), bool)
    positive[0, 0] = positive[1, 1] = True
    best = best_positive(scores, positive, tolerance=1e-6)
    assert [part.tolist() for part in best] == [[0, 0, 0], [3, 0, 0], [1, 0, 0]]


def test_no_class_in_common_gives_no_number():
    means = retrieve(
        np.ones((2, 2)), np.zeros(2, int), np.ones((3, 2)), np.ones(3, int), num_classes=2, ks=(1,)
    ).means()
    assert (means["map"], means["recall"], means["without"]) == (None, {"1": None}, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (1, 7)}, r"numbers of retrieved rows in 1\.\.6, got \(1, 7\)"),
        ({"ks": ()}, "numbers of retrieved rows"),
        ({"query_labels": np.array([0, 3])}, r"query_labels: labels must be in 0\.\.2, got 0\.\.3"),
        ({"gallery_labels": np.zeros(5, int)}, "gallery_labels: expected 6 integer labels"),
        ({"queries": np.ones((2, 5))}, "queries have width 5, the bank has width 4"),
        ({"gallery": np.full((6, 4), np.nan)}, "6 of 6 rows hold NaN"),
        ({"own": np.array([0, 6])}, "own: expected 2 row numbers of the gallery"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "queries": np.ones((2, 4)), "query_labels": np.arange(2), "gallery": np.ones((6, 4)),
        "gallery_labels": np.arange(6) % 3, "num_classes": 3, "ks": (1,),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        retrieve(**arguments)


def test_scores_that_are_no_ranking_are_refused():
    with pytest.raises(ValueError, match="expected one shape"):
        best_positive(np.ones((2, 3)), np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="got NaN"):
        best_positive(np.array([[np.nan]]), np.ones((1, 1), bool))
    with pytest.raises(ValueError, match="k: expected a positive number"):
        expected_recall(best_positive(np.ones((1, 1)), np.ones((1, 1), bool)), 0)
