"""Records tell one history; numbers are plain; rates leave out what is not training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from protojax import metrics


def test_sums_and_counts_add_to_the_mean_of_all():
    a = {"x": (jnp.float32(6.0), jnp.float32(2.0)), "never": (jnp.float32(0.0), jnp.float32(0.0))}
    b = {"x": (jnp.float32(1.0), jnp.float32(2.0)), "never": (jnp.float32(0.0), jnp.float32(0.0))}
    assert metrics.means(metrics.add(a, b)) == {"x": 7.0 / 4.0}


def test_plain_is_json_and_not_finite_is_null():
    value = {"a": np.float32(1.5), 2: [np.nan, jnp.int32(3)], "c": {"d": np.arange(2)}}
    assert json.loads(json.dumps(metrics.plain(value))) == {"a": 1.5, "2": [None, 3], "c": {"d": [0, 1]}}


def writer(path: Path, step: int | None = None) -> metrics.Writer:
    return metrics.Writer(path, step=step, tensorboard=False)


def test_a_resumed_run_drops_the_lines_after_its_step(tmp_path: Path):
    first = writer(tmp_path)
    for step in (0, 10, 20, 30):
        first.write("train", step, metrics={"loss/total": 1.0 / (step + 1)})
    first.close()
    second = writer(tmp_path, step=20)
    second.write("train", 30, metrics={"loss/total": 7.0})
    second.close()
    records = metrics.read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["metrics"]["loss/total"]) for r in records] == [
        (0, 1.0),
        (10, 1 / 11),
        (20, 1 / 21),
        (30, 7.0),
    ]


def test_a_torn_last_line_is_dropped_and_a_damaged_one_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert metrics.read_records(path) == [{"kind": "train", "step": 1}]
    path.write_text('{"kind"\n{"kind": "train", "step": 1}\n')
    with pytest.raises(ValueError, match=r"line 1: not a JSON object"):
        metrics.read_records(path)


def test_tensorboard_files_hold_the_scalars(tmp_path: Path):
    w = metrics.Writer(tmp_path, tensorboard=True)
    w.write("eval", 3, metrics={"knn": {"fine": {"20": 0.5}}, "text": "no number"})
    w.close()
    data = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert b"eval/knn/fine/20" in data


def test_writing_json_leaves_no_half_file(tmp_path: Path):
    metrics.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        metrics.write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_the_meter_counts_training_alone():
    meter = metrics.Meter()
    meter.start()
    time.sleep(0.02)
    rate, waited = meter.lap(100, 0.01)
    assert 0 < rate < 100 / 0.02
    assert 0 < waited <= 0.5
    time.sleep(0.05)  # an evaluation
    meter.start()
    meter.lap(100, 0.0)
    assert meter.seconds < 0.07


def test_binned_counts_become_tensorboard_histograms(tmp_path):
    """{upper limit: count} is one histogram, not a scalar for each bin."""
    usage = {"0": 3, "0.1": 1, "1": 4, "inf": 2}
    named = metrics.histograms({"prototypes": {"usage": usage, "live": 6}}, "eval")
    assert list(named) == ["eval/prototypes/usage"]
    bins = named["eval/prototypes/usage"]
    assert (bins["bucket_limits"], bins["bucket_counts"]) == ([0.0, 0.1, 1.0, 10.0], [3.0, 1.0, 4.0, 2.0])
    assert (bins["num"], bins["sum"]) == (10.0, pytest.approx(24.1))
    writer = metrics.Writer(tmp_path)
    writer.write("eval", 5, metrics={"prototypes": {"usage": usage, "live": 6}})
    writer.close()
    (board,) = (tmp_path / "tensorboard").iterdir()
    data = board.read_bytes()
    assert data.count(b"eval/prototypes/usage") == 1
    assert data.count(b"eval/prototypes/live") == 1
