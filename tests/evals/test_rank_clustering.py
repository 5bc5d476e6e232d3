"""Effective rank and clustering scores equal independent references and their known values."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from protojax.evals.clustering import (
    adjusted_rand_index,
    clustering_scores,
    hungarian_accuracy,
    normalised_mutual_information,
    pair_precision,
    purity,
)
from protojax.evals.rank import effective_rank, rank_summary, rankme, singular_values, spread


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (40, 40)])
@pytest.mark.parametrize("centred", [False, True])
def test_singular_values_equal_numpy_svd(shape, centred):
    features = np.random.default_rng(0).standard_normal(shape) + 1.0
    matrix = features - features.mean(axis=0, keepdims=True) if centred else features
    expected = np.linalg.svd(matrix, compute_uv=False)
    # A squared singular value is exact to about the size of the largest times 2^-52.
    tolerance = np.sqrt(expected[0] ** 2 * max(shape) * 2.0**-52)
    np.testing.assert_allclose(singular_values(features, centred=centred, block=16), expected, atol=2 * tolerance)


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    for rank in (1, 3, 16):
        equal = basis[:, :rank] @ basis[:rank]  # `rank` equal singular values
        assert effective_rank(equal) == pytest.approx(rank, rel=1e-9)
    shares = np.array([0.5, 0.25, 0.25])
    skewed = basis[:, :3] * shares[None, :] @ basis[:3]
    assert effective_rank(skewed) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-9)


def test_effective_rank_ignores_scale_and_rotation():
    rng = np.random.default_rng(1)
    features = rng.standard_normal((200, 20)) * np.linspace(0.1, 2, 20)[None, :]
    rotation, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    for centred in (False, True):
        base = effective_rank(features, centred=centred)
        assert effective_rank(1e4 * features @ rotation, centred=centred) == pytest.approx(base, rel=1e-9)


def test_a_common_direction_hides_rank_and_centring_shows_it():
    features = np.random.default_rng(2).standard_normal((400, 16)).astype(np.float32)
    cone = features + 1000.0 * np.eye(1, 16, dtype=np.float32)
    assert effective_rank(cone) < 1.3
    assert effective_rank(cone, centred=True) > 15


@pytest.mark.parametrize("constant", [0.0, 3.7, 1e8])
def test_constant_features_have_no_centred_rank(constant):
    features = np.full((30, 8), constant, np.float32)
    summary = rank_summary(features)
    assert summary["effective"] == 0.0
    assert summary["effective_uncentred"] == pytest.approx(1.0 if constant else 0.0)
    assert summary["std"] < 1e-12
    assert summary["mean_cosine"] == pytest.approx(1.0 if constant else 0.0)


def test_rankme_is_its_formula():
    features = np.random.default_rng(0).standard_normal((30, 6))
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    assert rankme(features) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), rel=1e-6)


def test_mean_cosine_equals_enumeration():
    features = np.random.default_rng(0).standard_normal((25, 4)) + 0.5
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert spread(features)["mean_cosine"] == pytest.approx(cosines[~np.eye(25, dtype=bool)].mean(), rel=1e-12)
    assert spread(features)["std"] == pytest.approx(unit.std(axis=0).mean(), rel=1e-12)


def test_attainable_rank():
    assert rank_summary(np.eye(5, 9))["attainable"] == 4
    assert rank_summary(np.random.default_rng(0).standard_normal((40, 9)))["attainable"] == 9


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"1 of 4 rows hold NaN or infinity \(first: row 2\)"):
        effective_rank(np.where(np.arange(4)[:, None] == 2, np.inf, np.ones((4, 3))))
    with pytest.raises(ValueError, match="expected a non-empty matrix"):
        effective_rank(np.ones((0, 3)))


# ----------------------------------------------------------------------------------------------- clustering
CASES = {
    "random": (np.random.default_rng(0).integers(0, 5, 300), np.random.default_rng(1).integers(0, 9, 300)),
    "related": (np.arange(300) % 6, (np.arange(300) % 6 + (np.random.default_rng(2).random(300) < 0.3)) % 7),
    "unbalanced": (np.where(np.arange(300) < 290, 0, 4), np.where(np.arange(300) % 50 == 0, 8, 2)),
    "renamed": (np.arange(30) % 3, 7 - np.arange(30) % 3),
    "one_cluster": (np.arange(30) % 3, np.zeros(30, int)),
    "all_apart": (np.arange(30) % 3, np.arange(30)),
    "both_constant": (np.zeros(10, int), np.ones(10, int)),
    "single_row": (np.zeros(1, int), np.zeros(1, int)),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_scikit_learn(case):
    labels, assignment = CASES[case]
    expected_nmi = metrics.normalized_mutual_info_score(labels, assignment)
    assert normalised_mutual_information(labels, assignment) == pytest.approx(expected_nmi, abs=1e-12)
    expected_ari = metrics.adjusted_rand_score(labels, assignment)
    assert adjusted_rand_index(labels, assignment) == pytest.approx(expected_ari, abs=1e-12)
    (_, apart), (_, together) = metrics.cluster.pair_confusion_matrix(labels, assignment)
    expected_precision = together / (together + apart) if together + apart else 1.0
    assert pair_precision(labels, assignment) == pytest.approx(expected_precision, abs=1e-12)


def test_hungarian_equals_enumeration_of_matchings():
    from itertools import permutations

    labels, assignment = CASES["related"]
    small = (labels < 4) & (assignment < 4)
    labels, assignment = labels[small], assignment[small]
    best = max(np.mean(np.array(p)[assignment] == labels) for p in permutations(range(4)))
    assert hungarian_accuracy(labels, assignment) == pytest.approx(best, rel=1e-15)
    majority = sum(np.bincount(labels[assignment == a]).max() for a in np.unique(assignment))
    assert purity(labels, assignment) == pytest.approx(majority / len(labels))


def test_shuffled_labels_are_at_chance():
    """The adjusted index has mean 0 over permutations: within 5 standard errors of 200 of them, unbalanced too."""
    rng = np.random.default_rng(0)
    for case in ("related", "unbalanced"):
        labels, assignment = CASES[case]
        found = [adjusted_rand_index(rng.permutation(labels), assignment) for _ in range(200)]
        assert abs(np.mean(found)) < 5 * np.std(found, ddof=1) / np.sqrt(200)


def test_renaming_changes_nothing_and_is_perfect():
    assert list(clustering_scores(*CASES["renamed"]).values()) == pytest.approx([1.0] * 5, abs=1e-15)


def test_empty_or_unequal_vectors_are_refused():
    with pytest.raises(ValueError, match="non-empty vectors of one length"):
        clustering_scores(np.zeros(0, int), np.zeros(0, int))
    with pytest.raises(ValueError, match="non-empty vectors of one length"):
        clustering_scores(np.zeros(3, int), np.zeros(4, int))
