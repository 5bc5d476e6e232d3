"""Config -> Recipe: what every part is given, and what is refused before anything is compiled."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import experiment, optim
from protojax import step as step_lib
from protojax.api import EstimatorSpec, Recipe
from protojax.config import Component, LongTail, defaults, freeze, options_of
from protojax.data import views
from protojax.workloads import base, images, prototypes
from tests.toy import config_dict, toy_config, toy_recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return experiment.build(toy_config())


def changed(config, **method):
    return dataclasses.replace(config, method=dataclasses.replace(config.method, **method))


# --------------------------------------------------------------------------------------------------------- fill
def test_fill_makes_every_option_of_every_component_known():
    """After `fill`, what the command line may set is what `build` accepts: each table's signature, no more."""
    c = config_dict("quickstart", "smoke")
    tables = {
        "backbone": prototypes.BACKBONES, "head": prototypes.HEADS, "estimator": prototypes.ESTIMATORS,
        "views": prototypes.VIEWS, "optim": optim.OPTIMIZERS,
    }  # fmt: skip
    for part, table in tables.items():
        accepted = set(options_of(table[c.method[part].name])) - set(base.GIVEN)
        assert set(c.method[part]) - {"name"} <= accepted, part
        offered = {k for k in accepted if k in c.method[part]}
        assert len(offered) >= len(accepted) - 1, (part, accepted - offered)  # a table's default may be a structure
    assert c.is_locked
    assert set(c.data.source) == {"name", "size", "classes", "side", "delay", "seed"}
    frozen = freeze(c)
    assert experiment.build(frozen).total_steps == 2


def test_fill_keeps_what_a_config_says():
    c = defaults()
    c.method.steps = 3
    c.method.optim.peak_lr = 0.125
    c.method.objective = {"one": {"name": "carp", "block": 8}, "koleo_proto": {"weight": 0.5}}
    experiment.fill(c)
    assert (c.method.optim.peak_lr, c.method.objective.one.block, c.method.objective.one.weight) == (0.125, 8, 1.0)
    assert (c.method.objective.koleo_proto.name, c.method.objective.koleo_proto.weight) == ("koleo_proto", 0.5)


def test_the_published_views_are_the_defaults_of_the_free_ones():
    assert images.multicrop() == views.CARP_VIEWS()
    assert images.multicrop(local_count=0)[1] is None
    assert images.multicrop(global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), local_count=8) == views.DINO_VIEWS()


# ------------------------------------------------------------------------------------------------------ sources
def test_sources_shuffle_training_and_pass_once_over_the_splits(recipe):
    specs = {name: source.spec for name, source in recipe.sources.items()}
    assert set(specs) == {"train", "bank", "test"}
    assert (specs["train"].batch_size, specs["bank"].batch_size, specs["test"].batch_size) == (16, 32, 32)
    order = np.concatenate([recipe.sources["train"].batch(t)["index"] for t in range(4)])
    assert sorted(order) == list(range(64))
    assert list(order) != list(range(64))
    ordered = np.concatenate([recipe.sources["bank"].batch(t)["index"] for t in range(2)])
    assert list(ordered) == list(range(64))
    for key, counts in specs["train"].counts.items():  # groups are defined by training counts, wherever they are used
        assert all(np.array_equal(specs[split].counts[key], counts) for split in ("bank", "test"))


def test_a_long_tail_is_made_of_the_training_split_alone():
    config = toy_config()
    tailed = dataclasses.replace(config, data=dataclasses.replace(config.data, longtail=LongTail(8.0, 0, None)))
    sources = images.sources(tailed)
    counts = sources["train"].spec.counts["fine"]
    # floor(16 * 8^(-r/3)) for r = 0..3, in an order that the seed decides
    assert sorted(counts.tolist(), reverse=True) == [16, 8, 4, 2]
    assert sources["bank"].spec.size == counts.sum() == sources["train"].spec.size
    assert sources["test"].spec.size == 64
    np.testing.assert_array_equal(sources["test"].spec.counts["fine"], counts)
    found = images.images(tailed)(np.arange(3))
    np.testing.assert_array_equal(found, sources["bank"].batch(0)["image"][:3])
    missing = dataclasses.replace(tailed, evals=dataclasses.replace(tailed.evals, labels=("tail",)))
    with pytest.raises(ValueError, match=r"longtail needs labels 'tail'; synthetic/train has \['coarse', 'fine'\]"):
        experiment.build(missing)


def test_the_seed_orders_the_training_split_and_nothing_else():
    a, b = (images.sources(dataclasses.replace(toy_config(), seed=seed)) for seed in (0, 1))
    assert not np.array_equal(a["train"].batch(0)["index"], b["train"].batch(0)["index"])
    for split in ("bank", "test"):
        np.testing.assert_array_equal(a[split].batch(1)["image"], b[split].batch(1)["image"])


# ------------------------------------------------------------------------------------------------- the recipe
def test_epochs_become_steps():
    """steps = round(epochs x images / batch), at least one."""
    config = toy_config()
    for epochs, steps in ((1.0, 4), (2.5, 10), (0.01, 1)):
        assert experiment.build(changed(config, epochs=epochs, steps=None)).total_steps == steps


def test_teacher_rows_stand_image_by_image():
    """Row b V + v is view v of image b, and inherits the mask of its image."""
    image = jnp.arange(2 * 3 * 4, dtype=jnp.float32).reshape(2, 3, 4)
    rows = prototypes.teacher_rows({"image": image}, {"mask": jnp.asarray([True, False, True])})
    assert rows["features"].shape == (6, 4)
    for b in range(3):
        for v in range(2):
            np.testing.assert_array_equal(rows["features"][b * 2 + v], image[v, b])
    assert rows["mask"].tolist() == [True, True, False, False, True, True]


def test_rows_of_whole_images_are_what_an_evaluation_sees():
    """method.rows='plain': a row an image, the teacher's feature of the evaluation view, by the running moments; what
    the loss compares and the batch-norm moments are those of the views, as without it."""
    viewed, whole = toy_recipe(method__rows="views"), toy_recipe(method__rows="plain")
    batch = jax.tree.map(jnp.asarray, whole.sources["train"].batch(0))
    state = step_lib.init_state(whole, batch)
    moved = jax.tree.map(lambda x: x + 0.25, state.teacher["stats"])  # other moments than those of the batch
    variables = {"params": state.teacher["params"]["encoder"], "stats": moved}

    def observed(recipe):
        inputs = recipe.views(jax.random.key(0), batch)
        embeddings, stats = recipe.teacher.apply(variables, recipe.teacher_views(inputs), True, jax.random.key(1))
        return embeddings, stats, recipe.rows(embeddings, batch, None)

    seen, stats, rows = observed(viewed)
    also, same, plain = observed(whole)
    evaluated, _ = whole.teacher.apply(variables, whole.plain_view(batch), False, None)
    np.testing.assert_array_equal(plain["features"], evaluated["image"][0])
    np.testing.assert_array_equal(plain["mask"], batch["mask"])
    np.testing.assert_array_equal(also["image"], seen["image"])
    jax.tree.map(np.testing.assert_array_equal, stats, same)
    assert rows["features"].shape[0] == 2 * plain["features"].shape[0]
    spec = step_lib.estimator_spec(whole, {"params": state.params["encoder"], "stats": state.stats}, batch)
    assert spec.rows == len(batch["mask"])


@pytest.mark.parametrize(
    ("arm", "rows", "message"),
    [
        ("decoupled", "crops", "method.rows: expected 'views' or 'plain', got 'crops'"),
        ("partial", "plain", "method.rows = 'plain': the estimator 'capi' learns from the views"),
        ("coupled", "plain", "the estimator 'coupled' learns from the views"),
        ("joint_swav", "plain", "the estimator 'queue_sinkhorn' learns from the views"),
    ],
)
def test_rows_that_do_not_fit_are_refused(arm, rows, message):
    with pytest.raises(ValueError, match=message):
        toy_recipe(arm, method__rows=rows)


@pytest.mark.parametrize("arm", ["decoupled", "joint"])
def test_an_objective_is_given_what_build_promised(arm):
    """Names against which requirements are checked are the names that the step passes on."""
    recipe = experiment.build(toy_config(arm))
    seen = {}

    def loss(params, inputs):
        seen.update(inputs)
        return recipe.objective.loss(params, inputs)

    spied = recipe._replace(objective=recipe.objective._replace(loss=loss))
    batch = recipe.sources["train"].batch(0)
    state = jax.eval_shape(lambda b: step_lib.init_state(spied, b), batch)
    jax.eval_shape(lambda s, b: step_lib.step(spied, s, b), state, batch)
    promised = prototypes._available(recipe.estimator)
    assert {name.split("/")[0] for name in promised} == set(seen)
    assert recipe.objective.requires <= set(promised)
    assert any(name.startswith("head/") for name in promised) == (arm == "joint")


def test_teacher_momentum_and_its_schedule():
    config = toy_config()
    cosine = experiment.build(config).schedules["momentum"]
    start, end = config.method.teacher.start, config.method.teacher.end
    assert float(cosine(jnp.int32(0))) == pytest.approx(start)
    assert float(cosine(jnp.int32(3))) == pytest.approx((start + end) / 2)  # half of six steps
    assert float(cosine(jnp.int32(6))) == float(cosine(jnp.int32(99))) == pytest.approx(end)
    teacher = dataclasses.replace(config.method.teacher, schedule="constant")
    constant = experiment.build(changed(config, teacher=teacher)).schedules["momentum"]
    assert float(constant(jnp.int32(5))) == pytest.approx(start)


def test_evaluations_follow_the_labels():
    config = toy_config()
    names = lambda c: [e.name for e in experiment.build(c).evaluations]  # noqa: E731
    assert names(config) == ["knn", "prototypes", "rank"]
    assert names(dataclasses.replace(config, evals=dataclasses.replace(config.evals, labels=()))) == [
        "prototypes",
        "rank",
    ]


def test_products_in_bfloat16_round_operands_and_nothing_else():
    """Loss and statistics of a step change by the rounding of unit rows: 2^-9 of a logit of at most 1 / T."""
    plain, rounded = toy_recipe(), toy_recipe(method__products="bfloat16")
    spec = EstimatorSpec(8, 16, 10)
    key = jax.random.key(0)
    S = plain.estimator.init(key, spec)
    features = jax.random.normal(key, (16, 8))
    rows = {"features": features, "mask": jnp.ones(16, bool)}
    ours, theirs = (r.estimator.statistics(S, rows) for r in (plain, rounded))
    assert ours["count"].dtype == theirs["count"].dtype == jnp.float32
    assert float(jnp.abs(ours["count"] - theirs["count"]).max()) > 0.0
    np.testing.assert_allclose(ours["feature_sum"], theirs["feature_sum"], rtol=1e-6)
    book = plain.estimator.codebooks(S, {})[0]
    two, same = jnp.stack([features, features[::-1]]), jnp.stack([features] * 2)
    rest = {"target": book, "prediction": book, "mask": jnp.ones(16, bool), "key": key}
    inputs = {"student": {"image": two}, "teacher": {"image": same}, **rest}
    one, other = (
        float(r.objective.loss({"carp": {}}, {**inputs, "head": {}, "step": 0, "batch": {}})[0])
        for r in (plain, rounded)
    )
    temperature = 0.1
    assert 0.0 < abs(one - other) < 4 * 2**-8 / temperature


def test_the_reading_of_features_is_the_estimators():
    config = toy_config()
    assert prototypes.reading(config) == "unit"
    options = {**config.method.estimator.options, "features": "raw"}
    assert prototypes.reading(changed(config, estimator=Component("mixture", options))) == "raw"
    assert prototypes.reading(toy_config("partial")) == "unit"  # capi has no such option


# ------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"workload": "promts"}, ValueError, r"unknown workload 'promts' \(did you mean 'prompts'\?\)"),
        ({"estimator": Component("mixtur")}, ValueError, r"unknown estimator 'mixtur' \(did you mean 'mixture'\?\)"),
        ({"estimator": Component("mixture", {})}, ValueError, r"estimator 'mixture' needs \['components'\]"),
        ({"optim": Component("adamw", {"peak_lr": "big"})}, TypeError, r"'peak_lr': expected float .*got str 'big'"),
        ({"optim": Component("adam")}, ValueError, r"unknown optimiser 'adam' \(did you mean 'adamw'\?\)"),
        ({"views": Component("carpp")}, ValueError, r"unknown views 'carpp' \(did you mean 'carp'\?\)"),
        ({"views": Component("multicrop", {"global_scale": (1.0,)})}, ValueError, r"range \(low, high\)"),
        ({"head": Component("carp", {"dimm": 3})}, ValueError, r"no option 'dimm' \(did you mean 'dim'\?\)"),
        ({"objective": {"carp": Component("karp")}}, ValueError, r"unknown objective 'karp' \(did you mean 'carp'\?\)"),
        ({"objective": {"carp": Component("carp", {"block": 7})}}, ValueError, r"K = 64 and block = 7"),
    ],
)
def test_mistakes_are_refused_when_the_recipe_is_built(change, error, message):
    with pytest.raises(error, match=message):
        experiment.build(changed(toy_config(), **change))
