"""Numbers for mixtures of prompts on assignments with known answers, and the detectors that read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protojax.evals import prompts as scores
from protojax.evals.detectors import diagnose
from protojax.evals.prompts_baselines import adam_probe, class_centres, spherical_kmeans

K, C, N = 4, 3, 40
LABELS = np.repeat(np.arange(C), N)


def one_hot(chosen: np.ndarray) -> np.ndarray:
    return np.eye(K)[chosen]


def test_usage_of_one_winner_of_even_shares_and_of_identical_prompts():
    winner = scores.usage_report(one_hot(np.zeros(C * N, int)), LABELS, C)
    assert winner["usage_perplexity"] == winner["effective"] == pytest.approx(1.0)
    assert winner["dead"] == pytest.approx((K - 1) / K)
    assert winner["max_usage"] == winner["collapsed"] == 1.0
    even = scores.usage_report(one_hot(np.arange(C * N) % K), LABELS, C)
    assert even["usage_perplexity"] == even["effective"] == pytest.approx(K)
    assert (even["dead"], even["conditional_entropy"], even["collapsed"]) == (0.0, 0.0, 0.0)
    same = scores.usage_report(np.full((C * N, K), 1 / K), LABELS, C)
    assert same["usage_perplexity"] == pytest.approx(K)  # the trap: all are used, because all are one
    assert same["effective"] == pytest.approx(1.0)
    assert same["conditional_entropy"] == pytest.approx(np.log(K))


def test_small_classes_are_left_out_of_averages_and_counted():
    labels = np.concatenate([LABELS, np.full(3, C)])
    r = np.concatenate([one_hot(np.arange(C * N) % K), one_hot(np.zeros(3, int))])
    found = scores.usage_report(r, labels, C + 1)
    assert (found["classes"], found["excluded"]) == (C, 1)
    assert found["usage_perplexity"] == pytest.approx(K)


def test_purity_is_one_for_modes_that_are_found_and_chance_when_they_are_shuffled():
    modes = np.arange(C * N) % K
    turned = (modes + LABELS) % K  # another numbering of sub-prompts in every class
    assert scores.purity(turned, LABELS, modes, turned, LABELS, modes, C) == 1.0
    nothing = np.zeros(C * N, int)
    assert scores.purity(nothing, LABELS, modes, nothing, LABELS, modes, C, count=K) == pytest.approx(1 / K)
    chance = scores.shuffled_purity(turned, LABELS, modes, turned, LABELS, modes, C, count=K)
    assert 0.15 < chance < 0.45
    single = np.zeros(C * N, int)
    assert np.isnan(scores.purity(turned, LABELS, single, turned, LABELS, single, C))


def test_geometry_of_identical_and_orthogonal_prompts():
    same = scores.prompt_geometry(np.tile(np.eye(8)[:1], (2, K, 1)))
    assert (same["cos_mean"], same["centred_duplicates"]) == (1.0, 1.0)
    apart = scores.prompt_geometry(np.tile(np.eye(8)[None, :K], (2, 1, 1)))
    assert (apart["cos_mean"], apart["centred_duplicates"], apart["cos_above_0.9"]) == (0.0, 0.0, 0.0)
    assert scores.initial_cosine(512, 0.01) == pytest.approx(0.951, abs=1e-3)


def test_accuracy_counts_ties_by_their_share_and_levels_by_name():
    cosine = np.asarray([[0.9, 0.9, 0.1], [0.1, 0.8, 0.7], [0.2, 0.6, 0.3]])
    labels = np.asarray([0, 1, 2])
    found = scores.accuracy_numbers(
        scores.score_rows(cosine, labels), labels, np.asarray([200, 50, 5]), {"family": ("x", "y", "y")}
    )
    assert found["top1"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert (found["many"], found["medium"], found["few"]) == (0.5, 1.0, 0.0)
    assert found["levels"]["family"] == 1.0
    assert scores.harmonic_mean(0.8, 0.4) == pytest.approx(2 * 0.8 * 0.4 / 1.2)
    assert scores.harmonic_mean(0.0, 0.0) == 0.0


def test_probes_have_no_margin_and_calibration_mends_scores_of_any_scale():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    cosine = 0.3 * np.eye(3)[labels] + 0.2 * rng.normal(size=(400, 3))
    counts = np.asarray([200, 50, 5])
    probe = scores.accuracy_numbers(scores.score_rows(cosine, labels, cosines=False), labels, counts)
    known = scores.accuracy_numbers(scores.score_rows(cosine, labels), labels, counts)
    assert probe["margin"] is None
    assert 0 < known["margin"] < 1
    assert {k: v for k, v in probe.items() if k != "margin"} == {k: v for k, v in known.items() if k != "margin"}
    crossed = [scores.crossed_ece(scale * cosine, labels) for scale in (0.01, 1.0, 300.0)]
    assert max(crossed) < 0.12
    np.testing.assert_allclose(crossed, crossed[0], atol=1e-6)  # the scale is what the temperature takes out


def test_spherical_k_means_finds_directions_and_never_loses_by_restarts():
    rng = np.random.default_rng(0)
    modes = np.eye(6)[np.repeat(np.arange(3), 20)] + 0.05 * rng.normal(size=(60, 6))
    rows = modes / np.linalg.norm(modes, axis=1, keepdims=True)
    centres = spherical_kmeans(rows, 3, seed=1)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1.0, rtol=1e-12)
    assert sorted((rows @ centres.T).argmax(axis=1)[::20]) == [0, 1, 2]
    value = [(rows @ spherical_kmeans(rows, 5, seed=2, restarts=n).T).max(axis=1).sum() for n in (1, 3, 6)]
    assert value == sorted(value)
    one = spherical_kmeans(rows, 1)[0]  # K = 1: the direction of the mean
    np.testing.assert_allclose(one, rows.mean(0) / np.linalg.norm(rows.mean(0)), rtol=1e-9)
    with pytest.raises(ValueError, match=r"clusters: expected a number in 1\.\.60, the rows, got 61"):
        spherical_kmeans(rows, 61)
    few = class_centres(rows[:2].astype(np.float32), np.asarray([0, 1]), 2, 3)
    np.testing.assert_allclose(few, np.repeat(rows[:2, None], 3, axis=1), rtol=1e-6)


def test_the_probe_without_choices_separates_what_is_separable():
    rows = np.eye(4, dtype=np.float32)[np.arange(400) % 4]
    weights, biases = adam_probe(rows, np.arange(400) % 4, classes=4)
    assert ((rows @ weights + biases[None]).argmax(1) == np.arange(400) % 4).all()


def test_separation_is_the_gap_between_the_own_and_the_other_sub_prompts():
    similarity = np.asarray([[1.0, 0.4, 0.2], [0.0, 0.6, 0.0]])
    assert scores.separation(similarity, np.asarray([0, 1])) == pytest.approx((0.7 + 0.6) / 2)


# ------------------------------------------------------------------------------------------------- detectors
def record(step: int, **changes: Any) -> dict[str, Any]:
    """An evaluation of a healthy mixture of 8, changed by dotted names with __ for dots."""
    healthy: dict[str, Any] = {
        "count": 8, "random_purity": 0.45, "near_empty_classes": 0,
        "e_step": {"usage_perplexity": 7.5, "usage_perplexity_hard": 7.4, "effective": 6.5, "max_usage": 0.2,
                   "collapsed": 0.0, "purity": 0.99},
        "inference": {"usage_perplexity_hard": 7.3},
        "geometry": {"cos_mean": 0.86, "initial_cosine": 0.951}, "accuracy": {"top1": 0.99},
    }  # fmt: skip
    for name, value in changes.items():
        *path, last = name.split("__")
        at = healthy
        for part in path:
            at = at[part]
        at[last] = value
    return {"kind": "eval", "step": step, "metrics": {"prompts": healthy}}


WINNER = {"e_step__usage_perplexity": 1.6, "e_step__collapsed": 0.9, "e_step__max_usage": 0.8}
PLANTED = {
    "winner_take_all": WINNER,
    "identical_prompts": {"e_step__usage_perplexity": 7.9, "e_step__effective": 1.05},
    "diverse_unused": {**WINNER, "geometry__cos_mean": 0.12},
    "nothing_learned": {"geometry__cos_mean": 0.95, "e_step__purity": 0.46},  # random_purity is 0.45
    "train_infer_gap": {"inference__usage_perplexity_hard": 3.0},
    "near_empty_class": {"near_empty_classes": 2},
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_failure_is_named(name: str):
    found = {f["detector"]: f for f in diagnose([record(0), record(100, **PLANTED[name])])}
    assert name in found
    assert found[name]["step"] == 100
    assert set(found) <= {name, "winner_take_all"}


def test_a_healthy_mixture_its_initialisation_and_a_single_prompt_are_left_alone():
    assert diagnose([record(0), record(50), record(100)]) == []
    assert diagnose([record(0, **WINNER)]) == []  # an initialisation is no finding
    single = {"count": 1, "e_step__usage_perplexity": 1.0, "e_step__usage_perplexity_hard": 1.0,
              "e_step__effective": 1.0, "e_step__max_usage": 1.0, "inference__usage_perplexity_hard": 1.0}  # fmt: skip
    assert diagnose([record(0, **single), record(100, **single)]) == []


def test_a_start_that_nobody_trained_is_named_though_its_purity_is_not_that_of_other_random_offsets():
    """Purity of random offsets spreads by more than the threshold: the run's own start is looked at too."""
    still = {"geometry__cos_mean": 0.952, "e_step__purity": 0.39}  # random_purity is 0.45
    named = [{f["detector"] for f in diagnose([record(0, **still), record(100, **still, **more)])}
             for more in ({}, {"accuracy__top1": 0.9})]  # fmt: skip
    assert named == [{"nothing_learned"}, set()]  # whoever gained nine points learned something


def test_offsets_get_half_of_the_run_before_they_are_said_to_have_learned_nothing():
    """A start that finds the modes keeps its purity: early in a run that is no sign of anything."""
    still = PLANTED["nothing_learned"]
    records = [{**record(100 * i, **still), "fraction": i / 4} for i in range(5)]
    assert diagnose(records[:2]) == []
    assert [(f["detector"], f["step"]) for f in diagnose(records)] == [("nothing_learned", 200)]


def test_an_inert_term_of_a_mixture_is_a_notice_and_one_of_another_workload_is_silent_there():
    def steps(start: dict[str, Any]) -> list[dict[str, Any]]:
        metrics = {"grad_norm": 2.0, "grad_norm/offset_penalty": 4e-7, "weight/offset_penalty": 1e-3}
        return [start] + [{"kind": "train", "step": s, "metrics": metrics} for s in (10, 20, 30)]

    found = diagnose(steps(record(0)))
    assert [(f["detector"], f["severity"]) for f in found] == [("inert_term", "notice")]
    assert diagnose(steps({"kind": "eval", "step": 0, "metrics": {}})) == []
