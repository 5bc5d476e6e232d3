"""One process of a run of several: real data, estimator, objective, loop and checkpoints around a linear encoder.

python -m tests.process_worker WORKDIR [KEY=VALUE ...]        keys of `toy_config`, as in method__steps=6; pause=SECONDS
                                                              before every batch, for who wants to come in between
"""

from __future__ import annotations

import ast
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from protojax import running, train
from protojax import session as session_lib
from protojax.api import Encoder, Evaluation, Recipe
from protojax.checkpoint import check_writable
from protojax.errors import guarded
from tests.toy import toy_config

WIDTH, DIM = 12, 8


def _coarse(batch: dict[str, Any]) -> jax.Array:
    """[B, 48]: mean colours of a 4x4 grid, in [-1, 1]."""
    image = batch["image"].astype(jnp.float32) / 127.5 - 1.0
    count, side = image.shape[0], image.shape[1] // 4
    return jnp.mean(image.reshape(count, 4, side, 4, side, 3), axis=(2, 4)).reshape(count, 48)


def _views(key: jax.Array, batch: dict[str, Any]) -> dict[str, jax.Array]:
    flat = _coarse(batch)
    return {"x": flat[None] + 0.1 * jax.random.normal(key, (2, *flat.shape), jnp.float32)}


def _init(key: jax.Array, inputs: dict[str, jax.Array]) -> dict[str, Any]:
    keys = jax.random.split(key)
    first = jax.random.normal(keys[0], (inputs["x"].shape[-1], WIDTH), jnp.float32) / 7.0
    return {"params": {"net": {"a": first, "b": jax.random.normal(keys[1], (WIDTH, DIM), jnp.float32)}}, "stats": {}}


def _apply(variables: Any, inputs: Any, training: bool, key: Any) -> tuple[dict[str, jax.Array], Any]:
    net = variables["params"]["net"]
    hidden = jnp.tanh(inputs["x"] @ net["a"])
    return {"backbone": hidden, "image": hidden @ net["b"]}, variables["stats"]


def _looks(probe: Any, key: Any) -> dict[str, Any]:
    bank = probe.bank("test")
    return {"toy": {"rows": len(bank.image), "mean": float(bank.image.mean())}}


def linear(recipe: Recipe) -> Recipe:
    """The recipe with an encoder that compiles at once."""
    encoder = Encoder(_init, _apply)
    return recipe._replace(
        views=_views, teacher_views=lambda inputs: inputs, plain_view=lambda batch: {"x": _coarse(batch)[None]},
        encoder=encoder, teacher=encoder, evaluations=(Evaluation("toy", _looks),), diagnose=lambda records: [],
    )  # fmt: skip


def _slow(recipe: Recipe, pause: float) -> Recipe:
    source = recipe.sources["train"]

    def batch(step: int) -> Any:
        time.sleep(pause)
        return source.batch(step)

    return recipe._replace(sources={**recipe.sources, "train": source._replace(batch=batch)}) if pause else recipe


def main(arguments: list[str]) -> int:
    workdir = Path(arguments[0])
    changes: dict[str, Any] = {
        "run__log_every": 1, "run__checkpoint_every": 0.5, "system__platform": "cpu", "data__batch_size": 16,
        "evals__batch_size": 16,
    }  # fmt: skip
    for text in arguments[1:]:
        key, _, value = text.partition("=")
        try:
            changes[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[key] = value
    pause = changes.pop("pause", 0.0)
    config = toy_config(**changes)

    def body() -> int:
        check_writable(workdir)
        recipe = _slow(linear(running.build(config)), pause)
        options = session_lib.Options(
            workdir, config.run, config.system, config.evals.every, running.fingerprint(config),
            say=lambda text: print(text, flush=True),
        )  # fmt: skip
        result = train.run(recipe, options)
        print(f"ended at step {result.step}", flush=True)
        return 0

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
