"""Imports run one way: a layer imports from those below it and from itself, and the packages of layer 1 not from one
another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "protojax"
LAYERS = (
    {"api", "config", "schedules", "ops"},
    {"estimators", "objectives", "models", "data", "evals"},
    {"online_mixture", "online_mixture_blocks", "online_mixture_checks"},
    {"parallel", "parallel_engine", "optim", "metrics", "prefetch", "checkpoint", "mirror", "distributed", "peers"}
    | {"accumulation", "flops", "gauges", "step", "probing", "session", "train"},
    {
        "experiment",
        "failures",
        "protocol",
        "evaluating",
        "teaching",
        "feature_files",
        "workloads",
        "alignment_arms",
        "arms",
        "report",
        "reporting",
        "summary",
        "towers",
        "loading",
        "predicting",
        "audit",
        "running",
        "jobs",
        "study",
        "study_page",
        "measuring",
        "overhead",
        "evidence",
        "configs_path",
        "overrides",
        "errors",
    },
    {"cli", "commands", "main", "__main__", "__init__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Names right below `protojax` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            head, _, rest = node.module.partition(".")
            if head == "protojax":
                found |= {rest.split(".")[0]} if rest else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("protojax.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import; write it in full")
    return found - {"__version__"}


def test_every_file_has_a_layer():
    assert {unit_of(p) for p in FILES} <= set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path):
    here = unit_of(path)
    for name in imported(path):
        assert name in LEVEL, f"{path} imports protojax.{name}, which has no layer"
        assert LEVEL[name] <= LEVEL[here], f"{path} (layer {LEVEL[here]}) imports protojax.{name} (layer {LEVEL[name]})"
        if LEVEL[here] == 1 and LEVEL[name] == 1:
            assert name == here, f"{path} imports its neighbour protojax.{name}"


def test_the_walk_sees_a_forbidden_import(tmp_path: Path):
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from protojax.train import run\n    return run\n")
    assert imported(planted) == {"train"}
    assert LEVEL["train"] > LEVEL["ops"]


def test_the_loop_names_no_workload():
    names = {"prototypes", "prompts", "alignment", "soft_label", "carp", "dino", "mixture", "knn"}
    for name in ("train.py", "step.py", "probing.py"):
        tree = ast.parse((PACKAGE / name).read_text())
        texts = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        texts |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        # The head's key is the estimator's learnable part in every workload.
        assert not (texts - {"prototypes"}) & names, name
