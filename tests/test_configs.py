"""Every config file: all of its arms build, arms differ in what they say they differ in, and two steps run."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from protojax import arms, configs_path, experiment, metrics
from protojax import step as step_lib
from protojax.config import freeze, to_plain
from protojax.data import registry
from protojax.data.records import from_arrays
from protojax.main import main
from protojax.models.encoder import count_parameters
from tests.toy import config_dict

ROOT = Path(__file__).parent.parent
ALL = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
OTHERS = ("alignment", "prompts", "soft_labels")  # workloads whose configurations have arms and tests of their own
CONFIGS = [name for name in ALL if not name.startswith(OTHERS)]
MAIN_ARMS = ("decoupled", "joint", "partial", "frozen")
VARIANTS = [(name, "") for name in CONFIGS] + [
    ("inat", f) for f in ("2021", "folder", "vit_ti16", "vit_s16", "vit_b16")
]
VARIANTS += [("prototypes", f) for f in ("omniglot", "fashion", "tiny,resnet18", "vit_micro,ibot")]


def config(name: str, argument: str):
    return freeze(config_dict(name, argument))


def step_shapes(recipe):
    """(state before, state after) one step, by shapes alone: nothing is compiled."""
    batch = recipe.sources["train"].batch(0)
    state = jax.eval_shape(lambda b: step_lib.init_state(recipe, b), batch)
    after, numbers, _ = jax.eval_shape(lambda s, b: step_lib.step(recipe, s, b), state, batch)
    assert numbers["loss/total"][0].shape == ()
    return state, after


def assert_same_shapes(before, after):
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


# --------------------------------------------------------------------------------------------------- smoke arms
@pytest.mark.parametrize("arm", MAIN_ARMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_smoke_variant_of_every_main_arm_builds_and_steps(name, arm):
    built = config(name, f"arm={arm},smoke")
    assert (built.arm, built.name.endswith("_smoke")) == (arm, True)
    recipe = experiment.build(built)
    before, after = step_shapes(recipe)
    assert_same_shapes(before, after)
    assert recipe.total_steps == 2
    learned = jax.tree.leaves(before.params["head"]["prototypes"])
    assert bool(learned) == (arm in ("joint", "partial"))
    assert recipe.evaluations


@pytest.mark.parametrize("arm", [arm for arm in arms.ARMS if arm not in MAIN_ARMS])
def test_smoke_variant_of_every_ablation_builds_and_steps(arm):
    before, after = step_shapes(experiment.build(config("quickstart", f"{arm},smoke")))
    assert_same_shapes(before, after)


@pytest.mark.parametrize("arm", ["decoupled", "joint"])
def test_masked_patches_stand_beside_any_arm(arm):
    """The term, a hidden part of every global view, and nothing of the arm moves."""
    plain, dense = (config("inat", f"{arm},{flags}") for flags in ("vit_s16", "vit_s16,ibot"))
    assert {**dense.method.objective} == {**plain.method.objective, "ibot": dense.method.objective["ibot"]}
    assert (dense.method.estimator, dense.method.head) == (plain.method.estimator, plain.method.head)
    recipe = experiment.build(config("prototypes", f"{arm},ibot,smoke"))
    before, after = step_shapes(recipe)
    assert_same_shapes(before, after)
    batch = recipe.sources["train"].batch(0)
    inputs = jax.eval_shape(lambda b: recipe.views(jax.random.key(0), b), batch)
    assert inputs["masked"].shape == (2, 16, 6)  # 40% of 4 x 4 patches
    whole = {"plain"} if arm == "decoupled" else set()
    assert set(recipe.teacher_views(inputs)) == {"global", "patches"} | whole
    with pytest.raises(ValueError, match="needs a backbone with patch tokens"):
        experiment.build(config("prototypes", "ibot"))


# ------------------------------------------------------------------------------------------------ whole variants
@pytest.fixture
def no_files(monkeypatch):
    """Data sets that need files give a few black images instead; their options are checked as ever."""

    def instead(opener):
        @functools.wraps(opener)  # keeps the signature, which options are checked against
        def stand_in(*names, **options):
            side = options.get("canvas", 32)
            return from_arrays(names[0], np.zeros((200, side, side, 3), np.uint8), {"fine": np.arange(200) % 5})

        return stand_in

    monkeypatch.setattr(registry, "open_tfds", instead(registry.open_tfds))
    for name in ("npz", "image_folder"):
        monkeypatch.setitem(registry._OPEN, name, instead(registry._OPEN[name]))


def whole(name, flag):
    c = config_dict(name, flag)
    if c.data.source.name in registry._NEEDS_ROOT:
        c.data.root = "somewhere"
    return freeze(c)


@pytest.mark.parametrize(("name", "flag"), VARIANTS, ids=lambda value: value or "plain")
def test_every_variant_builds_at_its_own_size(name, flag, no_files):
    built = whole(name, flag)
    recipe = experiment.build(built)
    size, batch = recipe.sources["train"].spec.size, recipe.sources["train"].spec.batch_size
    assert batch == built.data.batch_size
    assert recipe.total_steps == (built.method.steps or round(built.method.epochs * size / batch))
    assert [e.name for e in recipe.evaluations] == ["knn", "prototypes", "rank"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flag"), VARIANTS, ids=lambda value: value or "plain")
def test_networks_and_codebooks_have_their_published_sizes(name, flag, no_files):
    built = whole(name, flag)
    recipe = experiment.build(built)
    spec, dtype = recipe.sources["train"].spec, jax.dtypes.canonicalize_dtype
    batch = {k: jax.ShapeDtypeStruct((spec.batch_size, *s.shape), dtype(s.dtype)) for k, s in spec.shapes.items()}
    state = jax.eval_shape(lambda b: step_lib.init_state(recipe, b), batch)
    components = {leaf.shape[0] for leaf in jax.tree.leaves(state.estimator["components"])}
    assert components == {built.method.estimator.options["components"]}
    millions = count_parameters(state.params["encoder"]["backbone"]) / 1e6
    assert round(millions, 1) == MILLIONS[built.method.backbone.name]


# Without the classifier, as in torchvision and timm (ResNet-18 with the CIFAR stem); the micro ones are ours.
MILLIONS = {"resnet_micro": 0.5, "resnet18": 11.2, "resnet50": 23.5}
MILLIONS |= {"vit_micro": 0.8, "vit_ti": 5.5, "vit_s": 21.7, "vit_b": 85.8}


# ---------------------------------------------------------------------------------------------------- arguments
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("argument", ["arm=joint,smoke", "joint,smoke", "smoke,joint", "smoke,arm=joint"])
def test_argument_forms_mean_the_same(name, argument):
    assert to_plain(config(name, argument)) == to_plain(config(name, "arm=joint,smoke"))


@pytest.mark.parametrize("name", CONFIGS)
def test_arms_differ_in_estimator_and_objective_alone(name):
    """A comparison of arms compares arms: data, views, network, optimiser, teacher, seed and evaluations are equal.
    (DINO's loss comes with its head and the centre of its logits.)"""
    reference = to_plain(config(name, ""))
    assert reference["arm"] == "decoupled"
    seen = {}
    for arm in arms.ARMS:
        plain = to_plain(config(name, arm))
        assert plain.pop("arm") == arm
        changed = {k for k in plain["method"] if plain["method"][k] != reference["method"][k]}
        allowed = {"estimator", "objective", "rows"} | ({"head", "logit_center"} if arm.endswith("_dino") else set())
        assert changed <= allowed, arm
        # What is fitted in the way of the default sees the same rows; other arms have the views, as published.
        fitted = plain["method"]["estimator"]["name"] not in ("learned", "frozen", "capi", "queue_sinkhorn", "coupled")
        same_rows = fitted and arm != "paper"
        assert plain["method"]["rows"] == (reference["method"]["rows"] if same_rows else "views"), arm
        assert {k: v for k, v in plain.items() if k != "method"} == {
            k: v for k, v in reference.items() if k not in ("method", "arm")
        }
        seen[arm] = (plain["method"]["estimator"], plain["method"]["objective"])
        count = plain["method"]["estimator"]["components"]
        assert count == reference["method"]["estimator"]["components"], arm
    for arm in MAIN_ARMS[1:]:
        assert seen[arm] != seen["decoupled"]


@pytest.mark.parametrize("name", ALL)
def test_every_config_says_how_it_is_run(name):
    """Each command in a config's docstring is one that its own arguments understand."""
    text = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text())) or ""
    commands = [line for line in text.splitlines() if "protojax train" in line]
    assert len(commands) >= 2
    for line in commands:
        value = line.split("--config=")[1].split()[0]
        file, _, argument = value.partition(":")
        assert file == name
        assert config(file, argument).name.startswith(name.split("_")[0])


def test_configs_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [configs_path.find(name).stem for name in ALL] == ALL
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").write_text("")
    assert configs_path.find("quickstart").resolve() == tmp_path / "configs" / "quickstart.py"  # mine come first


# ----------------------------------------------------------------------------------------------- two real steps
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, f"{arm},smoke") for name in CONFIGS for arm in ("decoupled", "joint", "partial")]
    + [
        ("prototypes", "ibot,smoke"),
        ("inat", "vit_s16,smoke"),
        ("quickstart", "frozen,smoke"),
        ("quickstart", "joint_koleo,smoke"),
    ],
)
def test_two_steps_of_every_smoke_variant(name, argument, tmp_path):
    assert main([f"--config={name}:{argument}", f"--workdir={tmp_path}", "--config.system.compilation_cache="]) == 0
    losses = [
        r["metrics"]["loss/total"] for r in metrics.read_records(tmp_path / "metrics.jsonl") if r["kind"] == "train"
    ]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert (tmp_path / "report.html").stat().st_size > 10_000
