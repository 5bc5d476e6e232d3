"""Studies: names, changes, tables; the smoke version of each installed study is run in the full tier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from protojax import cli, configs_path, study
from protojax.study import Row, Study, Trial

VERSIONS = {"jax": "0", "numpy": "0"}
STUDIES = sorted({p.stem for d in configs_path.directories() for p in (d / "studies").glob("*.py")})


def plant(root: Path, planned: Study, numbers: dict[str, list[float]]) -> None:
    """Summaries as finished runs leave them."""
    for trial in planned.trials:
        for seed, value in zip(planned.seeds, numbers.get(trial.label, []), strict=False):
            where = study.workdir(root, trial, seed)
            where.mkdir(parents=True)
            record = {"seed": seed, "knn": {"fine": {"20": value}}, "device": "cpu x 1", "versions": VERSIONS}
            (where / "summary.json").write_text(json.dumps(record))


@pytest.fixture
def planned() -> Study:
    return Study(
        name="planned",
        question="Which is better?",
        trials=(Trial("ours", "quickstart:decoupled,smoke"), Trial("theirs", "quickstart:joint,smoke")),
        rows=(Row("k-NN, %", "knn/fine/20", 100), Row("absent", "groups/tail")),
        seeds=(0, 1, 2),
        reference="ours",
        compared=("k-NN, %",),
    )


def test_the_table_holds_means_spreads_and_standard_errors(planned, tmp_path):
    ours, theirs = [0.30, 0.32, 0.34], [0.20, 0.20, 0.26]
    plant(tmp_path, planned, {"ours": ours, "theirs": theirs})
    text = study.markdown(planned, tmp_path, "protojax study planned")
    sd = lambda x: 100 * np.std(x, ddof=1)  # noqa: E731
    assert f"| k-NN, % | 32.0 ± {sd(ours):.1f} | 22.0 ± {sd(theirs):.1f} |" in text
    assert "| absent | – | – |" in text
    error = np.sqrt(sd(ours) ** 2 / 3 + sd(theirs) ** 2 / 3)
    assert f"| k-NN, % | +10.0 ({error:.2f}) |" in text
    assert "Not run" not in text


def test_what_is_missing_is_named_and_one_seed_has_no_spread(planned, tmp_path):
    plant(tmp_path, planned, {"ours": [0.3]})
    text = study.markdown(planned, tmp_path, "x")
    assert "| k-NN, % | 30.0 |" in text
    assert "Not run: ours-1, ours-2, theirs-0, theirs-1, theirs-2." in text
    with pytest.raises(ValueError, match="no run of study 'planned' is finished"):
        study.markdown(planned, tmp_path / "nowhere", "x")


def test_a_page_keeps_what_people_wrote():
    first = study.insert("# Title\n\nBefore.\n", "one")
    edited = first.replace("Before.", "Before, edited.") + "\nAfter.\n"
    second = study.insert(edited, "two")
    assert "Before, edited." in second
    assert second.endswith("After.\n")
    assert "two" in second
    assert "one" not in second


def test_write_leaves_a_line_a_run(planned, tmp_path):
    plant(tmp_path, planned, {"ours": [0.3, 0.4], "theirs": [0.2]})
    page, lines = study.write(planned, tmp_path, tmp_path / "out" / "page.md", "protojax study planned")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(r["trial"], r["seed"]) for r in records] == [("ours", 0), ("ours", 1), ("theirs", 0)]
    assert all(r["command"] == "protojax study planned" for r in records)
    assert study.BEGIN in page.read_text()


def test_changes_reach_the_configuration_and_typos_do_not():
    changed = study.config_of(
        Trial("t", "quickstart:smoke", {"method.steps": 7, "method.estimator.temperature": ("linear", 0.1, 0.01)}), 5
    )
    assert (changed.method.steps, changed.seed) == (7, 5)
    assert changed.method.estimator.options["temperature"] == ("linear", 0.1, 0.01)
    with pytest.raises(ValueError, match=r"trial 't': .* no key 'method.step'.*'steps'"):
        study.config_of(Trial("t", "quickstart:smoke", {"method.step": 7}), 0)
    with pytest.raises(ValueError, match=r"no key 'methods\.steps'"):
        study.config_of(Trial("t", "quickstart:smoke", {"methods.steps": 7}), 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "no function get_study"),
        ("trials = (Trial('a', 'c'), Trial('a', 'c'))", "labels that differ"),
        ("trials = ()", "at least one trial"),
        ("trials, reference = (Trial('a', 'c'),), 'b'", "reference 'b' is none of the trials"),
        ("trials, compared = (Trial('a', 'c'),), ('z',)", r"compared rows \['z'\] are not among the rows"),
    ],
)
def test_bad_study_files(body, message, tmp_path):
    path = tmp_path / "bad.py"
    function = "" if body == "x = 1" else (
        "def get_study(smoke=False):\n    reference, compared = None, ()\n    " + body
        + "\n    return Study('s', 'q', trials, (), reference=reference, compared=compared)\n"
    )  # fmt: skip
    path.write_text(f"from protojax.study import Study, Trial\n{function}")
    with pytest.raises(ValueError, match=message):
        study.load(str(path))


def test_unknown_names(planned, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no trial 'our'.*did you mean 'ours'"):
        study.run(planned, tmp_path, only=("our",))
    assert cli.main(["study", "quickstar"]) == 2
    assert "quickstart" in capsys.readouterr().err


@pytest.mark.parametrize("name", STUDIES)
def test_every_trial_of_an_installed_study_is_a_configuration(name):
    for smoke in (False, True):
        found = study.load(name, smoke)
        for trial in found.trials:
            assert study.config_of(trial, found.seeds[0]).seed == found.seeds[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_smoke(name, tmp_path):
    """Every run of the smoke version ends, the table has no dash, and a second call trains nothing."""
    found = study.load(name, smoke=True)
    study.run(found, tmp_path / "runs", say=lambda text: None)
    page = study.write(found, tmp_path / "runs", tmp_path / f"{name}.md", "x")[0].read_text()
    assert "Not run" not in page
    assert not [line for line in page.splitlines() if line.startswith("| k-NN") and "–" in line]
    said: list[str] = []
    study.run(found, tmp_path / "runs", say=said.append)
    assert "0 to go" in said[0]
