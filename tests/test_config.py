"""Config files in, validated dataclasses out; every mistake is named with what to do."""

from __future__ import annotations

import json

import pytest

from protojax import config as config_lib
from protojax import configs_path, experiment
from protojax.config import component, defaults, freeze, parse_argument, to_plain


def valid():
    c = defaults()
    c.method.steps = 10
    return c


def test_defaults_freeze_and_round_trip():
    frozen = freeze(valid())
    again = freeze(json.loads(json.dumps(to_plain(frozen))))
    assert to_plain(again) == to_plain(frozen)
    with pytest.raises(Exception, match="cannot assign"):
        frozen.seed = 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda c: c.data.__setitem__("batch_sise", 3),
            ValueError,
            r"config.data.batch_sise.*did you mean 'batch_size'",
        ),
        (lambda c: c.method.__setitem__("epochs", 3.0), ValueError, "exactly one of epochs and steps"),
        (lambda c: c.evals.__setitem__("every", 0.0), ValueError, r"evals.every: expected a fraction"),
        (lambda c: c.evals.__setitem__("groups", "thirds"), ValueError, "'inat' or 'terciles', got 'thirds'"),
        (lambda c: c.run.__setitem__("keep", 0), ValueError, "run.keep: expected a positive number, got 0"),
        (lambda c: c.method.teacher.__setitem__("end", 0.5), ValueError, "0 <= start <= end <= 1"),
    ],
)
def test_mistakes_are_named(change, error, message):
    c = valid()
    change(c)
    with pytest.raises(error, match=message):
        freeze(c)


def test_wrong_types_are_named():
    plain = to_plain(freeze(valid()))
    plain["data"]["batch_size"] = "many"
    with pytest.raises(TypeError, match=r"config.data.batch_size: expected int, got str 'many'"):
        freeze(plain)
    plain["data"]["batch_size"] = True
    with pytest.raises(TypeError, match="expected int, got bool"):
        freeze(plain)


@pytest.mark.parametrize("argument", ["arm=joint,smoke", "joint,smoke", "smoke,joint"])
def test_argument_forms(argument):
    assert parse_argument(argument, ["decoupled", "joint"]) == ("joint", {"smoke"})
    assert parse_argument("", ["decoupled", "joint"]) == ("decoupled", set())


def test_unknown_arm():
    with pytest.raises(ValueError, match=r"arm=jiont'.*did you mean 'joint'.*Arms: \['decoupled', 'joint'\]"):
        parse_argument("arm=jiont", ["decoupled", "joint"])


def test_one_arm_and_names_that_mean_one_thing():
    with pytest.raises(ValueError, match=r"a run has one arm, but 'joint,decoupled' names \['joint', 'decoupled'\]"):
        parse_argument("joint,decoupled", ["decoupled", "joint"])
    with pytest.raises(ValueError, match=r"\['hard'\] are arms and flags of this config file at once"):
        parse_argument("", ["default", "hard"], ("smoke", "hard"))


def test_options_of_components_are_checked():
    def build(thing, width: int = 3, rate: float = 0.1, name: str = "x"):
        return None

    table = {"build": build}
    check = lambda name, **o: config_lib.check_options("part", name, table, o, ["thing"])  # noqa: E731
    assert check("build", width=4, rate=1) is build
    with pytest.raises(ValueError, match=r"unknown part 'biuld' .did you mean 'build'"):
        check("biuld")
    with pytest.raises(ValueError, match=r"no option 'widht' .did you mean 'width'"):
        check("build", widht=3)
    with pytest.raises(TypeError, match=r"option 'width': expected int .default 3., got str 'wide'"):
        check("build", width="wide")
    with pytest.raises(TypeError, match=r"option 'width': expected int"):
        check("build", width=0.5)


def test_config_files_are_found_by_name_and_path():
    assert configs_path.find("quickstart") == configs_path.find("configs/quickstart.py")
    assert configs_path.find("quickstart").name == "quickstart.py"
    assert configs_path.resolve_arguments(["--config=quickstart:joint,smoke", "--x=1"]) == [
        f"--config={configs_path.find('quickstart')}:joint,smoke",
        "--x=1",
    ]
    assert configs_path.resolve_arguments(["--config", "quickstart"])[1].endswith("quickstart.py")
    with pytest.raises(FileNotFoundError, match=r"no config file 'quikstart' .did you mean 'quickstart'"):
        configs_path.find("quikstart")


def test_fill_offers_every_option_to_the_command_line():
    c = defaults()
    c.method.steps = 1
    c.method.estimator = component("mixture", components=8)
    experiment.fill(c)
    assert c.method.estimator.center is True
    assert c.method.objective.carp.block == 512
    with pytest.raises(AttributeError, match="center"):
        c.method.estimator.centre = False
