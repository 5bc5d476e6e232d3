"""Metrics of label distributions: enumeration, chance levels, and what no constant and no one-hot prediction can
win."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import log_loss

from protojax.evals import soft_labels as lib
from protojax.evals.detectors import TABLE, diagnose
from protojax.evals.detectors_soft_labels import TABLE as OURS
from protojax.evals.soft_labels import baselines, build_facts, chance, kl, overlap_top, scores, top_one, true_in_top

C = 8


def rows(seed: int, count: int = 400, concentration: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(concentration * np.ones(C), count)


def test_kl_and_entropy_are_scipys_and_zero_counts_zero():
    t, p = rows(0), rows(1)
    np.testing.assert_allclose(kl(t, p), scipy_entropy(t, p, axis=1), rtol=1e-6)
    np.testing.assert_allclose(lib.entropy(t), scipy_entropy(t, axis=1))
    hard = np.eye(C)[[1, 2]]
    assert kl(hard, hard).tolist() == pytest.approx([0.0, 0.0], abs=1e-15)
    assert kl(hard, np.eye(C)[[3, 4]]).tolist() == pytest.approx([-math.log(1e-8)] * 2)
    soft = scores(t, p, constant=t.mean(0))
    # scikit-learn's cross-entropy of hard labels, one row a category, weighted by the target
    labels, weights = np.tile(np.arange(C), len(t)), t.reshape(-1)
    assert soft["cross_entropy"] == pytest.approx(
        log_loss(labels, np.repeat(p, C, axis=0), sample_weight=weights) * weights.sum() / len(t), rel=1e-6
    )


def test_the_best_constant_beats_a_thousand_others_and_has_no_skill():
    t = rows(0)
    best = kl(t, t.mean(0)).mean()
    others = rows(5, 1000, 5.0)
    assert min(kl(t, q).mean() for q in others) > best
    assert scores(t, np.broadcast_to(t.mean(0), t.shape), constant=t.mean(0))["skill"] == pytest.approx(0.0, abs=1e-12)
    assert scores(t, t, constant=t.mean(0))["skill"] == pytest.approx(1.0, abs=1e-9)


def test_top_three_by_expected_value_over_all_orders_of_ties():
    p = np.asarray([[0.3, 0.3, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0]])
    for hit in range(C):
        t = np.eye(C)[[hit]]
        orders = [np.lexsort((list(order), -p[0]))[:3] for order in itertools.permutations(range(C))][::97]
        frequency = np.mean([hit in chosen for chosen in orders])
        assert true_in_top(t, p) == pytest.approx(frequency, abs=0.06)
    uniform = np.full((C, C), 1 / C)
    assert true_in_top(np.eye(C), uniform) == pytest.approx(3 / C)
    assert top_one(np.eye(C), uniform) == pytest.approx(1 / C)
    tied = np.asarray([[0.4, 0.4, 0.2]])
    assert top_one(np.asarray([[1.0, 0.0, 0.0]]), tied) == 0.5
    assert top_one(np.asarray([[0.5, 0.5, 0.0]]), tied) == 0.5
    assert top_one(np.asarray([[0.0, 0.0, 1.0]]), tied) == 0.0


def test_chance_levels_equal_enumeration():
    """All pairs of three of eight: 1 - C(5,3) / C(8,3) = 82.1% share a category."""
    sets = list(itertools.combinations(range(C), 3))
    share = np.mean([bool(set(a) & set(b)) for a in sets for b in sets])
    levels = chance(C)
    assert levels == {"top1": 0.125, "true_in_top3": 0.375, "overlap_top3": pytest.approx(share)}
    assert levels["overlap_top3"] == pytest.approx(0.821, abs=5e-4)
    t, p = rows(0, 20_000), rows(1, 20_000)
    assert overlap_top(t, p) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 20_000))


def test_a_constant_wins_what_is_labelled_and_nothing_else():
    t = rows(3, 500)
    constant = np.broadcast_to(t.mean(0), t.shape)
    found = scores(t, constant, constant=t.mean(0), group=np.arange(500) % 5, groups=tuple("abcde"))
    assert found["mean_kl"] == pytest.approx(0.0, abs=1e-12)  # never alone
    assert found["entropy"]["correlation"] == 0.0
    assert (found["distinct"]["argmax"], found["distinct"]["outputs"], found["distinct"]["outputs_within_groups"]) == (
        1,
        1,
        1,
    )
    assert found["spread"]["largest"] == pytest.approx(0.0, abs=1e-12)
    assert {g: v["count"] for g, v in found["groups"].items()} == dict.fromkeys("abcde", 100)
    known = baselines(t, t.mean(0), t)
    assert known["bayes"] == pytest.approx(0.0, abs=1e-12)
    assert known["oracle_constant"] == pytest.approx(found["kl"])
    assert known["majority"] == pytest.approx(np.bincount(t.argmax(1)).max() / 500)


def test_spread_within_groups_separates_a_group_constant_from_a_model():
    group = np.arange(600) % 6
    t = rows(0, 600)
    by_group = rows(9, 6)[group]
    inside = scores(t, by_group, constant=t.mean(0), group=group)["spread"]
    assert inside["within_groups"] == pytest.approx(0.0, abs=1e-12)
    assert inside["largest"] > 0.05
    assert scores(t, t, constant=t.mean(0), group=group)["spread"]["within_groups"] > 0.05


# --------------------------------------------------------------------------------------------------- detectors
def history(predict, *, steps: int = 5, facts=None, std=None, active: float = 0.1, largest: float = 8.0) -> list[dict]:
    """Records of a run whose validation predictions are predict(step, targets)."""
    t = rows(0, 300)
    group = np.arange(300) % 4
    build = {**(facts or build_facts(t, None, None)), "epoch_steps": 10}
    stds = std or {f"x{i}": 1.0 for i in range(9)}
    records = []
    for i in range(steps + 1):
        if i:
            numbers = {
                "loss/soft_label/kl": 0.3,
                "loss/soft_label/active": active,
                "loss/soft_label/largest_logit": largest,
            }
            records.append({"kind": "train", "step": 20 * i, "fraction": i / steps, "metrics": numbers})
        found = scores(t, predict(i, t), constant=t.mean(0), group=group)
        val = {**found, "baselines": baselines(t, t.mean(0))}
        wide = dict(sorted(stds.items(), key=lambda item: -item[1])[:3])
        inputs = {"std": wide, "ratio": max(stds.values()) / float(np.median(list(stds.values())))}
        soft = {"val": val, "build": build, "inputs": inputs, "logits": {"largest": largest, "smallest": -largest}}
        records.append({"kind": "eval", "step": 20 * i, "fraction": i / steps, "metrics": {"soft_labels": soft}})
    return records


def good(i, t):
    return 0.9 * t + 0.1 / C if i else np.full_like(t, 1 / C) + 0.02 * (rows(7, len(t)) - 1 / C)


def sharp(i, t):
    return 0.999999 * np.eye(C)[rows(8, len(t)).argmax(1)] + 1e-6 / C


def flat(i, t):
    return np.broadcast_to(t.mean(0), t.shape).copy()


def per_group(i, t):
    return rows(4, 4)[np.arange(len(t)) % 4]


T = rows(0, 300)
RAW = {**{f"x{i}": 1.0 for i in range(9)}, "income": 9.8e3}
PLANTED = {
    "unscaled_inputs": lambda: history(good, std=RAW),
    "one_hot": lambda: history(sharp, std=RAW),
    "exploding_logits": lambda: history(good, largest=2e3),
    "uniform_by_construction": lambda: history(good, facts=build_facts(T, 0.25, None)),
    "constant": lambda: history(flat),
    "constant_in_group": lambda: history(per_group),
    "clamp_ceiling": lambda: history(lambda i, t: 0.999999999 * np.eye(C)[t.argmin(1)] + 1e-9 / C),
    "below_constant": lambda: history(lambda i, t: t[::-1].copy()),
    "dead_penalty": lambda: history(good, facts=build_facts(T, None, 0.4), active=0.0),
    "penalty_fights_truth": lambda: history(good, facts=build_facts(T, None, 2.0)),
}  # fmt: skip


def fired(records) -> set[str]:
    return {f["detector"] for f in diagnose(records) if f["severity"] != "notice"}


def test_every_soft_label_detector_has_a_planted_failure():
    assert set(PLANTED) == {d.id for d in OURS}
    assert all(detector in TABLE for detector in OURS)
    for detector in OURS:
        assert "config." in detector.advice
        assert all(len(t.reason) > 10 for t in detector.thresholds.values())


@pytest.mark.parametrize("name", PLANTED)
def test_planted_failures_fire_with_a_sentence(name):
    (finding,) = [f for f in diagnose(PLANTED[name]()) if f["detector"] == name]
    assert any(c.isdigit() for c in finding["evidence"])
    assert "{" not in finding["evidence"]


def test_a_healthy_run_is_silent_and_so_is_one_that_is_sharp_where_targets_are():
    assert fired(history(good)) == set()
    assert fired(history(good, largest=22.0)) == set()  # logits beyond 10 are no failure
    assert fired(history(good, facts=build_facts(T, 4.0, 0.5))) == set()


def test_sentences_name_columns_and_the_ratio_that_is_needed():
    findings = {f["detector"]: f["evidence"] + f["advice"] for f in diagnose(PLANTED["one_hot"]())}
    assert "9.8e+03" in findings["one_hot"]
    assert "income (std 9.8e+03)" in findings["unscaled_inputs"]
    found = {f["detector"]: f for f in diagnose(PLANTED["uniform_by_construction"]())}
    assert found["uniform_by_construction"]["step"] == 0
    dead = history(good, facts=build_facts(T, 1.0, 0.5))
    assert "1.980" in next(f["evidence"] for f in diagnose(dead) if f["detector"] == "dead_penalty")
