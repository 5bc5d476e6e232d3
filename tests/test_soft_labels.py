"""Soft labels from a file to a prediction, on the common loop without teacher and estimator."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import types

import jax
import numpy as np
import pytest

import protojax
from protojax import cli, experiment, metrics, train
from protojax import step as step_lib
from protojax.config import freeze
from protojax.main import main
from protojax.workloads import soft_label_arms, soft_labels
from tests.data.test_soft_labels import write_csv
from tests.toy import config_dict, toy_options

FILES = ("soft_labels_quickstart", "soft_labels_table", "soft_labels_fashion")
FAILURES = ("onehot", "constant", "uniform")
SMALL = ("--config.method.soft_label.width=8", "--config.data.batch_size=8", "--config.evals.batch_size=16",
         "--config.run.progress=False", "--config.run.tensorboard=False", "--config.system.compilation_cache=",
         "--config.method.epochs=2.0", "--config.evals.every=0.5", "--config.run.steps_per_call=2")  # fmt: skip


def said(function, *arguments) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = function(*arguments)
    return status, out.getvalue()


def small(argument: str = "", **changes):
    c = config_dict("soft_labels_quickstart", f"{argument},smoke".lstrip(","))
    c.method.soft_label.width = 8
    for key, value in changes.items():
        *path, last = key.split("__")
        at = c
        for part in path:
            at = at[part]
        at[last] = value
    return freeze(c)


# ------------------------------------------------------------------------------------------------------ configs
@pytest.mark.parametrize("arm", soft_label_arms.ARMS)
def test_every_arm_builds_and_keeps_the_shapes_of_its_state(arm):
    recipe = experiment.build(small(f"{arm},seven"))
    batch = recipe.sources["train"].batch(0)
    state = jax.eval_shape(lambda b: step_lib.init_state(recipe, b), batch)
    assert (state.teacher, state.estimator, state.params["head"]["prototypes"]) == ({}, {}, {})
    assert "loss/total" in step_lib.step_numbers(recipe, state, batch)


@pytest.mark.parametrize("name", [*FILES, *(f"failures/soft_labels_{f}" for f in FAILURES)])
def test_every_config_has_a_smoke_variant(name):
    assert experiment.build(freeze(config_dict(name, "smoke"))).total_steps == 2


@pytest.mark.parametrize("flag", ["graph", "nasty", "graph,noise"])
def test_graphs_holes_and_augmentation_build(flag):
    changes = {"method__views": {"name": "noise"}} if "noise" in flag else {}
    c = config_dict("soft_labels_quickstart", flag.replace(",noise", "") + ",smoke")
    with c.unlocked():
        for key in changes:
            c.method.views = changes[key]
    recipe = experiment.build(freeze(c))
    batch = recipe.sources["train"].batch(0)
    state = jax.eval_shape(lambda b: step_lib.init_state(recipe, b), batch)
    step_lib.step_numbers(recipe, state, batch)


def test_no_teacher_and_no_estimator_cost_nothing():
    """One forward pass a step, and a state that holds parameters and optimiser alone."""
    recipe = experiment.build(small())
    calls = []

    def counted(variables, inputs, training, key):
        calls.append(training)
        return recipe.encoder.apply(variables, inputs, training, key)

    spied = recipe._replace(encoder=recipe.encoder._replace(apply=counted))
    batch = recipe.sources["train"].batch(0)
    state = jax.eval_shape(lambda b: step_lib.init_state(spied, b), batch)
    step_lib.step_numbers(spied, state, batch)
    assert calls == [True]
    parts = {k: len(jax.tree.leaves(getattr(state, k))) for k in ("teacher", "estimator", "stats")}
    assert parts == {"teacher": 0, "estimator": 0, "stats": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "method__soft_label__logit_norm": 1.0,
                "method__soft_label__entropy_weight": 1.0,
                "method__soft_label__min_entropy": 1.5,
            },
            r"min_entropy = 1.500 can never fire.*lie in \[1.980, 2.079\]",
        ),
        ({"method__soft_label__entropy_weight": 1.0, "method__soft_label__min_entropy": 2.2}, "can never be met"),
        ({"method__backbone__name": "star_graph"}, "needs neighbours"),
        ({"method__backbone__name": "resnet_micro"}, "reads images"),
        ({"method__soft_label__init_bias": "one"}, "init_bias: expected 'zero' or 'log_mean_target'"),
        ({"data__standardise": "standart"}, r"data.standardise: expected one of .* \(did you mean 'standard'\?\)"),
        (
            {"data__source__name": "synthetic_town"},
            r"unknown data set 'synthetic_town' \(did you mean 'synthetic_city'\?\)",
        ),
    ],
)
def test_mistakes_are_refused_when_the_recipe_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.build(small(**changes))


def test_raw_inputs_are_warned_of_unless_an_arm_asks_for_them(caplog):
    with caplog.at_level("WARNING"):
        experiment.build(small("original_first"))
    assert "one-hot failure" not in caplog.text
    with caplog.at_level("WARNING"):
        experiment.build(small(data__standardise="none"))
    assert "income" in caplog.text or "population_density" in caplog.text
    assert "this is the one-hot failure" in caplog.text


# ----------------------------------------------------------------------------------------- from a file to a report
@pytest.fixture(scope="module")
def run(tmp_path_factory) -> types.SimpleNamespace:
    """A user's CSV, trained for two epochs through the command."""
    folder = tmp_path_factory.mktemp("soft")
    path = write_csv(folder / "places.csv", rows=80)
    workdir = folder / "run"
    command = ["--config=soft_labels_table", f"--config.data.root={path}", f"--workdir={workdir}", *SMALL]
    status, out = said(main, command)
    assert status == 0
    return types.SimpleNamespace(path=path, workdir=workdir, out=out, command=command,
                                 summary=json.loads((workdir / "summary.json").read_text()))  # fmt: skip


def test_a_users_csv_goes_from_file_to_report_with_one_command(run):
    assert {p.name for p in run.workdir.iterdir()} >= {"table.json", "summary.json", "report.html", "report_data.npz"}
    first = run.out.splitlines()
    assert first[0].startswith("val, ")  # the baselines come before anything is trained
    assert "constant" in first[0]
    assert "uniform" in first[0]
    s = run.summary
    assert (s["workload"], s["finished"], s["config"]["method"]["workload"]) == ("soft_labels", True, "soft_labels")
    test = s["soft_labels"]["test"]
    assert {"kl", "skill", "ece", "entropy", "distinct", "spread", "groups", "baselines"} <= set(test)
    assert s["controls"]["untrained"]["test"]["kl"] > 0
    page = (run.workdir / "report.html").read_text()
    for words in ("Is it better than a constant?", "Reliability", "Entropy of predictions", "never alone", "Penalties"):
        assert words in page, words
    records = metrics.read_records(run.workdir / "metrics.jsonl")
    train_numbers = next(r["metrics"] for r in reversed(records) if r["kind"] == "train")
    assert {"clipped", "gradient/encoder/trunk", "gradient/encoder/classifier", "loss/soft_label/active",
            "grad_norm/soft_label/kl"} <= set(train_numbers)  # fmt: skip


def test_the_saved_model_predicts_from_a_csv_what_was_evaluated(run, tmp_path):
    model = protojax.load(run.workdir)
    config = freeze(json.loads((run.workdir / "config.json").read_text())["config"])
    test = soft_labels.open_splits(config)["test"]
    predictions = model.predict(test.columns)
    logits = np.load(run.workdir / "report_data.npz")["logits"].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(predictions, expected, atol=1e-5)
    assert model.categories == ("a", "b", "c")
    out = tmp_path / "p.csv"
    status, text = said(cli.main, ["predict", str(run.workdir), str(run.workdir), f"--data={run.path}", f"--out={out}"])
    assert status == 0
    assert "80 rows" in text
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["p_a", "p_b", "p_c", "largest", "entropy"]
    values = np.asarray([[float(r[f"p_{c}"]) for c in "abc"] for r in rows])
    np.testing.assert_allclose(values.sum(1), 1.0, atol=1e-4)
    assert [r["largest"] for r in rows] == ["abc"[i] for i in values.argmax(1)]
    calibrated = model.predict(test.columns, calibrated=True)
    assert not np.allclose(calibrated, predictions) or model.temperature == pytest.approx(1.0)


def test_predicting_from_other_columns_is_refused(run, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("north,height\n1,2\n")
    assert cli.main(["predict", str(run.workdir), f"--data={other}"]) == 2


def test_the_same_command_resumes_and_eval_agrees(run):
    status, out = said(main, run.command)
    assert status == 0
    assert "this run is finished" in out
    _, text = said(cli.main, ["eval", str(run.workdir), "--json"])
    again = json.loads(text)["soft_labels"]["test"]
    assert again["kl"] == pytest.approx(run.summary["soft_labels"]["test"]["kl"], rel=1e-5)


# ------------------------------------------------------------------------------------------------- early stopping
def test_early_stopping_counts_evaluations_that_a_constant_cannot_win(tmp_path):
    """A rate of 1e-9 learns nothing: skill never rises above 0, and after two evaluations the run is over. The last
    state is reported, and the same command does not go on."""
    c = small("default", method__steps=8, evals__every=0.125, evals__patience=2, method__optim__peak_lr=1e-9,
              run__report=False)  # fmt: skip
    options = toy_options(c, tmp_path)
    result = train.run(experiment.build(c), options)
    assert (result.step, result.finished) == (2, True)
    events = [r for r in metrics.read_records(tmp_path / "metrics.jsonl") if r["kind"] == "event"]
    assert [e["event"] for e in events] == ["early_stop"]
    again = train.run(experiment.build(c), options)
    assert (again.step, again.finished, again.final) == (2, True, result.final)


# --------------------------------------------------------------------------------------------------- the benchmark
@pytest.mark.slow
def test_starts_under_vmap_are_the_trainers(tmp_path):
    """The benchmark's program gives what `protojax train` gives for the same seed."""
    from benchmarks.soft_labels import train_seeds

    c = small(method__steps=12, evals__every=0.5, run__report=False, data__batch_size=16)
    (_, one) = train_seeds(c, (0, 1))
    import dataclasses

    config = dataclasses.replace(c, seed=1)
    result = train.run(experiment.build(config), toy_options(config, tmp_path))
    ours, theirs = one["soft_labels"]["test"], result.final["soft_labels"]["test"]
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-4)
    assert ours["entropy"]["correlation"] == pytest.approx(theirs["entropy"]["correlation"], abs=1e-3)


@pytest.mark.slow
def test_failures_fire_what_their_headers_say_and_the_default_is_silent(tmp_path):
    from benchmarks.soft_labels import train_seeds

    for name in FAILURES:
        c = config_dict(f"failures/soft_labels_{name}")
        c.method.epochs = 4.0
        (record,) = train_seeds(freeze(c), (0,))
        header = __import__("protojax.configs_path", fromlist=["find"]).find(f"failures/soft_labels_{name}").read_text()
        wanted = header.split("\nFires: ")[1].split("\n")[0].split(", ")
        assert set(wanted) <= {f["detector"] for f in record["findings"]}, name
    c = config_dict("soft_labels_quickstart")
    c.method.epochs = 30.0
    (record,) = train_seeds(freeze(c), (0,))
    assert [f["detector"] for f in record["findings"] if f["severity"] != "notice"] == []
    assert record["soft_labels"]["test"]["gap_closed"] > 0.7
