"""Every Evaluation: a name, a pure run, plain JSON numbers, keys of its own, and nothing that depends on row order."""

from __future__ import annotations

import copy
import json

import jax
import numpy as np
import pytest

from protojax.api import Codebook, Evaluation, FeatureBank, Probe, SourceSpec
from protojax.evals.evaluations import (
    audit_evaluation,
    clustering_evaluation,
    geometry_evaluation,
    knn_evaluation,
    rank_evaluation,
    views_split,
)
from protojax.evals.table import EVALUATIONS, Setting, make_evaluations

CLASSES = {"fine": tuple("abcdef"), "coarse": ("x", "y")}


def spec(name: str, size: int, classes=CLASSES) -> SourceSpec:
    counts = {key: np.full(len(names), size // len(names)) for key, names in classes.items()}
    return SourceSpec(name, size, 16, -(-size // 16), {}, classes, counts)


SPECS = {"bank": spec("bank", 120), "test": spec("test", 48)}
GROUPS = {"fine": {"head": [0, 1], "medium": [2, 3], "tail": [4], "empty": []}}
FACTORIES = {
    "knn": lambda: knn_evaluation(SPECS, label_keys=("fine", "coarse"), ks=(1, 20), groups=GROUPS),
    "prototypes": lambda: audit_evaluation(),
    "rank": lambda: rank_evaluation(),
    "clustering": lambda: clustering_evaluation(SPECS, label_keys=("fine", "coarse")),
    "geometry": lambda: geometry_evaluation(views=3, images=20),
}
SETTING = Setting(SPECS, ("fine",), GROUPS, ks=(1, 20))
SHORT = {"linear": {"steps": 10, "batch_size": 16, "learning_rates": (0.1,), "decays": (0.0,)}}


def named(name: str):
    return lambda: make_evaluations({name: SHORT.get(name, {})}, SETTING)[0]


FACTORIES |= {name: named(name) for name in EVALUATIONS if name not in FACTORIES}


def bank(seed: int, size: int, order: np.ndarray | None = None) -> FeatureBank:
    rng = np.random.default_rng(seed)
    fine = np.arange(size) % 6
    means = np.random.default_rng(99).standard_normal((6, 10))
    backbone = (means[fine] + rng.standard_normal((size, 10))).astype(np.float32)
    image = backbone[:, :8] - 0.5
    order = np.arange(size) if order is None else order
    labels = {"fine": fine[order], "coarse": fine[order] % 2}
    return FeatureBank(backbone[order], image[order], labels, np.arange(size)[order], {})


def probe(banks=None, **changes) -> Probe:
    banks = {"bank": bank(0, 120), "test": bank(1, 48)} if banks is None else dict(banks)
    seen = np.random.default_rng(6).standard_normal((20, 3, 8)).astype(np.float32)
    some = {"views/image": seen, "views/backbone": seen + 1.0}
    banks[views_split("bank", 20, 3, 0)] = bank(0, 20)._replace(extra=some)
    rows = np.random.default_rng(5).standard_normal((24, 8)).astype(np.float32)
    info = {"center": np.full(8, 0.1, np.float32), "usage": np.full(24, 1 / 24, np.float32)}
    return Probe(7, banks.__getitem__, SPECS, Codebook(rows, np.zeros(24, np.float32)), info, {})._replace(**changes)


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, item in value.items():
            assert isinstance(name, str), path
            yield from leaves(item, (*path, name))
    else:
        yield path, value


@pytest.fixture(params=sorted(FACTORIES))
def evaluation(request) -> Evaluation:
    return FACTORIES[request.param]()


def test_result_is_a_nested_dict_of_plain_numbers(evaluation, key):
    assert isinstance(evaluation.name, str)
    result = evaluation.run(probe(), key)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    found = dict(leaves(result))
    assert found
    assert all(value is None or type(value) in (int, float) for value in found.values())


def test_run_is_pure_and_leaves_the_probe_alone(evaluation, key):
    banks = {"bank": bank(0, 120), "test": bank(1, 48)}
    before = copy.deepcopy(banks)
    first = evaluation.run(probe(banks), key)
    assert evaluation.run(probe(banks), jax.random.key(1)) == first
    for split in banks:
        for a, b in zip(jax.tree.leaves(banks[split]), jax.tree.leaves(before[split]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_row_order_within_a_split_does_not_matter(evaluation, key):
    rng = np.random.default_rng(3)
    shuffled = {"bank": bank(0, 120, rng.permutation(120)), "test": bank(1, 48, rng.permutation(48))}
    expected, got = dict(leaves(evaluation.run(probe(), key))), dict(leaves(evaluation.run(probe(shuffled), key)))
    assert got == {path: v if v is None else pytest.approx(v, rel=1e-6, abs=1e-7) for path, v in expected.items()}


def test_no_two_evaluations_write_the_same_key(key):
    results = [set(factory().run(probe(), key)) for factory in FACTORIES.values()]
    assert sum(map(len, results)) == len(set.union(*results))


# ------------------------------------------------------------------------------------------- what each one says
def test_knn_reports_every_label_k_and_group(key):
    result = FACTORIES["knn"]().run(probe(), key)
    assert {label: set(ks) for label, ks in result["knn"].items()} == {"fine": {"1", "20"}, "coarse": {"1", "20"}}
    assert set(result["groups"]["fine"]) == {"head", "medium", "tail", "empty"}
    assert result["groups"]["fine"]["empty"] is None
    assert "coarse" not in result["groups"]
    assert result["knn"]["fine"]["20"] > 0.5  # separated classes
    balanced = [result["groups_macro"]["fine"][g] for g in ("head", "medium", "tail")]
    assert balanced == pytest.approx(
        [result["groups"]["fine"][g] for g in ("head", "medium", "tail")]
    )  # 8 rows a class


def test_audit_has_the_shape_of_the_summary_and_its_controls(key):
    evaluation = audit_evaluation()
    start = evaluation.run(probe(), key)
    now = probe()
    later = evaluation.run(
        now._replace(initial=start, codebook=Codebook(np.ones((24, 8), np.float32), now.codebook.bias)), key
    )
    expected = {"count", "dim", "unique", "live", "live_unique", "perplexity", "coverage", "nearest_cosine", "centred"}
    assert expected <= set(start["prototypes"])
    assert start["prototypes"]["estimator"] == {"live": 24, "perplexity": pytest.approx(24.0)}
    assert set(later["prototypes"]["unique"].values()) == {1}
    for name in ("unique", "live", "live_unique", "perplexity", "coverage"):
        assert later["controls"][f"initial_{name}"] == start["prototypes"][name]
    assert later["controls"]["random_unique"] == start["controls"]["random_unique"]
    assert set(later["controls"]["random_unique"]) == {"0.025", "0.1", "0.25", "0.5"}


def test_audit_reads_features_as_the_estimator_does(key):
    """A centre in units of unit features must be subtracted from unit features."""
    base = bank(0, 120)
    unit = base.image / np.linalg.norm(base.image, axis=1, keepdims=True)
    given = {"bank": base._replace(image=100.0 * base.image)}
    normalised = {"bank": base._replace(image=unit)}
    read = audit_evaluation(reading="unit").run(probe(given), key)["prototypes"]
    plain = audit_evaluation().run(probe(normalised), key)["prototypes"]
    assert (read["live"], read["perplexity"]) == (plain["live"], pytest.approx(plain["perplexity"]))
    assert read["coverage"] == pytest.approx(plain["coverage"], abs=1e-6)


def test_rank_reports_the_space_of_the_prototypes(key):
    result = rank_evaluation().run(probe(), key)
    assert result["effective_rank"] == result["rank"]["image"]["effective"]
    assert result["rank"]["image"]["attainable"] == 8
    assert result["rank"]["backbone"]["attainable"] == 10


# ------------------------------------------------------------------------------------------------- bad input
UNLABELLED = {"bank": spec("photos", 120, {}), "test": spec("photos-test", 48, {})}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: knn_evaluation(UNLABELLED), "needs labels 'fine', but the source 'photos' has no labels"),
        (lambda: knn_evaluation(SPECS, label_keys=("species",)), r"has \['coarse', 'fine'\]"),
        (lambda: knn_evaluation(SPECS, label_keys=()), "label_keys must be a non-empty list"),
        (lambda: knn_evaluation(SPECS, label_keys="fine"), "label_keys must be a non-empty list"),
        (
            lambda: knn_evaluation(SPECS, bank_split="train"),
            r"needs the split 'train'; this recipe has \['bank', 'test'\]",
        ),
        (lambda: knn_evaluation(SPECS, test_split="bank"), "every image would be its own nearest"),
        (lambda: knn_evaluation({**SPECS, "test": spec("test", 0)}), "is empty"),
        (lambda: knn_evaluation(SPECS), r"k = \[200\] is larger than the bank of 120 rows"),
        (lambda: knn_evaluation(SPECS, ks=(5,), group_k=20), "group_k = 20 is not one of"),
        (lambda: knn_evaluation(SPECS, ks=(5,), groups={"fine": {"head": [6]}}), r"name the classes \[6\]"),
        (lambda: knn_evaluation(SPECS, ks=(5,), groups={"coarse": {"head": [0]}}), "groups are given for 'coarse'"),
        (
            lambda: knn_evaluation({**SPECS, "test": spec("other", 48, {"fine": ("a", "b")})}, ks=(5,)),
            "do not have the same classes",
        ),
        (lambda: audit_evaluation(reading="cosine"), "reading must be 'raw' or 'unit'"),
        (lambda: clustering_evaluation(UNLABELLED), "has no labels"),
    ],
)
def test_bad_input_is_named_when_the_evaluation_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["prototypes", "clustering"])
def test_a_probe_without_codebook_is_named(name, key):
    with pytest.raises(ValueError, match="needs prototypes, but this checkpoint has no codebook"):
        FACTORIES[name]().run(probe(codebook=None), key)
