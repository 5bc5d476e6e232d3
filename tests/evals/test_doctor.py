"""The doctor says what the detectors see in a run, in order of consequence, and its exit status tells it apart."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import healthy as measured
from protojax import running
from protojax.audit import directories
from protojax.checkpoint import Checkpoints
from protojax.cli import main
from protojax.config import freeze
from protojax.evals.detectors import IDS, SEVERITIES
from protojax.reporting.doctor import FIELDS, examine
from tests.evals.test_detectors import CHANCE, PLANTED, dying_prototypes, healthy, runs
from tests.toy import config_dict

ROOT = Path(__file__).parents[2]
CONFIGS = measured.failure_names()
WORKLOADS = ("prototypes", "soft_labels", "prompts", "alignment")


def write(path: Path, records: list[dict], total: int = 400) -> Path:
    path.mkdir()
    lines = [json.dumps({**record, "fraction": record["step"] / total}) for record in records]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_healthy_run_ends_with_status_0(tmp_path, capsys):
    run = write(tmp_path / "run", healthy(0))
    assert main(["doctor", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["doctor", str(run)]) == 0
    said = capsys.readouterr().out
    assert re.match(r"Nothing is wrong with .*: none of \d+ detectors fired on 46 records up to step 400\.", said)
    assert "dead_term" in said.split("Without a number to look at: ")[1]


def test_findings_come_in_order_of_consequence_and_end_with_status_1(tmp_path, capsys):
    changes = {"loss/total": None, "estimator/floor_share": 0.9, "loss/consistency": CHANCE}
    run = write(tmp_path / "run", runs(**changes, input_wait=0.5), total=200)
    assert main(["doctor", str(run), "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [f["detector"] for f in findings] == ["not_finite", "chance_loss", "variance_floor", "starving_input"]
    assert all(tuple(f) == FIELDS and f["severity"] in SEVERITIES and f["evidence"] for f in findings)
    assert main(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("4 things are wrong with")
    assert said.index("1. [error] not_finite") < said.index("3. [warning] variance_floor")
    assert "Try: Lower config.method.optim.peak_lr" in said


@pytest.mark.parametrize("name", PLANTED)
def test_every_planted_failure_is_found_from_the_file_alone(name, tmp_path):
    seen = examine(write(tmp_path / "run", PLANTED[name](), total=200))
    assert name in {f["detector"] for f in seen.findings}
    assert seen.wrong


def test_a_notice_alone_is_no_failure(tmp_path, capsys):
    """What has gone again is told, and the run is well."""
    records = runs(**{"estimator/floor_share": lambda s: 0.9 if 50 <= s < 100 else 0.0})
    run = write(tmp_path / "run", records)
    assert main(["doctor", str(run), "--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["severity"] == "notice"


def test_chance_before_the_warm_up_of_the_whole_run_is_a_notice(tmp_path):
    records = runs(steps=200, **{"loss/consistency": CHANCE})
    early = examine(write(tmp_path / "early", records, total=3000))
    late = examine(write(tmp_path / "late", records, total=200))
    assert [f["severity"] for f in early.findings] == ["notice"]
    assert [f["severity"] for f in late.findings] == ["error"]


def test_a_step_that_left_no_numbers_is_taken_from_the_record(tmp_path):
    """The step that became NaN stops the run before its numbers are written."""
    finding = {"kind": "diagnosis", "step": 60, "detector": "not_finite", "severity": "error", "evidence": "step 60"}
    seen = examine(write(tmp_path / "run", [*runs(steps=50), finding]))
    assert [(f["detector"], f["step"], f["cause"]) for f in seen.findings] == [("not_finite", 60, "")]


def test_an_old_diagnosis_does_not_outlive_the_numbers(tmp_path):
    """Findings are made anew: what a recorded line says of a detector that is silent now does not count."""
    stale = {"kind": "diagnosis", "step": 9, "detector": "dead_prototypes", "severity": "error", "evidence": "old"}
    assert not examine(write(tmp_path / "run", [*healthy(1), stale])).wrong


def test_unfinished_and_damaged_runs_are_examined_and_said(tmp_path, capsys):
    run = write(tmp_path / "run", dying_prototypes())
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "eval", "st')
    assert main(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    assert "1. [error] dead_prototypes, step 200" in said
    assert "Note: summary.json is absent: the run has not finished." in said
    assert re.search(r"Note: metrics.jsonl line 5 is not JSON", said)


@pytest.mark.parametrize(("made", "message"), [(False, "no run directory"), (True, "is not a run directory")])
def test_a_folder_without_a_run_is_an_error_of_the_user(made, message, tmp_path, capsys):
    path = tmp_path / "run"
    if made:
        path.mkdir()
    assert main(["doctor", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_record_is_an_error_of_the_user(tmp_path):
    with pytest.raises(ValueError, match="no record of a step or an evaluation yet"):
        examine(write(tmp_path / "run", []))


# -------------------------------------------------------------------------------------------------- checkpoints
def saved(run: Path, step: int, value: float) -> Path:
    """A checkpoint of two arrays in the trainer's own format."""
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    checkpoints.save(step, {"teacher": {"kernel": np.full((2, 3), value, np.float32)}, "step": np.int32(step)}, {})
    checkpoints.wait()
    checkpoints.close()
    return run / "checkpoints" / str(step)


def test_the_newest_checkpoint_is_looked_at(tmp_path, capsys, monkeypatch):
    """NaN that no metric showed is found with the name of its array; what cannot be read is said, and fails nothing."""
    run = write(tmp_path / "run", healthy(0))
    saved(run, 200, 1.0)
    assert not examine(run).wrong
    newest = saved(run, 400, np.nan)
    monkeypatch.chdir(tmp_path)  # a relative path, as on the command line
    assert directories.not_finite(Path("run/checkpoints/400")) == ["teacher/kernel"]
    assert main(["doctor", "run", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["detector"], finding["severity"], finding["step"]) == ("not_finite", "error", 400)
    assert finding["evidence"] == "teacher/kernel of checkpoint 400 hold NaN or infinity."
    shutil.rmtree(newest / "state" / "d", ignore_errors=True)
    for path in (newest / "state").glob("*.ocdbt"):
        path.write_bytes(b"")
    (run / "damaged-100").mkdir()
    notes = " ".join(examine(run).notes)
    assert not examine(run).wrong
    assert "damaged checkpoints were set aside: damaged-100." in notes
    assert "checkpoint 400 cannot be read, and an older one will be resumed from" in notes


# --------------------------------------------------------------------------------------------- failure configs
# Random heads are independent of one another, and so start at the expected loss whatever the configuration: only data
# that give the pairing away, or a mistake in the loss, can plant it. In `test_retrieval_pairs` a history does.
NO_CONFIG = {"start_loss"}


def test_every_detector_has_a_failure_config():
    """Each id of the table must be heard of in a run that anybody can start."""
    wanted = {name: measured.expected(name) for name in CONFIGS}
    assert {detector for ids in wanted.values() for detector in ids} == set(IDS) - NO_CONFIG
    for name in CONFIGS:
        config = freeze(config_dict(f"failures/{name}"))
        assert config.name == f"failures/{name}"
        assert name.startswith(f"{config.method.workload}_")


def test_the_table_of_failures_names_every_config_with_what_it_fires():
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", page, re.M)
    assert {name: re.findall(r"`(\w+)`", ids) for name, ids in rows} == {n: measured.expected(n) for n in CONFIGS}


def test_the_page_of_measurements_is_up_to_date():
    """docs/results/doctor.md is made of its records; every config is in it, and each fires what it must."""
    path = ROOT / measured.OUT
    records = measured.read_lines(path)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == measured.page(records, path.parent)
    failures = {r["config"]: r for r in records if r["kind"] == "failure"}
    assert set(failures) == set(CONFIGS)
    assert [name for name, r in failures.items() if measured.silent(r)] == []


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS)
def test_failures_fire_and_healthy_seeds_are_silent(workload, tmp_path):
    """Trained in a process of its own: one device, so that each config compiles in seconds."""
    names = [name for name in CONFIGS if name.startswith(workload)]
    cache = os.environ.get("PROTOJAX_TEST_CACHE", str(ROOT / ".cache" / "jax"))
    command = [sys.executable, "-m", "benchmarks.healthy", f"--only={','.join([workload, *names])}", "--seeds=2",
               f"--out={tmp_path / 'out.jsonl'}", f"--cache={cache}"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    records = measured.read_lines(tmp_path / "out.jsonl")
    assert {r["config"] for r in records if r["kind"] == "failure"} == set(names), found.stderr[-2000:]
    assert {r["config"]: measured.silent(r) for r in records if r["kind"] == "failure" and measured.silent(r)} == {}
    well = [r for r in records if r["kind"] == "healthy"]
    assert [r["seed"] for r in well] == [0, 1]
    # What else the machine does decides how long a step waits for its batch.
    assert [{*r["training"], *r["doctor"]} - {"starving_input"} for r in well] == [set(), set()]
    assert all(r["after"] >= r["before"] for r in well)


@pytest.mark.slow
def test_a_finding_stops_the_run_where_that_is_asked(tmp_path):
    cfg = measured.quiet(config_dict("failures/soft_labels_uniform"))
    cfg.run.on_finding = "stop"
    with pytest.raises(
        RuntimeError, match=r"stopped by run.on_finding='stop': \[error\] uniform_by_construction at st"
    ):
        running.train_config(freeze(cfg), tmp_path, say=lambda text: None)
    assert "uniform_by_construction" in {f["detector"] for f in examine(tmp_path).findings}
