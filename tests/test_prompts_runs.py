"""Mixtures of prompts on the one loop: two steps with everything around them, and (slow) failure and cure."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protojax import experiment, loading, running
from protojax.commands.prompts import show
from protojax.config import freeze
from protojax.workloads.prompts_arms import ARMS
from tests.toy import config_dict


def small(argument: str, **changes: Any) -> Any:
    c = config_dict("prompts_synthetic", argument)
    c.run.progress = c.run.tensorboard = False
    for name, value in changes.items():
        c.method.prompts[name] = value
    return freeze(c)


def test_two_steps_a_page_a_classifier_and_a_sheet(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer images than sub-prompts, on purpose
        record = running.train_config(small("smoke"), tmp_path, say=lambda text: None)
        model = loading.load(tmp_path)
    found = record["prompts"]
    assert found["count"] == 8
    assert found["e_step"]["usage_perplexity"] > 1.0
    assert set(found["baselines"]) == {"zero_shot", "class_mean", "k_means", "linear_probe", "linear_probe_adam"}
    assert {"top1", "ece", "levels"} <= set(found["baselines"]["linear_probe"]) & set(found["accuracy"])
    assert 0 <= found["validation"]["top1"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    terms = {k for r in lines if r["kind"] == "train" for k in r["metrics"] if k.startswith("grad_norm/")}
    assert terms == {"grad_norm/mixture", "grad_norm/classification"}  # a weight of 0 is no term
    assert "Are all sub-prompts at work?" in (tmp_path / "report.html").read_text()
    np.testing.assert_allclose(np.linalg.norm(model.prompts, axis=2), 1.0, rtol=1e-5)
    assert model(np.eye(32, dtype=np.float32)[:2]).shape == (2, 4)
    assert show(tmp_path, "class 00").count("usage") == 8
    text = show(tmp_path, "class 00", tmp_path / "sheet.png")
    assert "the source has no pictures" in text
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"no class 'class 0'.*did you mean"):
        show(tmp_path, "class 0")
    with pytest.raises(ValueError, match=r"--out=sheet.txt: expected a name that ends in .png"):
        show(tmp_path, "class 00", Path("sheet.txt"))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_freezes(arm: str):
    """Names and options of every arm are known to the workload (what `build` checks without data)."""
    from protojax.workloads.prompts import read_mixture

    assert read_mixture(small(f"{arm},smoke")).num_prompts >= 1


@pytest.mark.parametrize(
    ("shares", "message"),
    [((0.5, 0.5), r"usage_prior: expected K = 8 positive shares"), ((0.2,) * 8, "that add up to 1")],
)
def test_a_prior_that_is_none_is_refused(shares: tuple[float, ...], message: str):
    from protojax.workloads.prompts import read_mixture

    with pytest.raises(ValueError, match=message):
        read_mixture(small("smoke", usage_prior=shares))
    assert read_mixture(small("smoke", usage_prior=(0.125,) * 8)).usage_prior == (0.125,) * 8


def test_wrong_options_are_named():
    c = config_dict("prompts_synthetic", "smoke")
    c.unlock()
    c.method.prompts.prise = 3.0
    with pytest.raises(ValueError, match=r"no option 'prise' .did you mean 'price'"):
        experiment.build(freeze(c))


def test_terms_are_not_probed_where_nothing_has_a_gradient():
    """Offsets that online EM moves are no parameters: a gradient of 0 is no finding about the terms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        built = {arm: experiment.build(small(f"{arm},smoke")) for arm in ("default", "online_em")}
    assert built["online_em"].objective.terms is None
    assert built["default"].objective.terms is not None


@pytest.mark.slow
def test_the_published_recipe_has_one_winner_and_the_default_uses_all(tmp_path: Path):
    """Preset small, one start: usage 1.6 of 8 and named by the doctor; 7.6 of 8, modes found, top-1 higher."""
    found = {}
    for arm in ("original_k8", "default"):
        found[arm] = running.train_config(small(f"{arm},small"), tmp_path / arm, say=lambda text: None)
    original, default = (found[arm]["prompts"] for arm in ("original_k8", "default"))
    assert original["e_step"]["usage_perplexity"] <= 2.5
    assert default["e_step"]["usage_perplexity"] >= 7.2
    assert min(default["e_step"]["purity"], default["inference"]["purity"]) >= 0.95
    assert default["accuracy"]["top1"] >= original["accuracy"]["top1"]
    named = {arm: {f["detector"] for f in record["findings"]} for arm, record in found.items()}
    assert "winner_take_all" in named["original_k8"]
    assert not named["default"] & {"winner_take_all", "identical_prompts", "nothing_learned", "dead_term"}
