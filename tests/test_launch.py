"""Launch files: they parse, and the command that they give to their service runs (with the service replaced)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from protojax.distributed import Cluster, detect

LAUNCH = Path(__file__).parent.parent / "launch"
SMOKE = (
    "--config=quickstart:smoke", "--config.run.progress=False", "--config.run.report=False",
    "--config.run.tensorboard=False", "--config.evals.evaluations=('rank',)", "--config.system.platform=cpu",
)  # fmt: skip


def bash(script: str, *arguments: str, path: Path | None = None, timeout: float = 600, **environ: str):
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    where = f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]
    return subprocess.run(
        ["bash", "-c", script, "bash", *arguments], capture_output=True, text=True, timeout=timeout, cwd=LAUNCH.parent,
        env={**inherited, "PATH": where, "PYTHON": sys.executable, **environ},
    )  # fmt: skip


@pytest.fixture
def service(tmp_path) -> Path:
    """A folder of commands that print their arguments, one a line, in place of the services'."""
    for name in ("gcloud", "mpirun", "srun", "python"):
        (tmp_path / name).write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        (tmp_path / name).chmod(0o755)
    return tmp_path


def rendered(name: str, **values: str) -> str:
    """The file with ${NAME} replaced, as envsubst does."""
    text = (LAUNCH / name).read_text()
    return re.sub(r"\$\{(\w+)\}", lambda m: values.get(m[1], m[0]), text)


def container(**values: str) -> dict:
    manifest = yaml.safe_load(rendered("gke_jobset.yaml", **values))
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (manifest["kind"], job["completionMode"], job["parallelism"]) == ("JobSet", "Indexed", int(values["HOSTS"]))
    return job["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_parse(path):
    assert os.access(path, os.X_OK)
    assert bash(f"bash -n {path}").stderr == ""


def test_the_readme_has_three_lines_on_every_file_and_says_what_was_not_run():
    text = (LAUNCH / "README.md").read_text()
    parts = re.split(r"^### ", text, flags=re.M)[1:]
    named = {name for part in parts for name in re.findall(r"`(\w+\.\w+)`", part.splitlines()[0])}
    assert named | {"processes.sh"} == {p.name for p in LAUNCH.iterdir()} - {"README.md"}
    for part in parts:
        assert len(part.strip().splitlines()) == 4, part
        assert "local.sh" in part.splitlines()[0] or "Not run on the real service." in part


def test_every_pod_knows_its_place():
    made = container(CONFIG="inat", IMAGE="image", WORKDIR="/shared/run", HOSTS="4")
    environ = {e["name"]: e["value"] for e in made["env"]} | {"JOB_COMPLETION_INDEX": "2"}
    assert detect(environ=environ) == Cluster("jobset", "protojax-w-0-0.protojax:8476", 4, 2)
    assert made["command"] + made["args"] == ["python", "-m", "protojax.main", "--config=inat", "--workdir=/shared/run"]


def test_services_are_given_the_command(service):
    done = bash('launch/tpu_pod.sh "$@"', "--config=inat", "--workdir=/a b", path=service, TPU="pod", ZONE="z")
    assert done.stdout.splitlines()[-1] == (
        "--command=cd ~/protojax && PROTOJAX_TPU_POD=1 launch/local.sh --config=inat --workdir=/a\\ b"
    )
    done = bash('launch/openmpi.sh "$@"', "--config=inat", path=service, HOSTS="a:8,b:8")
    assert done.stdout.splitlines()[:5] == ["mpirun", "--host", "a:8,b:8", "-x", "PROTOJAX_COORDINATOR=a:8476"]
    done = bash('launch/slurm.sh "$@"', "--config=inat", path=service, SLURM_SUBMIT_DIR=str(LAUNCH.parent))
    assert done.stdout.splitlines()[-2:] == [str(LAUNCH / "local.sh"), "--config=inat"]


@pytest.mark.parametrize(("nodes", "more"), [("1", []), ("2", ["a:8476", "=2", "=1"])])
def test_skypilot_nodes_find_one_another(service, nodes, more):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert {"name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "setup", "run"} == set(task)
    done = bash(
        task["run"], path=service, CONFIG="inat", WORKDIR="/shared/run", SKYPILOT_NUM_NODES=nodes,
        SKYPILOT_NODE_RANK="1", SKYPILOT_NODE_IPS="a\nb",
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[:5] == ["python", "-m", "protojax.main", "--config=inat", "--workdir=/shared/run"]
    assert all(value in line for value, line in zip(more, lines[5:], strict=True))


def cells() -> list[str]:
    notebook = json.loads((LAUNCH / "colab.ipynb").read_text())
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_parses_and_holds_no_output():
    for source in cells():
        compile(source, "cell", "exec")
    assert '"outputs": []' in (LAUNCH / "colab.ipynb").read_text()


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Every cell in one namespace of a fresh process, as a fresh kernel would."""
    program = f"namespace = {{}}\nfor source in {cells()!r}:\n    exec(compile(source, 'cell', 'exec'), namespace)\n"
    environ = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(LAUNCH.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={**environ, "JAX_PLATFORMS": "cpu"}, capture_output=True,
        text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 steps," in done.stdout
    assert (tmp_path / "runs" / "colab" / "report.html").is_file()


@pytest.mark.slow
def test_the_rendered_commands_train(tmp_path):
    """One smoke run each by the pod's, the task's and the scripts' own commands, and one by two local processes."""
    made = container(CONFIG="quickstart:smoke", IMAGE="image", WORKDIR=str(tmp_path / "pod"), HOSTS="1")
    pod = " ".join(f"'{part}'" for part in [sys.executable, *made["command"][1:], *made["args"]])
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"].replace("python -m", f"{sys.executable} -m")
    sky = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "127.0.0.1"}
    jobs = {
        "pod": (f'{pod} "$@"', SMOKE[1:], {"PROTOJAX_PROCESSES": "1", "JOB_COMPLETION_INDEX": "0",
                                            "PROTOJAX_COORDINATOR": "127.0.0.1:8476"}),
        "task": (task, SMOKE[1:], {"CONFIG": "quickstart:smoke", "WORKDIR": str(tmp_path / "task"), **sky}),
        "local": ('launch/local.sh "$@"', (*SMOKE, f"--workdir={tmp_path / 'local'}"), {}),
        "two": ('launch/processes.sh 2 "$@"', (*SMOKE, f"--workdir={tmp_path / 'two'}"), {}),
    }  # fmt: skip
    for name, (script, arguments, environ) in jobs.items():
        done = bash(script, *arguments, timeout=1800, **environ)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        assert json.loads((tmp_path / name / "summary.json").read_text())["steps"] == 2
