"""Exponential long tails have exactly the sizes of their formula; groups partition the classes."""

from __future__ import annotations

import numpy as np
import pytest

from protojax.data import exponential_longtail, groups


# Totals of published profiles: CIFAR-100-LT (100 classes, 500 a class) and CIFAR-10-LT (10 classes, 5000 a class).
@pytest.mark.parametrize(
    ("classes", "each", "factor", "total"),
    [(100, 500, 100, 10847), (100, 500, 50, 12608), (100, 500, 10, 19573), (10, 5000, 100, 12406)],
)
def test_sizes_are_the_published_profiles(classes, each, factor, total):
    labels = np.repeat(np.arange(classes), each)
    chosen = exponential_longtail(labels, factor, seed=0)
    sizes = np.sort(np.bincount(labels[chosen]))[::-1]
    assert len(np.unique(chosen)) == len(chosen) == total
    assert (sizes[0], sizes[-1]) == (each, each // factor)
    ratio = sizes[:-1] / sizes[1:]  # a geometric sequence, up to the rounding of a size by less than one
    expected = factor ** (1 / (classes - 1))
    assert np.all(np.abs(ratio - expected) <= expected / sizes[1:])


def test_choice_is_seeded_nested_and_ascending():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 40))
    mild, same, strong = (exponential_longtail(labels, f, seed=1) for f in (4, 4, 16))
    np.testing.assert_array_equal(mild, same)
    assert np.all(np.diff(mild) > 0)
    assert set(strong) < set(mild)
    other = exponential_longtail(labels, 4, seed=2)
    assert not np.array_equal(np.bincount(labels[mild]), np.bincount(labels[other]))  # another order of the classes
    np.testing.assert_array_equal(exponential_longtail(labels, 1, seed=1), np.arange(240))


def test_scarce_classes_keep_what_they_have():
    labels = np.repeat([3, 5, 9], [50, 2, 30])
    sizes = np.bincount(labels[exponential_longtail(labels, 4, seed=0)], minlength=10)
    assert sizes[5] == 2
    assert all(0 < sizes[c] <= n for c, n in ((3, 50), (9, 30)))
    assert np.bincount(labels[exponential_longtail(labels, 1, seed=0, max_per_class=10)]).max() == 10


def test_longtail_errors():
    labels = np.repeat([0, 1], 10)
    for factor in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="imbalance_factor must be a finite number >= 1"):
            exponential_longtail(labels, factor, seed=0)
    with pytest.raises(ValueError, match=r"leaves the rarest class without an example.*at most 10"):
        exponential_longtail(labels, 11, seed=0)
    with pytest.raises(ValueError, match="non-empty vector"):
        exponential_longtail(labels[:0], 2, seed=0)


@pytest.mark.parametrize("rule", ["inat", "terciles"])
def test_groups_partition_the_classes_by_count(rule):
    counts = np.random.default_rng(0).integers(1, 200, 50)
    parts = groups(counts, rule)
    assert list(parts) == ["head", "medium", "tail"]
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(50))
    assert counts[parts["head"]].min() >= counts[parts["medium"]].max()
    assert counts[parts["medium"]].min() >= counts[parts["tail"]].max()


def test_group_boundaries_and_ties():
    parts = groups(np.array([101, 100, 20, 19, 0]), "inat")
    assert {k: v.tolist() for k, v in parts.items()} == {"head": [0], "medium": [1, 2], "tail": [3, 4]}
    assert groups(np.array([500, 500]), "inat")["tail"].tolist() == []
    parts = groups(np.array([5, 7, 5, 5, 5, 9, 5]), "terciles")  # 9, 7, then ties in the order of class ids
    assert {k: v.tolist() for k, v in parts.items()} == {"head": [0, 1, 5], "medium": [2, 3], "tail": [4, 6]}
    with pytest.raises(ValueError, match="must be 'inat' or 'terciles', got 'quartiles'"):
        groups(np.ones(3), "quartiles")
    with pytest.raises(ValueError, match="one number a class"):
        groups(np.ones((3, 2)), "inat")
