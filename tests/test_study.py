"""Studies: names, changes, tables; the smoke version of each installed study is run in the full tier."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from protojax import cli, configs_path, evidence, jobs, measuring, parallel, running, study, study_page, summary
from protojax.config import Config
from protojax.measuring import Evaluated
from protojax.study import Row, Study, Trial

VERSIONS = {"jax": "0", "numpy": "0"}
STUDIES = sorted({p.stem for d in configs_path.directories() for p in (d / "studies").glob("*.py")})
# Of prototypes: what may stand behind the colon beside the default, and what the table of a smoke version must hold.
PROTOTYPES = {
    "diversity": ("omniglot", "fashion", "tiny_mini", "tiny,resnet18", "tiny,vit_ti"),
    "representation": ("omniglot", "fashion", "tiny,resnet18"),
    "long_tail": ("lt200_if10", "lt100_if100,resnet18", "omniglot", "grocery"),
    "ablation": ("omniglot", "fashion"),
    "sensitivity": ("omniglot", "fashion"),
    "batch_size": ("omniglot", "fashion"),
    "overhead": ("tiny,resnet18",),
    "dense": ("omniglot", "tiny,vit_ti"),
}
NAMES = [*STUDIES, *(f"{name}:{argument}" for name, some in PROTOTYPES.items() for argument in some)]


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
    text = study_page.markdown(planned, study_page.results(planned, tmp_path), "protojax study planned")
    sd = lambda x: 100 * np.std(x, ddof=1)  # noqa: E731
    assert f"| k-NN, % | 32.0 ± {sd(ours):.1f} | 22.0 ± {sd(theirs):.1f} |" in text
    assert "| absent | – | – |" in text
    error = np.sqrt(sd(ours) ** 2 / 3 + sd(theirs) ** 2 / 3)
    assert f"| k-NN, % | +10.0 ({error:.2f}) |" in text
    assert "Not run" not in text


def test_what_is_missing_is_named_and_one_seed_has_no_spread(planned, tmp_path):
    plant(tmp_path, planned, {"ours": [0.3]})
    text = study_page.markdown(planned, study_page.results(planned, tmp_path), "x")
    assert "| k-NN, % | 30.0 |" in text
    assert "Not run: ours seeds 1, 2; no seed of theirs." in text
    with pytest.raises(ValueError, match="no run of study 'planned' is finished or on record"):
        study_page.markdown(planned, {}, "x")


def test_a_page_keeps_what_people_wrote():
    first = study_page.insert("# Title\n\nBefore.\n", "one")
    edited = first.replace("Before.", "Before, edited.") + "\nAfter.\n"
    second = study_page.insert(edited, "two")
    assert "Before, edited." in second
    assert second.endswith("After.\n")
    assert "two" in second
    assert "one" not in second


def test_write_leaves_a_line_a_run(planned, tmp_path):
    plant(tmp_path, planned, {"ours": [0.3, 0.4], "theirs": [0.2]})
    page, lines = study_page.write(planned, tmp_path, tmp_path / "out" / "page.md", "protojax study planned")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(r["trial"], r["seed"]) for r in records] == [("ours", 0), ("ours", 1), ("theirs", 0)]
    assert all(r["command"] == "protojax study planned" for r in records)
    assert study_page.BEGIN in page.read_text()


@pytest.mark.slow
def test_a_study_goes_on_from_its_records_where_the_runs_are_gone(planned, tmp_path):
    """Two sittings: tables and curves keep the first one's runs, and only what is not on record is trained."""
    planned = dataclasses.replace(planned, curves={"k-NN": "knn/fine/20"}, seeds=(0, 1))
    first, second, page = tmp_path / "first", tmp_path / "second", tmp_path / "page.md"
    plant(first, planned, {"ours": [0.3], "theirs": [0.2]})
    where = study.workdir(first, planned.trials[0], 0)
    evaluations = [
        {"kind": "eval", "step": s, "metrics": {"knn": {"fine": {"20": v}}}} for s, v in ((0, 0.1), (4, 0.3))
    ]
    (where / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evaluations))
    study_page.write(planned, first, page, "x")
    plant(second, planned, {"ours": [0.5]})  # seed 0 again: a run that is there comes before its record
    found = study_page.results(planned, second, page.with_suffix(".jsonl"))
    assert {n: {s: r["knn"]["fine"]["20"] for s, r in runs.items()} for n, runs in found.items()} == {
        "ours": {0: 0.5},
        "theirs": {0: 0.2},
    }
    said: list[str] = []
    study.run(planned, tmp_path / "third", only=(), jobs=0, records=page.with_suffix(".jsonl"), say=said.append)
    assert "4 runs, 2 finished (2 on record), 2 to go" in said[0]
    study_page.write(planned, tmp_path / "third", page, "x")
    kept = study_page.results(planned, tmp_path / "nowhere", page.with_suffix(".jsonl"))
    assert {n: sorted(runs) for n, runs in kept.items()} == {"ours": [0, 1], "theirs": [0, 1]}
    assert kept["ours"][0]["curves"] == {"k-NN": [[0.0, 4.0], [0.1, 0.3]]}
    assert "Not run" not in page.read_text()


def test_records_of_another_configuration_or_without_a_measure_count_nothing(planned, tmp_path):
    plant(tmp_path, planned, {"ours": [0.3], "theirs": [0.2]})
    records = study_page.write(planned, tmp_path, tmp_path / "page.md", "x")[1]
    changed = Trial("ours", planned.trials[0].config, {"method.steps": 3})
    other = dataclasses.replace(planned, trials=(changed, planned.trials[1]))
    assert {n: sorted(runs) for n, runs in study.recorded(other, records).items()} == {"theirs": [0]}
    assert study.recorded(dataclasses.replace(planned, measures=(Evaluated("away"),)), records) == {}


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


def test_a_trial_a_line(planned, tmp_path):
    plant(tmp_path, planned, {"ours": [0.30, 0.32], "theirs": [0.20, 0.20]})
    tall = dataclasses.replace(planned, tall=True)
    text = study_page.markdown(tall, study_page.results(tall, tmp_path), "x").splitlines()
    assert "| mean ± standard deviation over seeds | k-NN, % | absent |" in text
    assert "| ours (2) | 31.0 ± 1.4 | – |" in text
    assert "| theirs | +11.0 (1.00) |" in text


def test_measures_are_found_by_rows_and_make_a_run_unfinished_until_they_are_there(planned, tmp_path):
    plant(tmp_path, planned, {"ours": [0.3], "theirs": [0.2]})
    measured = dataclasses.replace(planned, rows=(Row("away", "measured/away/knn/fine/20", 100),), compared=(),
                                   measures=(Evaluated("away"),))  # fmt: skip
    where = study.workdir(tmp_path, planned.trials[0], 0)
    assert not study._finished(measured, where)
    measuring.path(where, measured.measures[0]).parent.mkdir()
    measuring.path(where, measured.measures[0]).write_text(json.dumps({"knn": {"fine": {"20": 0.5}}}))
    assert study._finished(measured, where)
    assert "| away | 50.0 | – |" in study_page.markdown(measured, study_page.results(measured, tmp_path), "x")


def test_a_relative_root_lies_in_the_folder_of_the_data(tmp_path):
    config = study.config_of(Trial("t", "prototypes:fashion"), 0)
    assert measuring.placed(config, None).data.root == "fashion_mnist_28.npz"
    assert measuring.placed(config, tmp_path).data.root == str(tmp_path / "fashion_mnist_28.npz")
    absolute = study.config_of(Trial("t", "prototypes:fashion", {"data.root": "/x.npz"}), 0)
    assert measuring.placed(absolute, tmp_path).data.root == "/x.npz"


def test_what_cannot_end_well_is_refused_before_anything_runs(planned, tmp_path):
    """Data that are not there; a finished run of another configuration in the place of a trial; a stray argument."""
    away = dataclasses.replace(planned, trials=(Trial("ours", "prototypes:fashion"),))
    with pytest.raises(ValueError, match=r"'ours': no such file: .*fashion_mnist_28.npz; name the folder .* --data"):
        study.run(away, tmp_path, data=tmp_path)
    plant(tmp_path, planned, {"ours": [0.3]})
    where = study.workdir(tmp_path, planned.trials[0], 0)
    config = study.config_of(Trial("ours", "quickstart:decoupled,smoke", {"method.steps": 3}), 0)
    (where / "config.json").write_text(json.dumps(summary.dumps_config(config)))
    with pytest.raises(ValueError, match=r"another configuration \(method.steps: there 3, now 2\)"):
        study.run(planned, tmp_path, only=("ours",))
    with pytest.raises(ValueError, match="takes no argument, got 'x'"):
        study.load("quickstart:x")
    for argument in ("nothing", "grocery,0", "grocery,3,4", "grocery,omniglot", "3", "grocery,-3"):
        with pytest.raises(ValueError, match=r"DATA\[,NETWORK\]\[,STEPS\]"):
            study.load(f"diversity:{argument}")


def test_at_another_batch_size_as_many_images_are_seen():
    """Two rules: the learning rate by the square root, the teacher's memory as long in images."""
    of = evidence.asked("grocery", smoke=False)
    small, whole = (study.config_of(of.at_batch("t", "decoupled", b), 0) for b in (32, 128))
    assert whole == study.config_of(of.trial("t"), 0)
    assert small.data.batch_size * small.method.steps == whole.data.batch_size * whole.method.steps
    assert small.method.optim.options["peak_lr"] == pytest.approx(whole.method.optim.options["peak_lr"] / 2)
    assert small.method.teacher.start**4 == pytest.approx(whole.method.teacher.start)
    assert small.method.estimator == whole.method.estimator


def test_a_study_can_be_asked_for_with_another_number_of_steps():
    """Every trial of it, at every batch size as many images, in a folder of its own."""
    usual, short = (evidence.asked(a, smoke=False) for a in ("grocery", "grocery,350"))
    assert (usual.runs, short.runs) == ("prototypes_grocery", "prototypes_grocery_350")
    assert short.about == f"{usual.about}; 350 steps"
    ours = [study.config_of(of.trial("t", "joint", {"data.batch_size": 64}), 0) for of in (usual, short)]
    assert [c.method.steps for c in ours] == [700, 350]
    assert ours[0] == dataclasses.replace(ours[1], method=dataclasses.replace(ours[1].method, steps=700))
    assert study.config_of(short.at_batch("t", "decoupled", 32), 0).method.steps == 1400
    assert {study.config_of(t, 0).method.steps for t in study.load("ablation:grocery,350").trials} == {350}
    smokes = study.load("batch_size:grocery,350", smoke=True).trials, study.load("batch_size", smoke=True).trials
    assert [study.config_of(t, 0) for t in smokes[0]] == [study.config_of(t, 0) for t in smokes[1]]


def ends_after(finishing: int, monkeypatch, error: Exception | None = None) -> None:
    """Runs that end at once; those after the first `finishing` leave no summary (a signal stopped them) or fail."""
    begun = []

    def train(config, where, say):
        begun.append(where)
        if len(begun) > finishing:
            if error is not None:
                raise error
            return
        numbers = {"fine": {"20": 0.3}}
        record = {"knn": numbers, "controls": {"untrained_knn": numbers}, "device": "cpu x 1", "versions": VERSIONS}
        (where / "config.json").write_text(json.dumps(summary.dumps_config(config)))
        (where / "summary.json").write_text(json.dumps(record))

    monkeypatch.setattr(running, "train_config", train)
    each = jobs.each
    monkeypatch.setattr(jobs, "each", lambda function, tasks, count: each(function, tasks, 0))


def test_a_run_that_a_signal_stopped_is_not_measured_and_ends_the_study(planned, tmp_path, monkeypatch):
    """Else its measures, taken of half a run, would be found beside the summary of the whole one."""
    ends_after(1, monkeypatch)
    taken = []
    monkeypatch.setattr(measuring, "take", lambda where, *_: taken.append(where))
    said: list[str] = []
    assert not study.run(planned, tmp_path, jobs=0, say=said.append)
    assert taken == [study.workdir(tmp_path, planned.trials[0], 0)]
    assert said[1:] == [
        "[1/6] ours, seed 0: done",
        "[1/6] theirs, seed 0: stopped",
        "planned: stopped with 5 of 6 runs to go; the same command goes on",
    ]


@pytest.mark.parametrize(("finishing", "error"), [(0, None), (2, None), (2, OSError("no space left"))])
def test_the_page_is_written_also_when_a_run_stopped_or_failed(tmp_path, monkeypatch, capsys, finishing, error):
    ends_after(finishing, monkeypatch, error)
    page = tmp_path / "page.md"
    status = cli.main(["study", "quickstart", "--workdir", str(tmp_path / "runs"), "--out", str(page)])
    printed = capsys.readouterr()
    assert status == (0 if error is None else 2)
    assert ("no space left" in printed.err) == (error is not None)
    assert page.exists() == (finishing > 0)
    assert not page.exists() or "Not run: " in page.read_text()


def test_unknown_names(planned, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no trial 'our'.*did you mean 'ours'"):
        study.run(planned, tmp_path, only=("our",))
    assert cli.main(["study", "quickstar"]) == 2
    assert "quickstart" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_trial_of_an_installed_study_is_a_configuration(name):
    for smoke in (False, True):
        found = study.load(name, smoke)
        for trial in found.trials:
            assert study.config_of(trial, found.seeds[0]).seed == found.seeds[0]


def test_studies_of_one_data_set_share_runs_and_mean_the_same_by_a_label():
    """A run that two studies call alike is one configuration: else one would show the other's numbers as its own."""
    folders: dict[str, dict[str, tuple[str, Config]]] = {}
    shared = set()
    for name in NAMES:
        found = study.load(name)
        for trial in found.trials if found.runs else ():
            seen = folders.setdefault(found.runs, {})
            other, config = seen.setdefault(trial.label, (name, study.config_of(trial, 0)))
            assert config == study.config_of(trial, 0), (other, name, trial.label)
            shared |= {(other, name)} if other != name else set()
    assert {pair[1].partition(":")[0] for pair in shared} >= {"representation", "ablation", "sensitivity"}


def run_smoke(name: str, runs: Path, page: Path, jobs: int) -> str:
    """Every run of the smoke version ends, and a second call trains nothing. Returns the page."""
    found = study.load(name, smoke=True)
    study.run(found, runs, jobs=jobs, say=lambda text: None)
    written = study_page.write(found, runs, page, "x")[0].read_text()
    assert "Not run" not in written
    said: list[str] = []
    study.run(found, runs, jobs=jobs, say=said.append)
    assert "0 to go" in said[0]
    return written


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory) -> Path:
    """One folder for all of them: what two studies train alike is trained once."""
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", PROTOTYPES)
def test_smoke_of_a_study_of_prototypes(name, tmp_path, smoke_runs, monkeypatch):
    """One trial of two steps at the smallest sizes, in this process and on one device: every row has its number,
    measured ones included."""
    make_mesh = parallel.make_mesh
    one = jax.devices()[:1]
    monkeypatch.setattr(parallel, "make_mesh", lambda data=-1, proto=1, devices=None: make_mesh(-1, 1, devices or one))
    found = study.load(name, smoke=True)
    page = run_smoke(name, smoke_runs / (found.runs or name), tmp_path / "page.md", jobs=0)
    trials = [line for line in page.splitlines() if line.startswith(tuple(f"| {t.label} (" for t in found.trials))]
    assert len(trials) == len(found.trials)
    empty = {"long_tail": 8}.get(name, 0)  # four classes of sixteen images: all are tail, head and medium are empty
    assert [line.count("–") for line in trials] == [empty] * len(trials), page


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STUDIES if name not in PROTOTYPES])
def test_smoke(name, tmp_path):
    page = run_smoke(name, tmp_path / "runs", tmp_path / "page.md", jobs=1)
    assert not [line for line in page.splitlines() if line.startswith("| k-NN") and "–" in line]
