"""A trained encoder for other code: `protojax.load(workdir).encode(images) -> features`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from protojax import experiment, metrics, parallel, probing
from protojax import session as session_lib
from protojax import step as step_lib
from protojax.api import Recipe, TrainState
from protojax.checkpoint import BEST, NEWEST, Checkpoints
from protojax.config import Config, freeze


class Encode:
    """A frozen teacher. Call it, or `.encode`, on uint8 images [N,H,W,3] of any N; `.prototypes` is the codebook [K,D].

    encode(images, output='backbone') -> float32 [N,F]; output='image' gives the projection [N,D] that the prototypes
    live in. Raises TypeError for images that are not uint8 and ValueError for another shape.
    """

    def __init__(self, recipe: Recipe, state: TrainState, config: Config, batch_size: int = 256):
        self.config, self.step, self.batch_size = config, int(state.step), batch_size
        _, self._variables, head = step_lib.observer(recipe, state)
        target, _ = step_lib.codebooks(recipe, state.estimator, head, head)
        described = {} if recipe.estimator is None else recipe.describe(state.estimator)
        book, _ = probing.in_use(jax.tree.map(np.asarray, target), {k: np.asarray(v) for k, v in described.items()})
        assert book is not None
        self.prototypes = book.prototypes
        self._forward = probing.make_forward(recipe, parallel.make_mesh(1, 1, devices=jax.devices()[:1]))

    def encode(self, images: np.ndarray, output: str = "backbone") -> np.ndarray:
        images = np.asarray(images)
        if images.dtype != np.uint8:
            raise TypeError(f"images: expected uint8 in 0..255, got {images.dtype}.")
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected [N,H,W,3], got {list(images.shape)}; use images[None] for one image.")
        if not len(images):
            raise ValueError("images: expected at least one image, got none.")
        out = []
        for begin in range(0, len(images), self.batch_size):
            part = images[begin : begin + self.batch_size]
            missing = self.batch_size - len(part) if len(images) > self.batch_size else 0
            padded = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.uint8)]) if missing else part
            embeddings = self._forward(self._variables, {"image": jnp.asarray(padded)})
            if output not in embeddings:
                raise ValueError(f"output: expected one of {sorted(embeddings)}, got {output!r}.")
            out.append(np.asarray(embeddings[output])[: len(part)])
        return np.concatenate(out)

    __call__ = encode


def read_config(workdir: Path | str) -> Config:
    """The configuration that a run was made with. Raises FileNotFoundError when there is none."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {workdir} is not the workdir of a protojax run.")
    try:
        plain = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it does not hold the configuration of a run.") from None
    return freeze(plain)


def restore(workdir: Path | str, step: int | str | None = None) -> tuple[Config, session_lib.Session, TrainState]:
    """Config, session and state of a checkpoint of a run (default: the newest; 'best'), on this machine's mesh."""
    config = read_config(workdir)
    options = session_lib.Options(Path(workdir), config.run, config.system, config.evals.every, {})
    session = session_lib.make_session(experiment.build(config), options)
    return config, session, _read(workdir, config, step, session.shapes, session.shardings)


def _read(workdir: Path | str, config: Config, step: int | str | None, shapes: Any, shardings: Any) -> TrainState:
    folder = Path(workdir) / (BEST if step == BEST else NEWEST)
    if step == BEST and not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: this run keeps no best checkpoint. run.best names the metric that would choose it."
        )
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise FileNotFoundError(f"{checkpoints.directory} holds no checkpoint: has the run started?")
        if isinstance(step, int) and step not in steps:
            raise ValueError(f"no checkpoint at step {step} in {checkpoints.directory}; there are {steps}.")
        return checkpoints.restore(step if isinstance(step, int) else steps[-1], shapes, shardings)
    finally:
        checkpoints.close()


def load(workdir: Path | str, step: int | str | None = None) -> Any:
    """The model of a run on one device: a frozen image encoder (`Encode`) or what the run's workload makes of it.

    Neither the training data nor the devices of the run are needed. step: that of a checkpoint (default: the newest),
    or 'best', the one that `run.best` kept.

    Raises FileNotFoundError when there is no run or no checkpoint, ValueError for a step that was not kept,
    CheckpointError when the checkpoint is damaged.
    """
    config, recipe, state = bare(workdir, step)
    workload = experiment.workload(config.method.workload)
    return workload.loaded(recipe, jax.device_put(state, jax.devices()[0]), config, Path(workdir))


def bare(workdir: Path | str, step: int | str | None = None) -> tuple[Config, Recipe, TrainState]:
    """Configuration, a recipe without the run's data, and the state of a checkpoint. Raises as `load`."""
    config = read_config(workdir)
    recipe = experiment.workload(config.method.workload).hollow(config, Path(workdir))
    example = step_lib.join(recipe.sources["train"].batch(0), recipe.constants)
    shapes = jax.eval_shape(lambda b: step_lib.init_state(recipe, b), example)
    return config, recipe, _read(workdir, config, step, shapes, None)


def evaluate(workdir: Path | str, step: int | str | None = None) -> dict[str, Any]:
    """The run's own evaluations on a checkpoint: the same numbers as in training."""
    _, session, state = restore(workdir, step)
    records = metrics.read_records(Path(workdir) / "metrics.jsonl")
    initial = metrics.evaluated(records, 0) or {}
    probe = probing.make_probe(session.recipe, session.forward, state, session.mesh, initial, session.constants)
    return {"step": probe.step, **probing.run_evaluations(session.recipe, probe)}
