"""What a workload may leave out of a recipe or add to it: no teacher, an estimator without one, frozen constants."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from protojax import metrics, train
from protojax import session as session_lib
from protojax import step as step_lib
from protojax.api import Encoder, Estimator, EstimatorSpec, Evaluation, Objective, Recipe, Source, SourceSpec, Stopping
from protojax.checkpoint import Checkpoints
from protojax.config import Run, System
from protojax.objectives.common import nothing_learned, once

B, F, D, N = 8, 4, 3, 16
TOWER = np.random.default_rng(0).standard_normal((F, D)).astype(np.float32)


def source(batch_size=B) -> Source:
    x = np.random.default_rng(1).standard_normal((N, F)).astype(np.float32)

    def batch(step):
        rows = (step * batch_size + np.arange(batch_size)) % N
        return {"x": x[rows], "colour": x[rows, :2], "index": rows, "mask": np.ones(batch_size, bool)}

    shapes = {"x": jax.ShapeDtypeStruct((F,), np.float32)}
    return Source(SourceSpec("toy", N, batch_size, N // batch_size, shapes, {}, {}), batch)


def recipe(**changes) -> Recipe:
    """A frozen tower as a constant, a learned shift on top, an estimator that averages rows seen from the head."""
    views = lambda key, batch: {"x": batch["x"], "tower": batch["constants"]["tower"]}  # noqa: E731

    def apply(variables, inputs, training, key):
        text = inputs["x"] @ inputs["tower"] + variables["params"]["shift"][None, :]
        return {"text": text, "tokens": jnp.ones((len(text), 2, D))}, variables["stats"]

    def statistics(S, rows):
        return {"sum": jnp.sum(rows["features"], 0), "count": jnp.sum(rows["mask"], dtype=jnp.float32)}

    def update(S, stats, rows, step, key):
        mean = stats["sum"] / stats["count"]
        return {"components": {}, "memory": {}, "shared": {"mean": mean}}, {
            "estimator/size": once(mean[0], rows["mask"])
        }

    def loss(params, inputs):
        near = jnp.mean((inputs["student"]["text"] - inputs["estimator"]["shared"]["mean"][None, :]) ** 2)
        return near + far(params), {"loss": once(near + far(params), inputs["mask"])}

    def rows_of(embeddings, batch, head):
        seen = batch["x"] @ batch["constants"]["tower"] + head["objective"]["w"][None, :]
        return {"features": seen, "mask": batch["mask"]}

    far = lambda params: 0.5 * jnp.sum(params["w"] ** 2)  # noqa: E731
    terms = lambda params, inputs: {"near": (1.0, loss(params, inputs)[0] - far(params)), "far": (0.5, far(params))}  # noqa: E731
    estimator = Estimator(
        init=lambda key, spec: {"components": {}, "memory": {}, "shared": {"mean": jnp.zeros(spec.dim)}},
        statistics=statistics,
        update=update, codebooks=lambda S, head: (None, None), head=nothing_learned, start_rows=0,
        start=lambda S, rows, key: S,
    )  # fmt: skip
    made = Recipe(
        sources={"train": source(), "test": source()}, views=views, teacher_views=lambda inputs: inputs,
        plain_view=lambda batch: views(None, batch),
        encoder=Encoder(lambda key, inputs: {"params": {"shift": jnp.ones(D)}, "stats": {}}, apply), teacher=None,
        estimator=estimator,
        objective=Objective(frozenset({"mask"}), lambda key, spec: {"w": spec.constants["start"]}, loss, terms),
        rows=rows_of,
        optimizer=optax.sgd(0.1), schedules={}, evaluations=(Evaluation("size", evaluate),), describe=lambda S: {},
        diagnose=lambda records: [], total_steps=4, seed=0,
        constants={"tower": TOWER, "start": np.full(D, 0.25, np.float32)}, keep=("colour",),
        spec=EstimatorSpec(D, B, 4), clip_norm=1e-6,
    )  # fmt: skip
    return made._replace(**changes)


def evaluate(probe, key):
    bank = probe.bank("test")
    assert bank.backbone.shape == bank.image.shape == (N, 0)
    assert bank.extra["tokens"].shape == (N, 2, D)  # not a view axis
    np.testing.assert_array_equal(bank.extra["colour"], source(N).batch(0)["colour"])
    np.testing.assert_allclose(probe.encode(source().batch(0))["text"], bank.extra["text"][:B], rtol=1e-6)
    return {"size": {"text": float(np.abs(bank.extra["text"]).mean()), "w": float(probe.head()["objective"]["w"][0])}}


def options(path, **changes) -> session_lib.Options:
    run = Run(**{"log_every": 2, "progress": False, "tensorboard": False, "checkpoint_every": 1.0, **changes})
    return session_lib.Options(path, run, System(), 0.5, {}, say=lambda text: None)


def test_constants_are_an_argument_of_the_step_and_in_no_checkpoint(tmp_path):
    session = session_lib.make_session(recipe(), options(tmp_path))
    accumulator = step_lib.empty_accumulator(session.numbers)
    batch = session.recipe.sources["train"].batch(0)
    lowered = session.one.lower(session.shapes, accumulator, batch, session.constants)
    literal = f"dense<[[{TOWER[0, 0]:.6E}"[:18]
    assert literal not in lowered.as_text()
    result = train.run(recipe(), options(tmp_path))
    assert result.finished
    state = result.state
    assert (state.teacher, state.stats) == ({}, {})
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    saved = checkpoints.record(4)["checksums"]
    checkpoints.close()
    assert set(saved) == {"step", "params/encoder/shift", "params/head/objective/w", "estimator/shared/mean"}


def test_an_estimator_without_teacher_sees_the_current_head_and_moves_first(tmp_path):
    """The head starts from the constants; rows of step 0 see it, and the loss sees the mean of those rows."""
    made = recipe()
    batch = step_lib.join(made.sources["train"].batch(0), jax.tree.map(jnp.asarray, made.constants))
    batch = jax.tree.map(jnp.asarray, batch)
    state = step_lib.init_state(made, batch)
    np.testing.assert_array_equal(state.params["head"]["objective"]["w"], made.constants["start"])
    new, numbers, _ = step_lib.step(made, state, batch)
    expected = (batch["x"] @ TOWER + 0.25).mean(0)
    np.testing.assert_allclose(new.estimator["shared"]["mean"], expected, rtol=1e-5)
    text = batch["x"] @ TOWER + 1.0
    loss = np.mean((text - expected[None, :]) ** 2) + 0.5 * 3 * 0.25**2
    assert float(numbers["loss/total"][0]) == pytest.approx(float(loss), rel=1e-5)
    assert float(numbers["clipped"][0]) == 1.0
    assert {k for k in numbers if k.startswith("gradient/")} == {"gradient/encoder/shift", "gradient/head/objective"}


def test_gradients_of_terms_are_measured_at_evaluations_and_move_nothing(tmp_path):
    made = recipe()
    train.run(made, options(tmp_path))
    records = [r for r in metrics.read_records(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    seen = {r["step"] for r in records if "grad_norm/near" in r["metrics"]}
    assert seen == {2, 4}
    last = records[-1]["metrics"]
    assert last["weight/far"] == 0.5
    w = 0.25 * 0.9**4  # gradient of far is w: the state after four steps of rate 0.1
    assert last["grad_norm/far"] == pytest.approx(np.sqrt(3) * w, rel=1e-5)
    plain = made._replace(objective=made.objective._replace(terms=None))
    other = train.run(plain, options(tmp_path / "plain"))
    np.testing.assert_allclose(other.state.params["head"]["objective"]["w"], w, rtol=1e-5)


def test_neither_teacher_nor_estimator():
    def loss(params, inputs):
        assert (inputs["teacher"], inputs["target"], inputs["prediction"], inputs["estimator"]) == ({}, None, None, {})
        return jnp.mean(inputs["student"]["text"] ** 2), {"loss": once(0.0, inputs["mask"])}

    made = recipe(estimator=None, rows=None, spec=None)
    made = made._replace(objective=Objective(frozenset(), nothing_learned, loss))
    batch = jax.tree.map(jnp.asarray, step_lib.join(made.sources["train"].batch(0), made.constants))
    state = step_lib.init_state(made, batch)
    assert (state.estimator, state.params["head"]) == ({}, {"prototypes": {}, "objective": {}})
    assert float(step_lib.step(made, state, batch)[0].params["encoder"]["shift"][0]) != 1.0


def test_what_does_not_fit_is_said_before_anything_is_computed(tmp_path):
    def growing(S, stats, rows, step, key):
        return {**S, "shared": {"mean": jnp.zeros(D + 1)}}, {}

    made = recipe()
    bad = made._replace(estimator=made.estimator._replace(update=growing))
    loss = lambda p, i: (0.0 * i["student"]["text"][0, 0], {"loss": once(0.0, i["mask"])})  # noqa: E731
    bad = bad._replace(objective=Objective(frozenset(), made.objective.init, loss))
    with pytest.raises(TypeError, match=r"changes estimator/shared/mean: float32 \[3\] becomes float32 \[4\]"):
        train.run(bad, options(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_the_stopping_rule_counts_from_the_last_rise(tmp_path):
    rising = iter([9.0, 1.0, 2.0, 2.0, 1.5, 3.0, 0.0, 0.0])  # the first is the untrained evaluation, which never counts
    made = recipe(evaluations=(Evaluation("v", lambda probe, key: {"v": {"x": next(rising)}}),), total_steps=8,
                  stopping=Stopping("v/x", 2))  # fmt: skip
    chosen = options(tmp_path)._replace(eval_every=0.125)
    assert train.run(made, chosen).step == 4
