"""Comparison of runs: grouping, arithmetic, and what is said about runs that are not whole."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from protojax.report import compare
from protojax.reporting.compare import Group, group_runs, mean_and_sd, text_table
from protojax.reporting.facts import facts_of
from protojax.reporting.records import load_run

K = 100


def write_run(
    path: Path, arm: str, seed: int, knn: float, unique: int = 100, finished: bool = True, steps: int = 40
) -> Path:
    """A finished or unfinished run of `steps` steps with three evaluations."""
    path.mkdir(parents=True)
    lines, metrics = [], {}
    for step in (0, steps // 2, steps):
        done = step / steps
        counts = dict.fromkeys(("0.025", "0.1", "0.25", "0.5"), round(K + done * (unique - K)))
        prototypes = {"count": K, "dim": 8, "unique": counts, "live": 80, "live_unique": counts}
        score = 0.1 + done * (knn - 0.1)
        metrics = {"knn": {"fine": {"20": score}, "coarse": {"20": 2 * score}}, "effective_rank": 9.5}
        metrics |= {"groups": {"fine": {"head": score, "tail": score / 2}}}
        metrics |= {"prototypes": prototypes | {"perplexity": 71.0, "coverage": 0.875}}
        lines.append({"kind": "eval", "step": step, "fraction": done, "metrics": metrics})
        lines.append({"kind": "train", "step": step, "images_per_second": 400.0, "metrics": {"loss/total": 5 - done}})
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    config = {"name": "quickstart", "method": {"arm": arm}, "run": {"seed": seed}}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if finished:
        summary = {"version": 1, "name": "quickstart", "arm": arm, "seed": seed, "steps": steps, **metrics}
        summary["controls"] = {"untrained_knn": {"fine": {"20": 0.1}}, "initial_unique": {"0.5": K}}
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return path


def cells(text: str, arm: str, seed: str) -> list[str]:
    """The row of the text table that starts with arm and seed, split at runs of two or more spaces."""
    rows = [[c.strip() for c in line.split("  ") if c.strip()] for line in text.splitlines()]
    return next(row for row in rows if row[:2] == [arm, seed])


def test_seeds_of_an_arm_become_mean_and_sample_sd(tmp_path: Path) -> None:
    scores = (0.15, 0.16, 0.18)
    runs = [write_run(tmp_path / f"d{s}", "decoupled", s, knn) for s, knn in enumerate(scores)]
    runs.append(write_run(tmp_path / "j0", "joint", 0, 0.14, unique=30))
    text, page = compare(runs, tmp_path / "out.html")
    mean, sd = 100 * statistics.fmean(scores), 100 * statistics.stdev(scores)
    assert cells(text, "decoupled", "n=3")[2:6] == [
        f"{mean:.1f}±{sd:.1f}",
        f"{2 * mean:.1f}±{2 * sd:.1f}",
        "10.0±0.0",
        "100±0",
    ]
    assert cells(text, "decoupled", "1")[2:4] == ["16.0", "32.0"]
    start, end, live, distinct, perplexity, coverage, rank, tail, rate = cells(text, "joint", "0")[5:]
    assert (start, end, live, distinct) == ("100", "30", "80", "30")
    assert (perplexity, coverage, rank, tail, rate) == ("71", "0.875", "9.5", "7.0", "400")
    assert not [line for line in text.splitlines() if line.startswith("joint") and "n=" in line]
    html = page.read_text(encoding="utf-8")
    assert page == tmp_path / "out.html"
    assert "http" not in html.replace("http-equiv", "")
    assert "Highest k-NN: decoupled, 16.3%, 2.3 points above joint." in html
    assert "unique at 0.5 fell, 100 to 30" in html
    assert html.count("<svg ") == 9


def test_mean_and_sd_leave_missing_values_out() -> None:
    assert mean_and_sd([]) == (None, None, 0)
    assert mean_and_sd([None, 3.0]) == (3.0, None, 1)
    mean, sd, n = mean_and_sd([1.0, None, 3.0])
    assert (mean, n) == (2.0, 2)
    assert sd == pytest.approx(2**0.5, rel=1e-12)


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", "joint", 0, 0.2), write_run(tmp_path / "b", "joint", 0, 0.2, steps=80)]
    runs.append(write_run(tmp_path / "c", "joint", 1, 0.2, steps=80))
    groups = group_runs([facts_of(load_run(run)) for run in runs])
    assert groups == [Group("joint (40 steps)", (0,)), Group("joint (80 steps)", (1, 2))]


def test_a_repeated_directory_counts_once_and_a_repeated_seed_is_said(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a", "joint", 0, 0.2), write_run(tmp_path / "b", "joint", 0, 0.2)
    text, page = compare([first, first, second])
    assert page == tmp_path / "compare.html"
    assert "n=2" in text
    assert "joint: a seed appears more than once" in text


def test_an_unfinished_run_is_compared_and_marked(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", "joint", 0, 0.2), write_run(tmp_path / "b", "decoupled", 3, 0.2, finished=False)]
    text, page = compare(runs, tmp_path / "folder")
    assert cells(text, "decoupled", "3*")[2] == "20.0"
    assert "not finished; numbers are from the last evaluation, step 40, because summary.json is absent" in text
    assert page == tmp_path / "folder" / "compare.html"


def test_a_damaged_line_is_named_and_skipped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "joint", 0, 0.2)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')
    text, _ = compare([run])
    assert "metrics.jsonl line 7 is not JSON" in text


def test_names_are_escaped(tmp_path: Path) -> None:
    arm = '</svg><script>alert("x")</script>$a$'
    _, page = compare([write_run(tmp_path / "<b>", arm, 0, 0.2), write_run(tmp_path / "c", "joint", 0, 0.2)])
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<b>" not in html


def test_text_table_lines_up() -> None:
    lines = text_table(["arm", "seed", "k-NN fine %"], [["a", "0", "1.0"], ["long name", "12", "100.0"]]).splitlines()
    assert len({len(line) for line in lines[3:]}) == 1
    assert [line.split() for line in lines[:3]] == [["k-NN"], ["fine"], ["arm", "seed", "%"]]
    assert lines[4].endswith("  1.0")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compare needs at least one run directory, got none"):
        compare([])
    with pytest.raises(ValueError, match=r"no run directory .*nowhere: it does not exist"):
        compare([tmp_path / "nowhere"])
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot write .*give a folder that can be written"):
        compare([write_run(tmp_path / "a", "joint", 0, 0.2)], blocked / "sub" / "page.html")
