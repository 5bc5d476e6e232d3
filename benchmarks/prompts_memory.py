"""What a step at 10,000 classes of 32 sub-prompts needs, read from the compiled program: nothing is allocated."""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from protojax import configs_path, experiment
from protojax import step as step_lib
from protojax.config import freeze
from protojax.objectives.prompts import PromptData, PromptOptions, prompt_loss

CLASSES, COUNT, WIDTH, BATCH, IMAGES = 10_000, 32, 512, 96, 330_000
GIB = 2**30


def memory_record() -> dict[str, Any]:
    """A record with 'final': `measure` and the sizes of the problem."""
    began = time.perf_counter()
    found = measure()
    sizes = {"classes": CLASSES, "prompts": COUNT, "width": WIDTH, "batch": BATCH, "images": IMAGES}
    return {"preset": "memory", "arm": "", "seed": 0, "command": "python -m benchmarks.prompts --jobs memory",
            "seconds": round(time.perf_counter() - began, 1), "final": {**found, **sizes}, "findings": {},
            "jax": jax.__version__}  # fmt: skip


def measure(classes: int = CLASSES, images: int = IMAGES) -> dict[str, float]:
    """Sizes in GiB. Of the loss and its gradient, which is the program's result: extra_gib, its temporaries. Of the
    loop's own step (estimator, gradient, Adam, logged norms; state donated): step_temporaries_gib, whole_gib."""
    recipe = _small_recipe()
    f32, i32 = (partial(_shape, dtype=d) for d in (jnp.float32, jnp.int32))
    constants = {
        "features": f32(images, WIDTH), "base": f32(classes, WIDTH), "class_mean": f32(classes, WIDTH),
        "centre": f32(classes, WIDTH), "train_label": i32(images), "class_counts": i32(classes),
    }  # fmt: skip
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, recipe.sources["train"].batch(0)))
    state = jax.eval_shape(lambda b, c: step_lib.init_state(recipe, step_lib.join(b, c)), batch, constants)

    def step(state: Any, batch: Any, constants: Any) -> Any:
        return step_lib.step(recipe, state, step_lib.join(batch, constants))[:2]

    whole = jax.jit(step, donate_argnums=0).lower(state, batch, constants).compile().memory_analysis()
    data = PromptData(f32(BATCH, WIDTH), i32(BATCH), _shape(BATCH, dtype=bool), f32(classes, WIDTH),
                      f32(classes, WIDTH), f32(classes, COUNT))  # fmt: skip
    options = PromptOptions()
    gradient = jax.jit(jax.grad(lambda offsets, data: prompt_loss(offsets, data, options, 0.5)[0]))
    scored = gradient.lower(f32(classes, COUNT, WIDTH), data).compile().memory_analysis()
    return {
        "extra_gib": scored.temp_size_in_bytes / GIB,
        "gradient_gib": scored.output_size_in_bytes / GIB,
        "step_temporaries_gib": whole.temp_size_in_bytes / GIB,
        "state_gib": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / GIB,
        "features_gib": 4 * images * WIDTH / GIB,
        # The state is donated: its memory becomes the new one's, and is counted once.
        "whole_gib": (whole.argument_size_in_bytes + whole.temp_size_in_bytes
                      + max(whole.output_size_in_bytes - whole.alias_size_in_bytes, 0)) / GIB,
    }  # fmt: skip


def _small_recipe() -> Any:
    """The default arm on four classes: its functions are those of any number of classes."""
    config = configs_path.function_of(configs_path.find("prompts_synthetic"), "get_config", "argument", "config")
    cfg = config("default,wide")
    cfg.data.source.classes, cfg.data.source.train, cfg.data.source.test = 4, COUNT, 4
    cfg.data.batch_size = BATCH
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return experiment.build(freeze(cfg))


def _shape(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
