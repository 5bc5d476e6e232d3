"""Every detector fires on its planted failure, with its numbers, and stays silent on healthy runs."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from protojax.evals.audit import audit
from protojax.evals.detectors import GENERAL, IDS, SEVERITIES, TABLE, Diagnosis, diagnose
from protojax.evals.history import History, flatten
from protojax.evals.rank import rank_summary

CHANCE = math.log(512)
K, DIM, ROWS = 64, 16, 400


def train(step: int, **metrics) -> dict:
    base = {
        "loss/total": 5.0, "loss/consistency": 5.0, "loss/chance": CHANCE, "grad_norm": 1.0, "update_norm": 0.1,
        "estimator/usage_perplexity": 50.0, "estimator/floor_share": 0.01, "estimator/underflow_share": 0.0,
        "estimator/max_responsibility": 0.9,
    }  # fmt: skip
    extra = {k: metrics.pop(k) for k in ("input_wait", "seconds") if k in metrics}
    return {"kind": "train", "step": step, "images_per_second": 400.0, "input_wait": 0.02, "seconds": 0.2 * step,
            **extra, "metrics": base | metrics}  # fmt: skip


def evaluation(step: int, features: np.ndarray, prototypes: np.ndarray, **changes) -> dict:
    """The record of a real audit and rank summary of planted arrays."""
    rank = rank_summary(features)
    metrics = {"prototypes": audit(prototypes, features), "effective_rank": rank["effective"], "rank": {"image": rank}}
    metrics["groups"] = {"fine": {"tail": None}}  # an empty group is no failure
    return {"kind": "eval", "step": step, "metrics": metrics | changes}


def normal(seed: int, rows: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def healthy(seed: int, steps: int = 400, **changes) -> list[dict]:
    """A run as it should be: the loss leaves chance, features spread out of a cone, prototypes follow them.

    changes: metric -> function of the step, for the training records.
    """
    rng = np.random.default_rng(seed)
    features, prototypes = normal(seed, ROWS), normal(seed + 1000, K)
    cone = np.zeros((1, DIM), np.float32)
    cone[0, 0] = 3.0
    records = []
    for step in range(0, steps + 1, 10):
        t = step / steps
        if step:
            loss = CHANCE - 0.02 - 4.0 * t + 0.05 * rng.random()
            noise = {"estimator/max_responsibility": 0.7 + 0.29 * t, "estimator/usage_perplexity": 40 + 20 * t}
            numbers = {"loss/consistency": loss, "loss/total": loss - 5.0, "grad_norm": 0.5 + rng.random(), **noise}
            records.append(train(step, **(numbers | {k: f(step) for k, f in changes.items()})))
        if step % (steps // 5) == 0:
            moved = (1 - t) * prototypes + t * features[:K] + (1 - t) * 0.1 * rng.standard_normal((K, DIM))
            records.append(evaluation(step, features + (1 - t) * cone, moved.astype(np.float32)))
    return records


def ids(records: list[dict], **options) -> set[str]:
    return {f["detector"] for f in diagnose(records, **options) if f["severity"] != "notice"}


# --------------------------------------------------------------------------------------------------- silence
@pytest.mark.parametrize("seed", range(20))
def test_healthy_runs_are_silent(seed):
    assert diagnose(healthy(seed)) == []


def test_a_sharp_balanced_run_is_silent():
    """One-hot responsibilities are what a balanced E-step at a low temperature is meant to give."""
    changes = {"estimator/max_responsibility": lambda s: 0.99999, "estimator/usage_perplexity": lambda s: 0.98 * K}
    assert diagnose(healthy(0, **changes)) == []


def test_more_prototypes_than_images_is_silent():
    """At most as many prototypes as images can be live: 16 images cannot use 64."""
    records = [evaluation(s, normal(0, 16) * (1 + s / 99), normal(0, K)) for s in (0, 100, 200, 300)]
    records = [r | {"metrics": r["metrics"] | {"effective_rank": 10.0 + r["step"]}} for r in records]
    assert "dead_prototypes" not in ids(records)


def test_parameters_that_never_move_have_learned_nothing_whatever_batch_norm_does():
    still = runs(**{"update_norm": lambda s: 0.0 if s > 50 else 0.1})
    (finding,) = diagnose(still)
    assert (finding["detector"], finding["severity"], finding["step"]) == ("nothing_learned", "warning", 160)
    assert "no parameter has moved for 140 steps" in finding["evidence"]
    assert not ids([r for r in still if r["step"] <= 150])
    assert not ids(runs(**{"update_norm": lambda s: 1e-30}))


def test_frozen_prototypes_with_a_learning_encoder_are_silent():
    prototypes = normal(1, K)
    records = [evaluation(s, normal(0, ROWS) + (2.0 - s / 200), prototypes) for s in (0, 200, 400)]
    assert "nothing_learned" not in ids(records)


# --------------------------------------------------------------------------------------------------- planted
def collapsing_prototypes() -> list[dict]:
    """64 prototypes drift into 8 heaps; every one keeps some images."""
    features, heaps = normal(0, ROWS), np.repeat(normal(2, 8), 8, axis=0)
    spreads = ((0, 3.0), (100, 1.0), (200, 0.3), (300, 1e-3), (400, 1e-3))
    return [evaluation(s, features, heaps + spread * normal(3, K)) for s, spread in spreads]


def dying_prototypes() -> list[dict]:
    """Prototypes stay distinct while features gather around a few of them."""
    prototypes = normal(1, K)
    return [
        evaluation(s, prototypes[np.arange(ROWS) % used] + 0.01 * normal(0, ROWS), prototypes)
        for s, used in ((0, 64), (100, 40), (200, 10), (300, 5))
    ]


def collapsing_encoder() -> list[dict]:
    directions = normal(2, DIM)
    scales = {0: 1.0, 100: 0.3, 200: 1e-3}
    spectrum = np.arange(DIM)[None, :] > 0
    return [
        evaluation(s, (normal(0, ROWS) * np.where(spectrum, scale, 1.0) @ directions).astype(np.float32), normal(1, K))
        for s, scale in scales.items()
    ]


def constant_encoder() -> list[dict]:
    return [evaluation(s, normal(0, ROWS) * scale + 1.0, normal(1, K)) for s, scale in ((0, 1.0), (100, 1e-5))]


def unchanged() -> list[dict]:
    return [evaluation(s, normal(0, ROWS) + 1e-4 * normal(s, ROWS), normal(1, K)) for s in (0, 100, 200)]


def runs(steps: int = 200, **changes) -> list[dict]:
    """Training records, `changes`: metric -> value or function of the step; after one evaluation."""
    first = [evaluation(0, normal(0, ROWS), normal(1, K))]
    values = {k: v if callable(v) else (lambda s, v=v: v) for k, v in changes.items()}
    return first + [train(s, **{k: f(s) for k, f in values.items()}) for s in range(10, steps + 1, 10)]


PLANTED = {
    "not_finite": lambda: runs(**{"loss/total": lambda s: None if s >= 50 else 1.0}),
    "encoder_collapse": collapsing_encoder,
    "constant_side": constant_encoder,
    "chance_loss": lambda: runs(**{"loss/consistency": lambda s: CHANCE - 0.004}),
    "statistics_underflow": lambda: runs(**{"estimator/underflow_share": lambda s: 0.2 if s > 100 else 0.0}),
    "dead_prototypes": dying_prototypes,
    "duplicate_prototypes": collapsing_prototypes,
    "variance_floor": lambda: runs(**{"estimator/floor_share": lambda s: s / 200}),
    "one_hot_responsibilities": lambda: runs(
        **{"estimator/max_responsibility": 0.99999, "estimator/usage_perplexity": 4.0}
    ),
    "dead_term": lambda: runs(**{"grad_norm/koleo": 0.0, "weight/koleo": 0.1, "grad_norm/carp": 1.0}),
    "dead_parameter": lambda: runs(**{"gradient/head/gate": 0.0, "gradient/encoder/stem": 1.0}),
    "nothing_learned": unchanged,
    "inert_term": lambda: runs(**{"grad_norm/koleo": 1e-12, "grad_norm/carp": 1.0}),
    "starving_input": lambda: runs(input_wait=0.4),
}


def test_every_detector_has_a_planted_failure_and_every_threshold_a_reason():
    assert set(PLANTED) == {detector.id for detector in GENERAL}  # the workloads' have files of their own
    assert len(set(IDS)) == len(IDS)
    for detector in TABLE:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", detector.id)
        assert detector.severity in SEVERITIES
        assert detector not in GENERAL or "config." in detector.advice
        assert detector not in GENERAL or all(len(t.reason) > 10 for t in detector.thresholds.values())


def test_an_inert_term_is_seen_though_the_total_is_logged_between_the_probes():
    """Terms are probed at evaluations (here every 80 steps), the total gradient is logged every 10."""
    records = []
    for step in range(10, 401, 10):
        probe = {"grad_norm/koleo": 1e-12, "grad_norm/carp": 1.0, "weight/koleo": 1.0} if step % 80 == 0 else {}
        records.append(train(step, **probe))
    found = [f for f in diagnose(records) if f["detector"] == "inert_term"]
    assert found
    assert "koleo" in found[0]["evidence"]


def test_a_part_without_gradient_is_named_once_in_alignment_runs():
    """They have a row of their own for what is 0 from the first step; what dies later is left to the general one."""
    numbers = {"gradient/a": 0.0, "gradient/b": 1.0, "loss/above_chance": -1.0}
    records = [train(s, **numbers) for s in (1, *range(10, 401, 10))]
    assert [f["severity"] for f in diagnose(records) if f["detector"] == "dead_parameter"] == ["error"]
    records[0]["metrics"]["gradient/a"] = 1.0
    assert [f["severity"] for f in diagnose(records) if f["detector"] == "dead_parameter"] == ["warning"]


@pytest.mark.parametrize("name", PLANTED)
def test_planted_failure_fires_with_its_sentence(name):
    findings = {f["detector"]: f for f in diagnose(PLANTED[name]())}
    assert name in findings
    finding = findings[name]
    assert set(finding) == {"detector", "severity", "step", "evidence", "cause", "advice"}
    assert finding["severity"] in ("error", "warning")
    assert re.search(r"\d", finding["evidence"])
    assert "{" not in finding["evidence"]


@pytest.mark.parametrize("name", ["not_finite", "chance_loss", "statistics_underflow", "variance_floor", "dead_term",
                                  "dead_parameter", "inert_term", "starving_input",
                                  "one_hot_responsibilities"])  # fmt: skip
def test_a_planted_metric_fires_nothing_else(name):
    assert ids(PLANTED[name]()) == {name}


# ---------------------------------------------------------------------------------------------- what they say
def test_loss_at_chance_is_a_notice_before_warm_up_and_an_error_after():
    records = runs(steps=400, **{"loss/consistency": CHANCE})
    severity = {f["detector"]: (f["severity"], f["step"]) for f in diagnose(records, warmup_steps=250)}
    assert severity["chance_loss"] == ("error", 350)
    before = [r for r in records if r["step"] <= 200]
    assert {f["detector"]: f["severity"] for f in diagnose(before, warmup_steps=250)} == {"chance_loss": "notice"}


def test_stuck_at_chance_is_said_in_the_first_200_steps():
    assert "chance_loss" in ids([r for r in PLANTED["chance_loss"]() if r["step"] <= 200])


def test_each_term_is_compared_with_its_own_chance():
    def record(step, carp, dino):
        terms = {"loss/carp/consistency": carp, "loss/carp/chance": CHANCE, "loss/dino/loss": dino}
        return {"step": step, "loss/dino/chance": 3.0, "loss/total": 3.0, **terms}

    stuck = diagnose([record(s, 3.0, 3.001) for s in range(0, 120, 10)])
    assert [f["detector"] for f in stuck] == ["chance_loss"]
    assert stuck[0]["evidence"].startswith("loss/dino/loss is 3.0010, chance is 3.0000")
    assert not ids([record(s, 3.0, CHANCE) for s in range(0, 120, 10)])


def test_a_loss_that_passes_chance_is_silent():
    assert not ids(runs(**{"loss/consistency": lambda s: CHANCE + 0.5 - s / 100}))


def test_not_finite_names_the_first_array_and_step():
    records = runs(
        **{"grad_norm": lambda s: None if s >= 70 else 1.0, "loss/total": lambda s: None if s >= 90 else 1.0}
    )
    (finding,) = diagnose(records)
    assert "grad_norm is NaN or infinite since step 70" in finding["evidence"]
    assert finding["step"] == 70


def test_starving_input_wants_seconds_of_slow_reading():
    """A tenth of a second a step for 40 s is slow reading. Half of steps of 4 ms is the host's own loop, four seconds
    are a busy moment, one window without waiting breaks the row, and another process begins its clock anew."""
    slow = {"input_wait": 0.5}
    (finding,) = diagnose(runs(**slow))
    assert "50% of the last 10 seconds, 0.1 s a step" in finding["evidence"]
    assert (finding["detector"], finding["step"]) == ("starving_input", 60)  # five windows of 2 s after the first
    assert not ids(runs(**slow, seconds=lambda s: 0.004 * s))
    assert not ids(runs(steps=30, **slow))
    assert not ids(runs(steps=60, input_wait=lambda s: 0.5 if s < 60 else 0.1))
    assert not ids(runs(steps=100, **slow, seconds=lambda s: 0.2 * (s % 50)))
    assert not ids([{k: v for k, v in r.items() if k != "seconds"} for r in runs(**slow)])


def test_a_term_without_weight_may_be_dead():
    assert not ids(runs(**{"grad_norm/koleo": 0.0, "weight/koleo": 0.0}))


def test_a_gradient_of_exactly_zero_must_last_ten_steps():
    terms = {"grad_norm/koleo": 0.0, "weight/koleo": 0.1, "grad_norm/carp": 1.0}
    for gap, expected in ((3, set()), (5, {"dead_term"})):
        records = [{"kind": "train", "step": gap * i, "metrics": terms} for i in range(3)]
        assert {f["detector"] for f in diagnose(records)} == expected


def test_a_hinge_that_is_not_reached_once_is_no_dead_term():
    assert not ids(runs(**{"grad_norm/koleo": lambda s: 0.0 if s % 30 else 0.3}))


def test_dead_prototypes_says_how_many_and_stuck_ones_count():
    finding = next(f for f in diagnose(dying_prototypes()) if f["detector"] == "dead_prototypes")
    assert "92.2% of the 64 prototypes" in finding["evidence"]  # 5 of 64 live
    assert finding["step"] == 200
    features = normal(1, K)[np.arange(ROWS) % 2] + 0.01 * normal(0, ROWS)
    stuck = [evaluation(s, features, normal(1, K)) for s in (0, 100, 200, 300)]
    assert "dead_prototypes" in ids(stuck)
    assert "dead_prototypes" not in ids(stuck[:3])  # a start from random directions gets time


def live_record(step: int, live: int, count: int = 512, rows: int = 2936) -> dict:
    return {"kind": "eval", "step": step, "metrics": {"prototypes": {"live": live, "count": count, "rows": rows}}}


@pytest.mark.parametrize(
    ("lives", "fires"),
    [
        ((458, 81, 96, 111, 125, 143, 155, 168, 181), False),  # a fall at the start, then steadily more
        ((335, 37, 37, 41, 46, 50, 52, 53, 52), True),  # the same fall, and no way back
        ((26, 26, 25, 27, 26, 25, 26, 25, 26), True),  # a random start that stays dead
        ((26, 60, 120, 180, 230, 260, 280, 290, 300), False),  # the same start, coming alive
        ((500, 400, 300, 240, 200, 180, 170, 150, 140), True),  # dying slowly
        ((500, 490, 480, 470, 460, 450, 440, 430, 420), False),  # rising, but few are dead
    ],
)
def test_dead_prototypes_must_not_be_getting_better(lives, fires):
    records = [live_record(100 * i, live) for i, live in enumerate(lives)]
    assert (ids(records) == {"dead_prototypes"}) == fires


def test_a_run_of_a_few_steps_is_silent_whatever_it_starts_from():
    """Two steps on 64 images: what is seen is the initialisation. 24 of 64 prototypes cannot be reached by chance."""
    cone = (normal(0, 64) * 1e-4 + 1.0).astype(np.float32)
    records = [evaluation(step, cone, np.ones((K, DIM), np.float32) + 1e-3 * normal(1, K)) for step in (0, 1, 2)]
    assert diagnose(records) == []
    chance = [live_record(100 * i, n, count=64, rows=64) for i, n in enumerate((40, 36, 33, 31))]
    assert "dead_prototypes" not in ids(chance)


def test_dead_parameter_names_the_part_and_wants_another_one_alive():
    (finding,) = diagnose(PLANTED["dead_parameter"]())
    assert "head/gate is exactly 0 since step 10" in finding["evidence"]
    assert not ids(runs(steps=50, **{"gradient/head/gate": 0.0, "gradient/encoder/stem": 1.0}))
    assert not ids(runs(**{"gradient/head": 0.0, "gradient/encoder": 0.0}))  # nothing moves: no part is to blame


def test_a_steady_loss_of_unique_prototypes_is_found_before_a_tenth_is_gone():
    def record(step, unique):
        return {"step": step, "prototypes": {"live": 100, "count": 100, "live_unique": {"0.025": unique}}}

    falling = [record(s, u) for s, u in ((0, 100), (50, 99), (100, 97), (150, 95))]
    assert "duplicate_prototypes" in ids(falling)
    assert "duplicate_prototypes" not in ids(falling[:3])
    flicker = [record(s, u) for s, u in ((0, 100), (50, 99), (100, 100), (150, 99), (200, 98))]
    assert "duplicate_prototypes" not in ids(flicker)
    # From the seeds of k-means++, all unique, to what the features hold apart (Fashion-MNIST, decoupled, two seeds).
    for shares in ((100, 99.95, 95.23, 94.84, 96.34), (99.88, 99.79, 95.82, 95.04, 96.1)):
        level = [record(250 * i, share) for i, share in enumerate(shares)]
        assert not any("duplicate_prototypes" in ids(level[: n + 1]) for n in range(len(level)))


def test_two_copies_among_few_prototypes_are_flicker_and_three_are_not():
    def records(unique):
        found = {"live": 16, "count": 16, "live_unique": {"0.025": unique}}
        return [{"step": s, "prototypes": found} for s in (0, 50, 100)]

    assert not ids(records(14))
    assert "duplicate_prototypes" in ids(records(13))


def test_an_encoder_that_starts_with_a_low_rank_and_rises_is_silent():
    narrow = np.where(np.arange(DIM)[None, :] > 0, 0.01, 1.0).astype(np.float32)
    records = [evaluation(0, normal(0, ROWS) * narrow, normal(1, K)),
               evaluation(100, normal(0, ROWS) * np.sqrt(narrow), normal(1, K))]  # fmt: skip
    assert not {"encoder_collapse", "constant_side"} & ids(records)


# --------------------------------------------------------------------------------------------------- history
def test_findings_are_in_order_of_consequence():
    records = runs(**{"loss/total": None, "estimator/floor_share": 0.9, "loss/consistency": CHANCE}, input_wait=0.5)
    found = [f["detector"] for f in diagnose(records)]
    assert found == ["not_finite", "chance_loss", "variance_floor", "starving_input"]


def test_what_has_gone_again_stays_as_a_notice():
    (finding,) = diagnose(runs(**{"estimator/floor_share": lambda s: 0.9 if 50 <= s < 100 else 0.0}))
    assert (finding["detector"], finding["severity"], finding["step"]) == ("variance_floor", "notice", 50)
    assert finding["evidence"].startswith("Gone at step 100: ")


def test_reading_record_by_record_equals_reading_at_once_and_reads_each_once(monkeypatch):
    records = runs(**{"loss/consistency": CHANCE, "estimator/floor_share": lambda s: 0.9 if s > 100 else 0.0})
    read = []
    append = History.append
    monkeypatch.setattr(History, "append", lambda self, record: (read.append(record["step"]), append(self, record))[1])
    diagnosis = Diagnosis()
    for end in range(1, len(records) + 1):
        found = diagnosis(records[:end])
    assert len(read) == len(records)
    assert found == diagnose(records)


def test_a_rewound_history_is_read_again():
    records = runs(**{"estimator/floor_share": lambda s: 0.9 if s > 100 else 0.0})
    diagnosis = Diagnosis()
    assert diagnosis(records)
    assert diagnosis(records[:5]) == []
    assert diagnosis(runs()) == []


def test_records_read_alike_nested_or_flat():
    nested = {"metrics": {"loss": {"total": 1.0}, "flag": True, "name": "x", "bad": None}}
    assert flatten(nested) == pytest.approx({"loss/total": 1.0, "bad": math.nan}, nan_ok=True)
    history = History()
    assert history.append({"kind": "event", "step": 3, "text": "resumed"}) == set()
    assert history.append({"step": 5, "loss/total": 2.0}) == {"loss/total"}
    assert (history.step, history.last("loss/total"), history.last("absent")) == (5, 2.0, None)


def test_an_empty_history_has_no_findings():
    assert diagnose([]) == []
