"""Few-shot draws and centroids equal enumeration; k-means takes scikit-learn's steps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from sklearn.cluster import KMeans

from protojax.evals.clustering import adjusted_rand_index, hungarian_accuracy
from protojax.evals.few_shot import centroid_predict, draw_shots, few_shot_accuracy
from protojax.evals.kmeans import kmeans
from protojax.evals.knn import knn_predict
from protojax.evals.neighbours import unit_rows


def blobs(rows: int, classes: int, width: int = 6, apart: float = 4.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    centres = apart * np.random.default_rng(99).standard_normal((classes, width))
    labels = rng.permutation(np.arange(rows) % classes)
    return (centres[labels] + rng.standard_normal((rows, width))).astype(np.float32), labels


# ------------------------------------------------------------------------------------------------- few-shot
def test_draws_are_nested_seeded_and_do_not_depend_on_other_classes():
    labels = np.repeat([0, 1, 2], [40, 3, 12])
    one, five = draw_shots(labels, 1, 0), draw_shots(labels, 5, 0)
    np.testing.assert_array_equal(np.bincount(labels[five]), [5, 3, 5])  # class 1 has three only
    assert set(one) < set(five)
    assert set(draw_shots(np.where(labels == 2, 7, labels), 5, 0)[:5]) == set(five[:5])
    assert set(draw_shots(labels, 5, 1)) != set(five)


def test_centroids_equal_enumeration_with_ties_duplicates_and_a_missing_class():
    rng = np.random.default_rng(0)
    bank, labels = rng.integers(-1, 2, (30, 4)).astype(np.float32), rng.choice([0, 1, 3], 30)
    queries = rng.integers(-1, 2, (25, 4)).astype(np.float32)
    found = centroid_predict(bank, labels, queries, num_classes=5)
    for query, given in zip(queries, found, strict=True):
        scores = {}
        for c in (0, 1, 3):
            mean = unit_rows(bank[labels == c]).mean(axis=0)
            size = np.linalg.norm(query) * np.linalg.norm(mean)
            scores[c] = round(float(query @ mean / size) * 2**24) if size else 0
        assert given == min(c for c in scores if scores[c] == max(scores.values()))


def test_one_shot_is_the_nearest_neighbour():
    bank, labels = blobs(60, 4, apart=1.0)
    queries, query_labels = blobs(50, 4, apart=1.0, seed=1)
    result = few_shot_accuracy(bank, labels, queries, query_labels, num_classes=4, shots=(1,), seeds=(0, 1))
    for seed, accuracy in zip((0, 1), result["1"]["runs"], strict=True):
        rows = draw_shots(labels, 1, seed)
        nearest = knn_predict(bank[rows], labels[rows], queries, num_classes=4, ks=(1,))[1]
        assert accuracy == (nearest == query_labels).mean()


@pytest.mark.parametrize("classifier", ["centroid", "logistic"])
def test_more_shots_of_separated_classes_win_and_shuffled_labels_are_at_chance(classifier):
    bank, labels = blobs(200, 5)
    queries, query_labels = blobs(400, 5, seed=1)
    options = {"num_classes": 5, "classifier": classifier}
    result = few_shot_accuracy(bank, labels, queries, query_labels, **options)
    assert result["10"]["mean"] > 0.95
    assert result["10"]["mean"] >= result["1"]["mean"]
    assert result["5"]["rows"] == 25
    # Queries of every class say the same, whatever the shuffled bank taught: Binomial(400, 1/5) given the predictions.
    shuffled = np.random.default_rng(2).permutation(query_labels)
    chance = few_shot_accuracy(bank, labels, queries, shuffled, seeds=(0,), **options)
    for n in ("1", "5", "10"):
        assert abs(chance[n]["mean"] - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 400)


def test_queries_of_a_class_that_the_bank_lacks_are_wrong():
    bank, labels = blobs(40, 4)
    for classifier in ("centroid", "logistic"):
        result = few_shot_accuracy(
            bank[labels < 3], labels[labels < 3], bank, labels, num_classes=4, shots=(50,), seeds=(0,),
            classifier=classifier,
        )  # fmt: skip
        assert result["50"] == {"mean": 0.75, "std": None, "runs": [0.75], "rows": 30, "short": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": (0,)}, "expected positive shots"),
        ({"seeds": ()}, "at least one seed"),
        ({"classifier": "svm"}, "classifier must be 'centroid' or 'logistic'"),
        ({"num_classes": 3}, r"bank_labels: labels must be in 0\.\.2"),
        ({"queries": np.ones((40, 5))}, "queries have width 6, the bank has width 5"),
    ],
)
def test_few_shot_names_bad_input(change, message):
    bank, labels = blobs(40, 4)
    arguments = {"bank": bank, "bank_labels": labels, "queries": bank, "query_labels": labels, "num_classes": 4}
    with pytest.raises(ValueError, match=message):
        few_shot_accuracy(**(arguments | change))


# -------------------------------------------------------------------------------------------------- k-means
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kmeans_takes_the_steps_of_scikit_learn(seed):
    rows, _ = blobs(150, 5, apart=1.0, seed=seed)
    rows = rows.astype(np.float64)
    start = rows[np.random.default_rng(seed).permutation(150)[:5]]
    mine = kmeans(rows, 5, start=start)
    reference = KMeans(5, init=start, n_init=1, tol=0.0, max_iter=100, algorithm="lloyd").fit(rows)
    np.testing.assert_array_equal(mine.assignment, reference.labels_)
    np.testing.assert_allclose(mine.centres, reference.cluster_centers_, atol=1e-10)
    assert mine.inertia == pytest.approx(reference.inertia_, rel=1e-12)


def test_kmeans_finds_separated_clusters_and_repeats_itself():
    rows, labels = blobs(120, 4, apart=8.0)
    found = kmeans(rows, 4)
    assert adjusted_rand_index(labels, found.assignment) == 1.0
    assert hungarian_accuracy(labels, found.assignment) == 1.0
    again = kmeans(rows, 4)
    np.testing.assert_array_equal(again.assignment, found.assignment)


def test_more_restarts_never_raise_the_inertia_and_steps_never_do():
    rows, _ = blobs(80, 6, apart=0.5)
    one, five = kmeans(rows, 6, restarts=1), kmeans(rows, 6, restarts=5)
    assert five.inertia <= one.inertia
    start = rows[:6]
    inertia = [kmeans(rows, 6, start=start, iterations=n).inertia for n in range(1, 8)]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(inertia))


def test_a_cluster_that_loses_all_rows_moves_to_the_farthest():
    rows = np.array([[0.0, 0], [0, 1], [1, 0], [50, 50]])
    found = kmeans(rows, 2, start=np.array([[0.0, 0.0], [-900.0, -900.0]]))
    np.testing.assert_array_equal(found.assignment, [0, 0, 0, 1])


def test_duplicates_fewer_than_clusters_are_clusters_of_no_inertia():
    found = kmeans(np.repeat(np.eye(2), 5, axis=0), 4)
    assert found.inertia == 0.0
    assert len(np.unique(found.assignment[:5])) == len(np.unique(found.assignment[5:])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((3, 2)), 4), r"clusters: expected a number in 1\.\.3"),
        ((np.ones((3, 2)), 2, 0), "restarts >= 1"),
        ((np.full((3, 2), np.nan), 1), "3 of 3 rows hold NaN"),
    ],
)
def test_kmeans_names_bad_input(arguments, message):
    rows, clusters, *restarts = arguments
    with pytest.raises(ValueError, match=message):
        kmeans(rows, clusters, **({"restarts": restarts[0]} if restarts else {}))
    with pytest.raises(ValueError, match=r"start: expected shape \(2, 2\)"):
        kmeans(np.ones((3, 2)), 2, start=np.ones((1, 2)))
