"""The command line: flags, overrides, exit statuses, and every mistake in one line before anything is compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protojax import __version__, cli, errors, running
from protojax.main import main

SMOKE = "--config=quickstart:smoke"


def write_images(root: Path, counts: dict[str, int], side: int = 32) -> Path:
    """root/split/class_c/i.png, `counts[split]` images of two classes."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(count):
            folder = root / split / f"class_{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            shade = rng.integers(0, 100, (side, side, 3), dtype=np.uint8) + np.uint8(120 * (i % 2))
            Image.fromarray(shade).save(folder / f"{i:03}.png")
    return root


@pytest.fixture
def trained(monkeypatch):
    """The (configuration, workdir) that a command would have trained."""
    seen = []

    def instead(config, workdir):
        seen.append((config, workdir))
        return 0

    monkeypatch.setattr(running, "run_train", instead)
    return seen


# ----------------------------------------------------------------------------------------- flags and overrides
@pytest.mark.parametrize(
    ("argument", "arm", "smoke"),
    [
        ("", "decoupled", False),
        (":joint", "joint", False),
        (":smoke", "decoupled", True),
        (":arm=joint,smoke", "joint", True),
    ],
)
def test_forms_of_the_config_argument_and_the_default_workdir(trained, argument, arm, smoke):
    assert main([f"--config=quickstart{argument}"]) == 0
    ((config, workdir),) = trained
    name = "quickstart_smoke" if smoke else "quickstart"
    assert (config.arm, config.name, workdir) == (arm, name, Path(f"runs/{name}-{arm}"))


def test_a_path_a_name_and_a_separate_value_mean_the_same_file(trained):
    path = "configs/quickstart.py:smoke"
    for arguments in ([f"--config={path}"], ["--config", path], [SMOKE], ["--config", "quickstart:smoke"]):
        assert main(arguments) == 0
    assert cli.main(["train", SMOKE]) == 0
    assert len({repr(config) for config, _ in trained}) == 1


def test_overrides_of_every_kind_reach_the_configuration(trained):
    assert main([
        SMOKE, "--workdir=elsewhere", "--config.seed=3", "--config.method.estimator.components=32",
        "--config.method.optim.peak_lr=1", "--config.method.optim.clip_norm=3.0", "--noconfig.method.estimator.center",
        "--config.method.backbone.widths=(4, 8, 8)", "--config.evals.labels=('fine', 'coarse')",
        "--config.data.longtail.max_per_class=4", "--config.run.progress=False",
        "--config.method.head={'name': 'linear', 'dim': 8}",
    ]) == 0  # fmt: skip
    ((config, workdir),) = trained
    method = config.method
    assert (workdir, config.seed, config.run.progress) == (Path("elsewhere"), 3, False)
    assert (method.estimator.options["components"], method.estimator.options["center"]) == (32, False)
    assert (method.optim.options["peak_lr"], method.optim.options["clip_norm"]) == (1.0, 3.0)
    assert tuple(method.backbone.options["widths"]) == (4, 8, 8)
    assert config.evals.labels == ("fine", "coarse")
    assert config.data.longtail.max_per_class == 4
    assert (method.head.name, dict(method.head.options)) == ("linear", {"dim": 8})


def test_a_schedule_may_take_the_place_of_a_number_and_a_number_that_of_a_schedule(trained, capsys):
    rate, eta = "('linear', 1.0, 0.2, 0.0, 0.3)", "('cosine', 0.9, 1.0)"
    assert main([SMOKE, f"--config.method.estimator.rate={rate}", "--config.method.estimator.temperature=0.02"]) == 0
    assert main([f"{SMOKE},paper", "--config.method.estimator.beta=1", f"--config.method.estimator.eta={eta}"]) == 0
    balanced, mixture = (config.method.estimator.options for config, _ in trained)
    assert (balanced["rate"], balanced["temperature"]) == (("linear", 1.0, 0.2, 0.0, 0.3), 0.02)
    assert (mixture["beta"], mixture["eta"]) == (1, ("cosine", 0.9, 1.0))
    # Nothing else may change its type, and what is misspelt is still told so.
    assert main([SMOKE, "--config.data.batch_size=(1, 2)"]) == 2
    assert main([SMOKE, f"--config.method.estimator.rat={rate}"]) == 2
    assert main([SMOKE, "--config.method.estimator.rate=('lineal', 1.0, 0.2)"]) == 2
    assert len(trained) == 2
    assert "has no key" in capsys.readouterr().err


def test_one_call_leaves_nothing_for_the_next(trained):
    assert main([SMOKE, "--config.seed=5", "--workdir=a"]) == 0
    assert main([SMOKE]) == 0
    assert [config.seed for config, _ in trained] == [5, 0]
    assert trained[1][1] == Path("runs/quickstart_smoke-decoupled")


# -------------------------------------------------------------------------------------------- exit statuses
@pytest.mark.parametrize("command", [cli.main, main])
def test_version(command, capsys):
    try:
        status = command(["--version"])
    except SystemExit as leaving:
        status = leaving.code
    assert status == 0
    assert capsys.readouterr().out.split() == ["protojax", __version__]


def test_help_names_the_flags(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--config=", "--config.", "--workdir", "dry_run"))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--help"])
    assert leaving.value.code == 0
    assert all(command in capsys.readouterr().out for command in ("train",))


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["eval"], ["compare"]])
def test_a_wrong_command_is_status_two_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(arguments)
    assert leaving.value.code == 2
    assert "usage: protojax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [("eval", "is not the workdir of a protojax run"), ("report", "does not exist"), ("compare", "does not exist")],
)
def test_commands_on_a_run_that_is_not_there(command, message, tmp_path, capsys):
    assert cli.main([command, str(tmp_path / "nothing")]) == 2
    assert_one_line(capsys, message)
    assert not (tmp_path / "nothing").exists()


def assert_one_line(capsys, *messages):
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("protojax: error: ")
    for message in messages:
        assert message in lines[0]


def test_a_bug_is_not_dressed_up_as_a_users_error(monkeypatch):
    def broken(config, workdir):
        return {}["missing"]

    monkeypatch.setattr(running, "run_train", broken)
    with pytest.raises(KeyError, match="missing"):
        main([SMOKE])


def test_the_traceback_is_there_on_request(monkeypatch, capsys):
    monkeypatch.setenv("PROTOJAX_TRACEBACK", "1")
    assert main(["--config=quikstart"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([], ["no --config", "usage:"]),
        ([SMOKE, "surplus"], ["['surplus']"]),
        ([SMOKE, "--wokdir=x"], ["wokdir", "Did you mean: workdir"]),
        (["--config=quikstart"], ["no config file 'quikstart' (did you mean 'quickstart'?)", "'inat'"]),
        (["--config=quickstart:jiont"], ["unknown arm or flag 'jiont'", "did you mean 'joint'", "'partial'"]),
        ([SMOKE, "--config.data.batch_sise=3"], ["no key 'batch_sise'", 'Did you mean "batch_size"']),
        ([SMOKE, "--config.methd.steps=3"], ["no key 'methd'", 'Did you mean "method"']),
        ([SMOKE, "--config.method.estimator.centre=False"], ["'centre'", 'Did you mean "center"']),
        ([SMOKE, "--config.data.batch_size=many"], ["config.data.batch_size=many", "int"]),
        ([SMOKE, "--config.evals.every=2"], ["config.evals.every: expected a fraction of the run in (0, 1], got 2.0"]),
        ([SMOKE, "--config.method.steps=-1"], ["config.method.steps: expected a positive number, got -1"]),
        ([SMOKE, "--config.method.epochs=2"], ["set exactly one of epochs and steps, got 2.0 and 2"]),
        ([SMOKE, "--config.method.estimator.name=mixtur"], ["unknown estimator 'mixtur' (did you mean 'mixture'?)"]),
        ([SMOKE, "--config.method.backbone.name=resnet-18"], ["unknown backbone 'resnet-18' (did you mean 'resnet18'"]),
        ([SMOKE, "--config.method.workload=promts"], ["unknown workload 'promts'", "'prototypes'"]),
        ([SMOKE, "--config.data.source.name=sinthetic"], ["unknown data set 'sinthetic'; did you mean 'synthetic'?"]),
        ([SMOKE, "--config.method.head={'name': 'carp', 'widht': 3}"], ["head 'carp' has no option 'widht'"]),
        ([SMOKE, "--config.method.head={'name': 'carp', 'dim': 'big'}"], ["'dim': expected int", "got str 'big'"]),
        ([SMOKE, "--config.method.objective.carp.block=48"], ["must be a multiple of", "K = 64 and block = 48"]),
        ([SMOKE, "--config.data.batch_size=12"], ["data.batch_size = 12 does not divide over 8 devices"]),
        ([SMOKE, "--config.evals.batch_size=12"], ["evals.batch_size = 12 does not divide over 8 devices"]),
        ([SMOKE, "--config.system.data=3"], ["got 3 x 1, there are 8 devices", "Use -1"]),
        ([SMOKE, "--config.evals.labels=tail"], ["needs labels 'tail'", "['coarse', 'fine']", "config.evals.labels"]),
        ([SMOKE, "--config.evals.knn_k=(1, 100)"], ["k = [100] is larger than the bank of 64 rows"]),
        ([SMOKE, "--config.data.root=/data"], ["data set 'synthetic' is built in and reads no files; unset data.root"]),
        ([SMOKE, "--config.data.train_split=training"], ["no split 'training'", "train, test"]),
        (["--config=tinyimagenet_lt"], ["data set 'npz' needs data.root, the path of your .npz archive"]),
        (["--config=tinyimagenet_lt", "--config.data.root=/no/file.npz"], ["no such file: /no/file.npz"]),
        (["--config=inat:folder", "--config.data.root=/no/folder"], ["no such folder: /no/folder"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_two_before_anything_is_compiled(arguments, messages, tmp_path, capsys):
    arguments = [*arguments[:1], f"--workdir={tmp_path / 'run'}", *arguments[1:]] if arguments else []
    assert main(arguments) == 2
    assert_one_line(capsys, *messages)
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_prototypes_that_do_not_divide_over_the_devices(tmp_path, capsys):
    changes = ["--config.method.estimator.components=36", "--config.method.objective.carp.block=36"]
    assert main([SMOKE, f"--workdir={tmp_path}", "--config.system.compilation_cache=", *changes]) == 2
    assert_one_line(capsys, "has 36 rows", "do not divide over 8 devices")


def test_a_workdir_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main([SMOKE, f"--workdir={tmp_path / 'file' / 'run'}"]) == 2
    assert_one_line(capsys, "cannot be written", "choose another with --workdir")


FOLDER = "{'name': 'image_folder', 'canvas': 32, 'on_corrupt': 'error', 'verify': True}"


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (
            lambda r: (r / "train/class_0/bad.png").write_bytes(b"\x89PNG"),
            ["cannot decode", "class_0/bad.png", "on_corrupt"],
        ),
        (lambda r: (r / "train/class_2").mkdir(), ["class 'class_2' has no image in", "remove or fill them"]),
        (lambda r: [f.unlink() for f in r.glob("test/*/*")], ["no images below", ".png"]),
        (lambda r: (r / "train/class_0/000.png").rename(r / "train/000.png"), ["labels missing", "000.png"]),
        (lambda r: (r / "test/class_1").rename(r / "test/class_9"), ["classes that", "'class_9'"]),
    ],
    ids=["corrupt", "empty class", "empty folder", "no label", "new class"],
)
def test_mistakes_in_a_folder_of_images(damage, messages, tmp_path, capsys):
    damage(write_images(tmp_path / "images", {"train": 8, "test": 4}))
    arguments = [f"--config.data.source={FOLDER}", f"--config.data.root={tmp_path / 'images'}"]
    assert main([SMOKE, f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    assert_one_line(capsys, *messages)


def test_a_folder_without_labels_asks_for_evaluations_without_them(tmp_path, capsys, trained):
    root = write_images(tmp_path / "images", {"train": 8, "test": 4})
    arguments = [SMOKE, "--config.data.source={'name': 'image_folder', 'canvas': 32, 'labels': 'none'}",
                 f"--config.data.root={root}"]  # fmt: skip
    assert main(arguments) == 0
    ((config, _),) = trained
    with pytest.raises(ValueError, match=r"needs labels 'fine', but the source 'images/train' has no labels"):
        running.build(config)
    assert main([*arguments, "--config.evals.labels=()"]) == 0
    assert [e.name for e in running.build(trained[1][0]).evaluations] == ["prototypes", "rank"]


def test_files_in_one_piece_are_split_from_the_command_line(tmp_path, trained):
    root = write_images(tmp_path, {"everything": 20}) / "everything"
    arguments = ["--config=inat:folder", f"--config.data.root={root}", "--config.data.source.holdout_fraction=0.2"]
    assert main([*arguments, "--config.data.test_split=test", "--config.data.source.canvas=32"]) == 0
    from protojax.workloads import images

    ((config, _),) = trained
    train, test = (images.records(config, split) for split in ("train", "test"))
    assert (train.size, test.size) == (16, 4)


def test_order_of_flags_does_not_matter(trained):
    assert main(["--config.seed=4", SMOKE, "--workdir=x"]) == 0
    assert trained[0][0].seed == 4


def test_config_files_that_are_none(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("x = 1")
    assert main([f"--config={tmp_path / 'mine.py'}"]) == 2
    assert_one_line(capsys, "has no function get_config")
    assert main(["--config"]) == 2
    assert_one_line(capsys, "--config needs a value")


def test_every_error_is_one_line(capsys):
    def fail():
        raise ValueError("first\n  second")

    assert errors.guarded(fail) == 2
    assert capsys.readouterr().err == "protojax: error: first second\n"
