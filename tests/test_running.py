"""A command from beginning to end: what it leaves on disk, what it does the second time, and the encoder it gives."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

import protojax
from protojax import cli, loading, metrics, running, train
from protojax.checkpoint import CheckpointError
from protojax.config import freeze, to_plain
from protojax.main import main
from protojax.workloads import images as images_lib
from tests.test_cli import write_images

ROOT = Path(__file__).parent.parent
STEPS = 2
SMALL = (
    "--config.method.views.global_size=16", "--config.method.backbone.widths=(4, 8, 8)",
    "--config.method.head.hidden=16", "--config.method.head.dim=8", "--config.method.estimator.components=32",
    "--config.run.progress=False", "--config.system.compilation_cache=",
)  # fmt: skip
EPSILONS = {"0.025", "0.1", "0.25", "0.5"}


def command(workdir: Path, arm: str = "decoupled", *more: str) -> list[str]:
    return [f"--config=quickstart:arm={arm},smoke", f"--workdir={workdir}", *SMALL, *more]


def said(function, *arguments) -> tuple[int, str]:
    """(exit status, what was printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = function(*arguments)
    return status, out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> types.SimpleNamespace:
    """The decoupled arm, two steps, trained once for this file through the command."""
    workdir = tmp_path_factory.mktemp("runs") / "decoupled"
    status, out = said(main, command(workdir))
    assert status == 0
    summary = json.loads((workdir / "summary.json").read_text())
    return types.SimpleNamespace(workdir=workdir, out=out, summary=summary)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """That run, free to be changed."""
    return Path(shutil.copytree(run.workdir, tmp_path / "copy"))


def kinds(workdir: Path) -> list[tuple[str, int]]:
    return [(r["kind"], r["step"]) for r in metrics.read_records(workdir / "metrics.jsonl") if r["kind"] != "diagnosis"]


# ------------------------------------------------------------------------------------------------ what is left
def test_files_of_a_finished_run(run):
    names = {path.name for path in run.workdir.iterdir()}
    assert names == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "report.html",
        "report_data.npz",
        "summary.json",
        "tensorboard",
    }
    (events,) = (run.workdir / "tensorboard").iterdir()
    assert b"eval/knn/fine/5" in events.read_bytes()
    page = (run.workdir / "report.html").read_text()
    assert "<svg" in page
    assert "quickstart_smoke" in page
    assert "http://" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    assert kinds(run.workdir) == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]
    assert [path.name for path in sorted((run.workdir / "checkpoints").iterdir())][-1] == str(STEPS)


def test_config_json_gives_the_configuration_back(run):
    config = loading.read_config(run.workdir)
    assert (config.arm, config.name, config.method.steps) == ("decoupled", "quickstart_smoke", STEPS)
    assert config.method.estimator.options["components"] == 32
    assert to_plain(config) == run.summary["config"]


def test_summary_has_the_keys_that_scripts_rely_on(run):
    s = run.summary
    assert set(s) == {
        "version", "workload", "name", "arm", "seed", "steps", "finished", "images_per_second", "knn", "groups",
        "groups_macro", "effective_rank", "rank", "prototypes", "controls", "protocol", "best", "findings", "device",
        "versions", "config",
    }  # fmt: skip
    assert (s["version"], s["arm"], s["seed"], s["steps"], s["finished"]) == (1, "decoupled", 0, STEPS, True)
    assert s["images_per_second"] > 0
    assert s["effective_rank"] == s["rank"]["image"]["effective"]
    assert set(s["knn"]) == set(s["groups"]) == {"fine"}
    assert set(s["knn"]["fine"]) == {"1", "5"}
    assert set(s["groups"]["fine"]) == {"head", "medium", "tail"}
    for share in [*s["knn"]["fine"].values(), *s["groups"]["fine"].values()]:
        assert share is None or 0 <= share <= 1
    assert s["device"] == "cpu x 8"
    assert {"protojax", "python", "jax", "jaxlib", "flax", "optax", "numpy"} == set(s["versions"])


def test_summary_counts_prototypes_beside_their_controls(run):
    p, controls = run.summary["prototypes"], run.summary["controls"]
    assert (p["count"], p["dim"]) == (32, 8)
    counted = [p["unique"], p["live_unique"], controls["random_unique"], controls["initial_unique"]]
    for counts in counted:
        assert set(counts) == EPSILONS
        ordered = [counts[e] for e in sorted(EPSILONS, key=float)]
        assert all(type(count) is int and 0 <= count <= 32 for count in ordered)
        assert ordered == sorted(ordered, reverse=True)  # a wider net catches more
    assert type(p["live"]) is int
    assert all(p["live_unique"][e] <= min(p["live"], p["unique"][e]) for e in EPSILONS)
    assert 1 <= p["perplexity"] <= 32
    assert -1 <= p["coverage"] <= 1
    assert set(controls["untrained_knn"]["fine"]) == {"1", "5"}
    first = metrics.read_records(run.workdir / "metrics.jsonl")[0]["metrics"]
    assert controls["untrained_knn"] == first["knn"]
    assert controls["initial_unique"] == first["prototypes"]["unique"]


def test_what_the_terminal_says_at_the_end(run):
    assert f"report: {run.workdir / 'report.html'}" in run.out
    assert "quickstart_smoke, arm decoupled, seed 0: 2 steps" in run.out
    assert "untrained" in run.out
    assert "of 32 unique at 0.5 (at the start" in run.out


# --------------------------------------------------------------------------------------------- the second time
def test_the_same_command_does_not_train_a_finished_run_again(run, copy):
    before = [path.stat().st_mtime_ns for path in sorted((copy / "checkpoints").rglob("*")) if path.is_file()]
    status, out = said(main, command(copy))
    assert status == 0
    assert f"this run is finished ({STEPS} steps)" in out
    assert [entry for entry in kinds(copy) if entry[0] == "train"] == [("train", 1), ("train", 2)]
    after = [path.stat().st_mtime_ns for path in sorted((copy / "checkpoints").rglob("*")) if path.is_file()]
    assert before == after
    again = json.loads((copy / "summary.json").read_text())
    assert {k: v for k, v in again.items() if k != "images_per_second"} == {
        k: v for k, v in run.summary.items() if k != "images_per_second"
    }


def test_another_configuration_in_the_same_workdir_is_refused_and_harms_nothing(copy, capsys):
    files = ("config.json", "summary.json", "metrics.jsonl")
    before = [(copy / name).read_text() for name in files]
    assert main(command(copy, "decoupled", "--config.seed=1")) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "holds a run of another configuration (seed: saved 0, now 1)" in lines[0]
    assert "another --workdir" in lines[0]
    assert [(copy / name).read_text() for name in files] == before


def test_a_failed_start_does_not_leave_its_configuration_behind(tmp_path, monkeypatch):
    """The first attempt fails after it wrote config.json; the second, corrected one is what `load` must see."""

    def fail(recipe, options):
        raise OSError("no space")

    monkeypatch.setattr(train, "run", fail)
    for seed in (1, 2):
        assert main(command(tmp_path, "decoupled", f"--config.seed={seed}")) == 2
        assert loading.read_config(tmp_path).seed == seed


def test_fingerprint_holds_what_changes_results_and_nothing_else(run):
    config = loading.read_config(run.workdir)
    prints = running.fingerprint(config)
    assert {key.split(".")[0] for key in prints} == {"seed", "method", "data", "evals"}
    assert "data.root" not in prints
    plain = to_plain(config)
    plain["system"]["prefetch"], plain["run"]["log_every"], plain["data"]["root"] = 7, 9, "/moved"
    assert running.fingerprint(freeze(plain)) == prints
    plain["method"]["optim"]["peak_lr"] = 0.5
    changed = running.fingerprint(freeze(plain))
    assert {k for k in prints if prints[k] != changed[k]} == {"method.optim.peak_lr"}


# ------------------------------------------------------------------------------------------------ other commands
def test_eval_report_and_compare(run, copy, tmp_path):
    status, out = said(cli.main, ["eval", str(copy), "--json"])
    numbers = json.loads(out)
    assert (status, numbers.pop("step")) == (0, STEPS)
    for name in ("knn", "groups", "groups_macro", "effective_rank", "rank", "prototypes"):
        assert numbers[name] == run.summary[name], name
    assert numbers["controls"].items() <= run.summary["controls"].items()
    (copy / "report.html").unlink()
    status, out = said(cli.main, ["report", str(copy)])
    assert (status, out.strip()) == (0, str(copy / "report.html"))
    assert (copy / "report.html").stat().st_size > 10_000
    status, out = said(cli.main, ["compare", str(run.workdir), str(copy), f"--out={tmp_path / 'page.html'}"])
    assert status == 0
    assert out.count("decoupled") >= 2
    assert (tmp_path / "page.html").exists()


def test_dry_run_prints_everything_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command(tmp_path / "run"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    config = json.JSONDecoder().raw_decode(out)[0]
    assert config["method"]["estimator"]["components"] == 32
    assert freeze(config).arm == "decoupled"
    for text in ("cpu x 8, mesh {'data': 8, 'proto': 1}", "64 images, batch 16, 2 steps", "float32 [2, 16, 16, 16, 3]",
                 "encoder: ", "optimiser: ", "MiB", "one step, each device: arguments", "temporaries"):  # fmt: skip
        assert text in out, text
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- loading
def images_of(run, split: str) -> np.ndarray:
    records = images_lib.records(loading.read_config(run.workdir), split)
    return records.take(np.arange(records.size))["image"]


def test_the_loaded_encoder_gives_the_features_that_were_evaluated(run):
    """On one device, without the data of the run, in batches of another size: rounding apart, the probe's banks."""
    _, session, state = loading.restore(run.workdir)
    probe = train.probing.make_probe(session.recipe, session.forward, state, session.mesh, {})
    encode = protojax.load(run.workdir)
    images = images_of(run, "train")
    encode.batch_size = 24  # 64 = 24 + 24 + 16: the last batch is padded
    for output, bank in (("backbone", probe.bank("bank").backbone), ("image", probe.bank("bank").image)):
        features = encode.encode(images, output)
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, bank, rtol=0, atol=1e-5 * np.abs(bank).max())
    np.testing.assert_array_equal(encode(images[:1]), encode.encode(images[:1]))
    np.testing.assert_allclose(encode.prototypes, probe.codebook.prototypes, atol=1e-6)
    assert (encode.step, encode.config.arm) == (STEPS, "decoupled")
    larger = np.repeat(np.repeat(images[:2], 2, axis=1), 2, axis=2)
    assert encode(larger).shape == (2, probe.bank("bank").backbone.shape[1])


def test_load_needs_neither_the_data_nor_the_devices_of_the_run(run, copy):
    record = json.loads((copy / "config.json").read_text())
    record["config"]["data"]["source"] = {"name": "npz", "subset": None}
    record["config"]["data"]["root"] = "/data/that/is/gone.npz"
    record["config"]["system"]["data"] = 4
    metrics.write_json(copy / "config.json", record)
    images = images_of(run, "test")[:3]
    np.testing.assert_array_equal(protojax.load(copy)(images), protojax.load(run.workdir)(images))


def test_mistakes_with_a_loaded_encoder(run):
    encode = protojax.load(run.workdir)
    images = images_of(run, "test")[:2]
    with pytest.raises(TypeError, match=r"expected uint8 in 0..255, got float32"):
        encode(images.astype(np.float32))
    with pytest.raises(ValueError, match=r"expected \[N,H,W,3\], got \[32, 32, 3\]; use images\[None\]"):
        encode(images[0])
    with pytest.raises(ValueError, match="at least one image, got none"):
        encode(images[:0])
    with pytest.raises(ValueError, match=r"expected one of \['backbone', 'image'\], got 'logits'"):
        encode(images, "logits")


def test_mistakes_in_loading(run, copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the workdir of a protojax run"):
        protojax.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no checkpoint at step 9 in .*; there are \[.*2\]"):
        protojax.load(run.workdir, step=9)
    (copy / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        protojax.load(copy)
    shutil.copy(run.workdir / "config.json", copy)
    # One array that is not what was written. (Bytes that Orbax cannot read at all: tests/test_checkpoint.py.)
    record = copy / "checkpoints" / str(STEPS) / "record" / "metadata"
    content = json.loads(record.read_text())
    content["checksums"]["estimator/components/mean"] += 1
    record.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged or incomplete: the contents of"):
        protojax.load(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint: has the run started"):
        protojax.load(copy)


# ---------------------------------------------------------------------------------------------- a user's own data
def test_a_folder_of_images_with_a_corrupt_one_from_end_to_end(tmp_path, caplog):
    root = write_images(tmp_path / "photos", {"train": 24, "test": 10})
    (root / "train" / "class_1" / "zz.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    source = "--config.data.source={'name': 'image_folder', 'canvas': 32}"
    workdir = tmp_path / "run"
    with caplog.at_level("WARNING"):
        assert said(main, command(workdir, "decoupled", source, f"--config.data.root={root}"))[0] == 0
    messages = [record.getMessage() for record in caplog.records if "cannot be decoded" in record.getMessage()]
    assert messages  # once an opened split: named and counted
    assert all("(1 so far)" in text and "class_1/zz.png" in text for text in messages)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["prototypes"]["rows"] == 24  # the broken one is no row of any evaluation
    assert summary["knn"]["fine"]["1"] >= 0.7  # two classes of different brightness
    assert "Traceback" not in (workdir / "report.html").read_text()


def test_an_npz_archive_without_labels_from_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "mine.npz"
    images = {
        f"{split}_images": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        for split, n in (("train", 20), ("test", 9))
    }
    np.savez(file, **images)
    changes = ["--config.data.source={'name': 'npz'}", f"--config.data.root={file}", "--config.evals.labels=()"]
    assert said(main, command(tmp_path / "run", "decoupled", *changes))[0] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.get("knn") is None
    assert summary["prototypes"]["rows"] == 20
    assert summary["controls"]["untrained_knn"] is None


# ------------------------------------------------------------------------------------------------- the joint twin
def test_the_joint_arm_trains_by_the_same_command(run, tmp_path):
    assert said(main, command(tmp_path / "joint", "joint"))[0] == 0
    summary = json.loads((tmp_path / "joint" / "summary.json").read_text())
    assert summary["arm"] == "joint"
    assert set(summary) == set(run.summary)
    assert set(summary["prototypes"]) - {"estimator"} == set(run.summary["prototypes"]) - {"estimator"}
    status, out = said(cli.main, ["compare", str(run.workdir), str(tmp_path / "joint"), f"--out={tmp_path}"])
    assert status == 0
    assert all(arm in out for arm in ("decoupled", "joint"))


# ------------------------------------------------------------------------------------------------- real processes
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_sigterm_saves_exits_with_zero_and_the_same_command_finishes(tmp_path):
    arguments = command(tmp_path / "run", "decoupled", "--config.method.steps=400", "--config.run.checkpoint_every=1.0",
                        "--config.evals.every=1.0")  # fmt: skip
    argv = [sys.executable, "-m", "protojax.main", *arguments]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if any(kind == "train" and step >= 3 for kind, step in kinds(tmp_path / "run")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "SIGTERM at step" in out
    stopped = max(step for _, step in kinds(tmp_path / "run"))
    assert 3 <= stopped < 400
    assert not (tmp_path / "run" / "summary.json").exists()
    assert protojax.load(tmp_path / "run").step == stopped
    again = subprocess.run(argv, env=environment(), capture_output=True, text=True, cwd=tmp_path, check=True)
    assert f"resuming at step {stopped} of 400" in again.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 400


@pytest.mark.slow
def test_a_wheel_holds_configs_assets_and_licences_and_runs_from_anywhere(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "-w", str(tmp_path)], check=True
    )
    (wheel,) = tmp_path.glob("protojax-*.whl")
    assert wheel.stat().st_size < (15 + 7 + 2) * 2**20  # photographs, emoji, everything else
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    configs = {f"protojax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert configs <= set(names)
    assert {"protojax/data/assets/grocery.npz", "protojax/data/assets/GROCERY_LICENSE.txt"} <= set(names)
    licences = [name for name in names if ".dist-info/" in name and "LICENSE" in name]
    assert len(licences) >= 2  # ours and that of the photographs
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    away = tmp_path / "away"
    away.mkdir()
    installed = {**environment(), "PYTHONPATH": str(tmp_path / "site")}
    code = "from protojax import configs_path; print(configs_path.find('quickstart'))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=installed, cwd=away, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == tmp_path / "site" / "protojax" / "configs" / "quickstart.py"
    argv = [sys.executable, "-m", "protojax.main", "--config=quickstart:smoke", *SMALL, "--dry_run"]
    dry = subprocess.run(argv, env=installed, cwd=away, capture_output=True, text=True, check=True)
    assert "one step, each device" in dry.stdout
    assert not list(away.iterdir())
