"""Retrieval in both directions with chance beside it, and the detectors on planted and healthy histories."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from protojax.evals.alignment import held_out_losses, side_report
from protojax.evals.detectors import diagnose
from protojax.evals.detectors_alignment import TABLE
from protojax.evals.retrieval_pairs import one_direction, pair_retrieval, prefix_units, zero_shot

D, WIDTHS = 8, (8, 4, 2)


def rows(seed: int, count: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)


def test_expected_recall_and_rank_are_averages_over_all_orders_of_ties():
    """Scores on a coarse grid, so that many tie; every order of the gallery, ties broken by position."""
    draw = np.random.default_rng(0)
    queries = np.eye(D, dtype=np.float32)[:3]
    gallery = np.round(draw.normal(size=(5, D)) * 0.7).astype(np.float32)
    gallery[:, 3:] = 0
    ids, query_ids = np.asarray([0, 1, 2, 0, 1]), np.asarray([0, 1, 2])
    found = one_direction(queries, gallery, query_ids, ids, ks=(1, 2, 3))
    scores = queries @ gallery.T
    recall, inverse = {k: [] for k in (1, 2, 3)}, []
    for order in itertools.permutations(range(5)):
        ranked = np.argsort(-scores[:, order], axis=1, kind="stable")
        hits = ids[np.asarray(order)][ranked] == query_ids[:, None]
        for k in recall:
            recall[k].append(hits[:, :k].any(axis=1).mean())
        inverse.append(1 + hits.argmax(axis=1))
    for k, values in recall.items():
        assert found["recall"][str(k)] == pytest.approx(np.mean(values), rel=1e-12)
    assert found["mean_rank"] == pytest.approx(np.mean(inverse), rel=1e-12)


def test_a_constant_side_is_exactly_at_chance_in_every_prefix():
    ids, constant = np.asarray([0, 0, *range(1, 11)]), np.ones((12, D), np.float32)
    alone = pair_retrieval(rows(0), constant, np.arange(12), widths=WIDTHS)
    found = pair_retrieval(rows(0), constant, ids, widths=WIDTHS)
    # With equal captions, which image comes first for a constant *query* is luck: one direction there.
    for side, d, k in itertools.product(("i2t", "t2i", "repeated"), ("8", "4", "2"), ("1", "5", "10")):
        result = found["i2t"][d] if side == "repeated" else alone[side][d]
        assert result["recall"][k] == pytest.approx(result["chance"][k], rel=1e-9)
    # Twelve images and eleven texts: one text has two images.
    by_hand = (10 * (5 / 12) + (1 - math.comb(10, 5) / math.comb(12, 5))) / 11
    assert found["t2i"]["8"]["chance"]["5"] == pytest.approx(by_hand, rel=1e-9)
    assert found["i2t"]["8"]["chance"]["5"] == pytest.approx(5 / 11, rel=1e-9)
    assert found["i2t"]["8"]["mean_rank"] == pytest.approx(6.0)


def test_equal_pairs_are_found_and_prefixes_are_renormalised():
    text = rows(1)
    found = pair_retrieval(5.0 * text, text, np.arange(12), widths=WIDTHS)
    assert found["r1"]["8"] == found["r1"]["2"] == found["retention"]["4"] == 1.0
    np.testing.assert_allclose(prefix_units(prefix_units(text, 4), 2), prefix_units(text, 2), atol=1e-6)
    # Several captions an image: the image stands once in its gallery.
    image = np.repeat(rows(2, 4), 3, axis=0)
    several = pair_retrieval(image, image + 0.01 * rows(3), np.arange(12), np.repeat(np.arange(4), 3), widths=(8,))
    assert several["t2i"]["8"]["gallery"] == 4
    assert several["i2t"]["8"]["gallery"] == 12
    assert several["r1"]["8"] == 1.0
    # A repeated caption stands once in the gallery, so that five places hold five texts.
    ids = np.asarray([0, 0, 0, *range(3, 12)])
    repeated = pair_retrieval(rows(4), rows(5)[ids], ids, widths=(8,))
    assert repeated["i2t"]["8"]["gallery"] == 10
    assert repeated["t2i"]["8"]["queries"] == 10
    assert repeated["t2i"]["8"]["gallery"] == repeated["i2t"]["8"]["queries"] == 12
    # One caption of two images, one image of two captions: found from either side.
    both = pair_retrieval(rows(6, 3)[[0, 0, 1]], rows(6, 3)[[0, 1, 1]], np.asarray([0, 1, 1]), np.asarray([0, 0, 1]),
                          widths=(8,))  # fmt: skip
    assert both["t2i"]["8"]["recall"]["1"] == both["i2t"]["8"]["recall"]["1"] == 1.0
    zero = zero_shot(image, np.repeat(np.arange(4), 3), image[::3], widths=(8,))
    assert zero["accuracy"]["8"] == 1.0
    assert zero["chance"] == 0.25
    with pytest.raises(ValueError, match="are the ids of both sides in step"):
        one_direction(text, text, np.arange(12), np.arange(12) + 50)
    with pytest.raises(ValueError, match="finite"):
        one_direction(text * np.nan, text, np.arange(12), np.arange(12))


@pytest.mark.parametrize("spread", [1e-5, 1e-4, 3e-4, 3e-3])
def test_a_constant_side_is_at_chance_however_close_the_other_sides_rows_are(spread):
    """As in training: the text is one vector, the images are driven towards another one."""
    draw = np.random.default_rng(0)
    text = np.tile(draw.normal(size=(1, 64)), (1100, 1)).astype(np.float32)
    images = (draw.normal(size=(1, 64)) + spread * draw.normal(size=(1100, 64))).astype(np.float32)
    found = pair_retrieval(images, text, np.arange(1100), widths=(64, 16))
    for side in ("i2t", "t2i"):
        for report in found[side].values():
            for k, chance in report["chance"].items():
                assert report["recall"][k] == pytest.approx(chance, rel=1e-9)


def test_side_report_and_held_out_loss_of_a_constant_tower():
    constant = np.ones((12, D), np.float32)
    report = side_report(constant, WIDTHS)
    assert report["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert report["rank"] == pytest.approx(1.0, abs=1e-6)
    assert report["std"] == 0.0
    assert side_report(rows(0), WIDTHS)["rank"] > 4
    loss = held_out_losses(constant, constant, np.arange(12), widths=WIDTHS, sharpness=14.0, batch=8)
    # One batch of 8 and a partial one of 4: each pair counts once.
    assert loss["chance"] == pytest.approx((8 * math.log(8) + 4 * math.log(4)) / 12, rel=1e-6)
    assert loss["contrastive_full"] == pytest.approx(loss["chance"], rel=1e-5)


# --------------------------------------------------------------------------------------------------- detectors
def history(
    *, loss: float, recall: float, cosine: float, rank: float, entropy: float = 0.7, short: float | None = None
):
    """Records of a run of 400 steps, batch 128, gallery 1,000: what it ends with, reached half-way."""
    chance, records = math.log(128), []
    for step in range(1, 401):
        now = chance + 0.2 * math.exp(-step / 20) if step < 30 or loss > chance - 1e-2 else loss
        now = loss if abs(loss - chance) < 1e-2 and step > 30 else now
        parts = {
            f"loss/prefix_{d}": now + (0.0 if abs(loss - chance) < 1e-2 else 0.1 * i) for i, d in enumerate((64, 8))
        }
        records.append({"kind": "train", "step": step, "fraction": step / 400, "metrics": {
            "loss/contrastive_full": now, "loss/chance": chance, "loss/above_chance": now - chance,
            "loss/temperature": 0.07, **parts}})  # fmt: skip
        if step in (1, 100, 200, 300, 400):
            at = 0.001 if step == 1 else recall
            direction = {"64": {"recall": {"1": at, "5": 5 * at}, "chance": {"1": 0.001, "5": 0.005}, "gallery": 1000}}
            sides = {"cosine": 0.5 if step == 1 else cosine, "rank": 20.0 if step == 1 else rank}
            records.append({"kind": "eval", "step": step, "fraction": step / 400, "metrics": {"alignment": {
                "r1": {"64": at, "8": at if short is None else short}, "chance": {"1": 0.001}, "i2t": direction,
                "t2i": direction, "text": sides, "image": {"cosine": 0.1, "rank": 30.0}, "attention_entropy": entropy,
                "loss": {"above_chance": now - chance - 0.01 * step / 400}, "epoch": 16 * step / 400}}})  # fmt: skip
    return records


HEALTHY = {"loss": 0.5, "recall": 0.9, "cosine": 0.1, "rank": 40.0}


def fired(**changes) -> dict[str, dict]:
    found = diagnose(history(**(HEALTHY | changes)), warmup_steps=40)
    return {f["detector"]: f for f in found if f["severity"] != "notice"}


def test_a_healthy_run_is_silent():
    assert fired() == {}


def test_a_constant_text_tower_is_named_with_its_cure():
    found = fired(loss=math.log(128), recall=0.001, cosine=1.0, rank=1.0)
    assert {"chance_loss", "constant_side", "chance_retrieval", "equal_parts"} <= set(found)
    assert "4.8520" in found["chance_loss"]["evidence"]
    assert "text embeddings are identical" in found["constant_side"]["evidence"]
    assert "'eos' or 'mean'" in found["constant_side"]["advice"]


@pytest.mark.parametrize(
    ("changes", "detector"),
    [
        ({"entropy": 0.995}, "flat_attention"),
        ({"short": 0.95}, "prefix_order"),
        ({"recall": 0.02}, "milestone"),
    ],
)
def test_planted_failures(changes, detector):
    assert set(fired(**changes)) == {detector}


def test_retrieval_at_chance_scatters_as_a_sample_does():
    """A random ranking of 256 pairs hits R@10 in 10 of them, give or take three; twice that is no chance any more."""
    rng = np.random.default_rng(0)
    rank = rng.permuted(np.tile(np.arange(256), (256, 1)), axis=1)[:, 0]
    hits = {k: float((rank < k).mean()) for k in (1, 5, 10)}
    assert abs(hits[10] - 10 / 256) > 0.5 / 256

    def named(found):
        records = history(**HEALTHY)
        for record in records:
            if record["kind"] == "eval" and record["step"] > 1:
                side = {"recall": {str(k): v for k, v in found.items()}, "gallery": 256,
                        "chance": {str(k): k / 256 for k in found}}  # fmt: skip
                record["metrics"]["alignment"] |= {"i2t": {"64": side}, "t2i": {"64": side}}
        return {f["detector"] for f in diagnose(records, warmup_steps=40) if f["severity"] != "notice"}

    assert "chance_retrieval" in named(hits)
    assert "chance_retrieval" not in named({k: v + 20 / 256 for k, v in hits.items()})


def test_a_first_loss_that_leaks_or_is_far_too_high():
    for start, expected in ((math.log(128) + 0.2, set()), (math.log(128) + 5.0, {"start_loss"}), (3.0, {"start_loss"})):
        record = {"kind": "train", "step": 1, "metrics": {
            "loss/above_chance": start - math.log(128), "loss/chance": math.log(128), "loss/temperature": 0.07,
            "loss/prefix_512": start}}  # fmt: skip
        assert {f["detector"] for f in diagnose([record])} == expected


def test_a_part_without_gradient_on_the_first_step_is_named():
    def records(later):
        healthy = {
            "loss/above_chance": 0.2,
            "loss/chance": math.log(128),
            "loss/temperature": 0.07,
            "loss/prefix_512": 5.0,
        }
        return [{"kind": "train", "step": s, "metrics": healthy | {"gradient/pool/query": v, "gradient/latents": 0.1}}
                for s, v in ((1, 0.0), (10, later))]  # fmt: skip

    found = diagnose(records(0.0))
    assert [f["detector"] for f in found] == ["dead_parameter"]
    assert "pool/query" in found[0]["evidence"]
    assert diagnose(records(0.3)) == [] or diagnose(records(0.3))[0]["severity"] == "notice"


def test_every_threshold_has_a_reason_and_every_id_was_planted_above():
    planted = {"constant_side", "chance_loss", "chance_retrieval", "equal_parts", "flat_attention", "prefix_order",
               "milestone", "dead_parameter", "start_loss"}  # fmt: skip
    assert {d.id for d in TABLE} == planted
    assert all(len(t.reason) > 4 and d.advice for d in TABLE for t in d.thresholds.values())
