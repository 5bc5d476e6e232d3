"""The table of evaluations: names, options, what is left out, and that the wrappers say what the functions say."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from protojax.evals import few_shot, linear, retrieval
from protojax.evals.clustering import clustering_scores
from protojax.evals.kmeans import kmeans
from protojax.evals.neighbours import unit_rows
from protojax.evals.table import EVALUATIONS, NEEDS_CODEBOOK, NEEDS_LABELS, Setting, make_evaluations, resolved
from tests.contracts.test_evaluation import GROUPS, SETTING, SPECS, bank, probe


def numbers(name: str, key, setting: Setting = SETTING, banks=None, **options):
    (evaluation,) = make_evaluations({name: options}, setting)
    return evaluation.run(probe(banks), key)


def test_the_wrappers_say_what_the_functions_say(key):
    rows, test = bank(0, 120), bank(1, 48)
    given = rows.backbone, rows.labels["fine"], test.backbone, test.labels["fine"]
    ridge = linear.ridge_probe(*given, num_classes=6, seed=3)
    found = numbers("ridge", key, SETTING._replace(seed=3))["ridge"]["fine"]
    assert (found["accuracy"], found["chosen"]) == (ridge.accuracy, ridge.chosen)
    members = np.isin(test.labels["fine"], GROUPS["fine"]["head"])
    assert found["groups"]["head"] == ridge.correct[members].mean()
    assert found["groups"]["empty"] is None
    shots = few_shot.few_shot_accuracy(*given, num_classes=6, shots=(2,), seeds=(3, 4))
    found = numbers("few_shot", key, SETTING._replace(seed=3), shots=[2], seeds=[0, 1])["few_shot"]["fine"]
    assert found["2"]["runs"] == dict(zip(("3", "4"), shots["2"]["runs"], strict=True))
    found = numbers("retrieval", key)["retrieval"]["fine"]
    assert found == retrieval.retrieve(*given[2:], *given[:2], num_classes=6).means()
    clusters = kmeans(unit_rows(rows.backbone), 6).assignment
    assert numbers("kmeans", key)["kmeans"]["fine"] == {
        **clustering_scores(rows.labels["fine"], clusters),
        "clusters": 6,
    }


def test_balanced_accuracy_equals_scikit_learn_on_unbalanced_tests(key):
    test = bank(1, 48)
    keep = np.flatnonzero((test.labels["fine"] < 2) | (np.arange(48) % 7 == 0))
    few = test._replace(
        backbone=test.backbone[keep], image=test.image[keep], positions=keep,
        labels={k: v[keep] for k, v in test.labels.items()},
    )  # fmt: skip
    rows = bank(0, 120)
    given = rows.backbone, rows.labels["fine"], few.backbone, few.labels["fine"]
    predicted = linear.logistic_probe(*given, num_classes=6).scores.argmax(axis=1)
    found = numbers("logistic", key, banks={"bank": rows, "test": few})["logistic"]["fine"]
    assert found["balanced"] == pytest.approx(balanced_accuracy_score(few.labels["fine"], predicted))
    assert found["balanced"] != found["accuracy"]


def test_calibration_tempers_with_rows_that_are_neither_fitted_nor_tested(key):
    """Shuffled test labels change the scores, and not the temperature."""
    test = bank(1, 48)
    shuffled = test._replace(labels={k: np.roll(v, 1) for k, v in test.labels.items()})
    first = numbers("calibration", key)["calibration"]["fine"]
    other = numbers("calibration", key, banks={"bank": bank(0, 120), "test": shuffled})["calibration"]["fine"]
    assert other["temperature"] == first["temperature"]
    assert other["accuracy"] < first["accuracy"] == first["tempered"]["accuracy"]
    assert sum(b["count"] for b in first["reliability"].values()) == 48


def test_evaluations_that_need_labels_are_left_out_without_labels():
    everything = {name: {} for name in EVALUATIONS}
    names = [e.name for e in make_evaluations(everything, SETTING._replace(labels=(), groups={}))]
    assert names == ["prototypes", "attainable", "rank", "geometry"]
    assert {e.name for e in make_evaluations(everything, SETTING)} == set(EVALUATIONS)
    assert set(names).isdisjoint(NEEDS_LABELS)
    assert set(EVALUATIONS) >= NEEDS_CODEBOOK


def test_options_are_resolved_with_the_defaults_of_the_code():
    assert resolved("ridge", {"held_out": 0.2}) == {"decays": linear.RIDGE_DECAYS, "held_out": 0.2}
    assert resolved("knn", {}) == {"clamp": False}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"knnn": {}}, r"unknown evaluation 'knnn' \(did you mean 'knn'\?\)"),
        ({"linear": {"step": 3}}, r"has no option 'step' \(did you mean 'steps'\?\)"),
        ({"geometry": {"views": 1}}, "expected views 0 or >= 2"),
        ({"kmeans": {"clusters": 0}}, "clusters must be None or a number >= 1"),
        ({"knn": {}}, r"k = \[200\] is larger than the bank of 120 rows"),
    ],
)
def test_bad_choices_are_named_when_they_are_made(chosen, message):
    setting = Setting(SPECS, ("fine",))
    with pytest.raises(ValueError, match=message):
        make_evaluations(chosen, setting)
    with pytest.raises(TypeError, match="expected int"):
        make_evaluations({"linear": {"steps": "many"}}, setting)
