"""Uniformity, alignment and LiDAR equal enumeration and a generalised eigenproblem; transfer keeps what is shared."""

from __future__ import annotations

import numpy as np
import pytest
from ml_dtypes import bfloat16
from scipy.linalg import eigh

from protojax.api import FeatureBank
from protojax.evals.few_shot import centroid_predict
from protojax.evals.geometry import alignment, lidar, uniformity
from protojax.evals.kmeans import kmeans
from protojax.evals.knn import knn_predict
from protojax.evals.linear import logistic_probe, ridge_probe
from protojax.evals.rank import rank_summary
from protojax.evals.retrieval import retrieve
from protojax.evals.transfer import restrict, shared_classes


def cloud(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_uniformity_equals_enumeration_of_pairs(block):
    features = np.concatenate([cloud(20, 5), cloud(20, 5)])  # every row twice
    rows = unit(features.astype(np.float64))
    pairs = [np.exp(-2 * np.sum((rows[i] - rows[j]) ** 2)) for i in range(40) for j in range(i)]
    assert uniformity(features, block=block) == pytest.approx(np.log(np.mean(pairs)), rel=1e-12)


def test_uniformity_of_known_clouds():
    assert uniformity(np.ones((10, 4))) == pytest.approx(0.0, abs=1e-12)
    assert uniformity(np.array([[1.0, 0], [-1.0, 0]]), t=3.0) == pytest.approx(-12.0)
    spread, cone = cloud(300, 16), cloud(300, 16) + 3.0
    assert uniformity(spread) < uniformity(cone) < 0


def test_alignment_equals_enumeration():
    views = cloud(15, 4, 6)
    rows = unit(views.astype(np.float64))
    for alpha in (1.0, 2.0):
        gaps = [np.linalg.norm(rows[i, a] - rows[i, b]) ** alpha for i in range(15) for a in range(4) for b in range(a)]
        assert alignment(views, alpha) == pytest.approx(np.mean(gaps), rel=1e-12)
    assert alignment(np.repeat(views[:, :1], 3, axis=1)) == pytest.approx(0.0, abs=1e-12)
    assert alignment(cloud(4000, 2, 64)) == pytest.approx(2.0, abs=0.02)  # unrelated views


@pytest.mark.parametrize("shape", [(40, 6, 5), (4, 3, 12)])
def test_lidar_is_the_entropy_of_a_generalised_eigenproblem(shape):
    views = cloud(*shape) + 2.0 * cloud(shape[0], 1, shape[2], seed=1)
    x = views.astype(np.float64)
    means = x.mean(axis=1)
    between = np.cov(means.T, bias=True)
    within = sum(np.outer(r, r) for r in (x - means[:, None]).reshape(-1, shape[2])) / (shape[0] * shape[1])
    values = np.maximum(eigh(between, within + 1e-2 * np.eye(shape[2]), eigvals_only=True), 0.0)
    shares = values / values.sum() + 1e-7
    expected = np.exp(-np.sum(shares * np.log(shares)))
    assert lidar(views, delta=1e-2) == pytest.approx(expected, rel=1e-4)
    assert lidar(views) <= min(shape[0] - 1, shape[2]) + 1e-3


def test_lidar_counts_the_directions_that_tell_images_apart():
    """Orthogonal images in a space of which the rest is noise of views: as many as there are such directions."""
    rng = np.random.default_rng(0)
    for rank in (2, 5):
        signs = np.array([[1 if i >> b & 1 else -1 for b in range(rank)] for i in range(2**rank)])
        views = 1e-2 * rng.standard_normal((2**rank, 40, 12))
        views[:, :, :rank] += signs[:, None, :]
        assert lidar(views) == pytest.approx(rank, rel=0.02)
        # A linear map of the features changes nothing but what delta hides.
        assert lidar(views @ rng.standard_normal((12, 12)), delta=1e-9) == pytest.approx(rank, rel=0.02)
    assert lidar(np.tile(views[:1], (7, 1, 1))) == 0.0


@pytest.mark.parametrize(
    ("function", "views", "message"),
    [
        (lidar, np.ones((4, 1, 3)), r"lidar: expected views \[images, views >= 2, width\]"),
        (lidar, np.ones((1, 3, 3)), "at least two images"),
        (alignment, np.ones((4, 3)), r"alignment: expected views .* got shape \[4, 3\]"),
        (alignment, np.full((2, 2, 3), np.nan), "alignment: views: 4 of 4 rows hold NaN"),
        (uniformity, np.ones((1, 3)), "at least two rows"),
    ],
)
def test_bad_input_is_named(function, views, message):
    with pytest.raises(ValueError, match=message):
        function(views)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_short_floats_are_read_as_the_numbers_that_they_are(dtype):
    """Every function of features, zero rows and duplicates among them."""
    rows = np.concatenate([cloud(30, 6), cloud(8, 6), np.zeros((2, 6), np.float32)]).astype(dtype)
    labels, same = np.arange(40) % 4, rows.astype(np.float32)
    functions = [
        lambda x: knn_predict(x, labels, x, num_classes=4, ks=(5,))[5],
        lambda x: retrieve(x, labels, x, labels, num_classes=4, ks=(3,)).average_precision,
        lambda x: centroid_predict(x, labels, x, num_classes=4),
        lambda x: kmeans(x, 3, restarts=1).centres,
        lambda x: logistic_probe(x, labels, x, labels, num_classes=4, decays=(0.1,)).scores,
        lambda x: ridge_probe(x, labels, x, labels, num_classes=4).scores,
        lambda x: [uniformity(x), lidar(x.reshape(10, 4, 6)), *rank_summary(x).values()],
    ]
    for function in functions:
        np.testing.assert_array_equal(function(rows), function(same))


# ------------------------------------------------------------------------------------------------- transfer
def test_shared_classes_are_matched_by_name():
    shared = shared_classes(("cat", "dog", "emu"), ("emu ", "ant", "cat"))
    assert shared.names == ("cat", "emu")
    np.testing.assert_array_equal(shared.first, [0, 2])
    np.testing.assert_array_equal(shared.second, [2, 0])
    with pytest.raises(ValueError, match="name no class alike"):
        shared_classes(("cat",), ("dog",))
    with pytest.raises(ValueError, match="'cat' occurs twice"):
        shared_classes(("cat", "cat"), ("cat",))


def test_a_restricted_bank_holds_the_shared_classes_renumbered():
    labels = np.array([2, 0, 1, 2, 1])
    bank = FeatureBank(
        cloud(5, 3), cloud(5, 2), {"fine": labels, "coarse": labels}, np.arange(5), {"text": cloud(5, 4)}
    )
    kept = restrict(bank, "fine", np.array([2, 0]))
    np.testing.assert_array_equal(kept.positions, [0, 1, 3])
    np.testing.assert_array_equal(kept.labels["fine"], [0, 1, 0])
    np.testing.assert_array_equal(kept.extra["text"], bank.extra["text"][[0, 1, 3]])
    np.testing.assert_array_equal(kept.backbone, bank.backbone[[0, 1, 3]])
    assert list(kept.labels) == ["fine"]
    with pytest.raises(ValueError, match="none of the 5 rows"):
        restrict(bank, "fine", np.array([3]))
