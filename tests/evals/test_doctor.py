"""The doctor says what the detectors see in a run, in order of consequence, and its exit status tells it apart."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from pathlib import Path

import pytest

from protojax import failures, running
from protojax.cli import main
from protojax.config import freeze
from protojax.evals.detectors import IDS, SEVERITIES
from protojax.reporting.doctor import FIELDS, examine
from tests.evals.test_detectors import CHANCE, PLANTED, dying_prototypes, healthy, runs
from tests.toy import config_dict

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "failures").glob("prototypes_*.py"))


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


# --------------------------------------------------------------------------------------------- failure configs
def fires(path: Path) -> str:
    """The id that the header of a failure config names."""
    found = re.search(r"^Fires: ([a-z_]+)$", ast.get_docstring(ast.parse(path.read_text())) or "", re.M)
    assert found, f"{path} does not say which detector fires"
    return found[1]


def test_every_failure_config_names_a_detector():
    assert {fires(path) for path in CONFIGS} == {
        "chance_loss", "dead_prototypes", "duplicate_prototypes", "variance_floor",
        "statistics_underflow", "not_finite",
    } <= set(IDS)  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_failure_configs_are_whole_and_named_after_their_file(path):
    config = freeze(config_dict(f"failures/{path.stem}"))
    assert config.name == f"failures/{path.stem}"
    assert config.method.steps <= 400


def trained(cfg, workdir: Path) -> set[str]:
    """Detectors that call a real run wrong."""
    cfg.run.report = False
    with contextlib.suppress(FloatingPointError):  # not_finite stops the run
        running.train_config(freeze(cfg), workdir, say=lambda text: None)
    return {f["detector"] for f in examine(workdir).findings if f["severity"] != "notice"}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_failure_config_fires_its_detector(path, tmp_path):
    assert fires(path) in trained(config_dict(f"failures/{path.stem}"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_the_run_that_failures_start_from_is_healthy(seed, tmp_path):
    from protojax import experiment

    cfg = experiment.fill(failures.tiny("healthy"))
    cfg.seed = seed
    # Its steps take milliseconds: what else the machine does decides how long they wait.
    assert trained(cfg, tmp_path) - {"starving_input"} == set()


@pytest.mark.slow
def test_a_finding_stops_the_run_where_that_is_asked(tmp_path):
    cfg = config_dict("failures/prototypes_flat_targets")
    cfg.run.on_finding = "stop"
    with pytest.raises(RuntimeError, match=r"stopped by run.on_finding='stop': \[error\] chance_loss at step"):
        trained(cfg, tmp_path)
    assert "chance_loss" in {f["detector"] for f in examine(tmp_path).findings}
