"""Predictions of a trained classifier of label distributions: `protojax.load(workdir).predict(columns)`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.special import log_softmax

from protojax import parallel, probing
from protojax import step as step_lib
from protojax.api import Recipe, TrainState
from protojax.config import Config
from protojax.data import tables
from protojax.workloads import table_description


class Predict:
    """A trained model. Call it, or `.predict`, on columns by name (or image arrays) of any number of samples.

    categories: names of the C outputs. temperature: the calibration temperature of the run (1 where none was fitted).
    """

    def __init__(self, recipe: Recipe, state: TrainState, config: Config, workdir: Path, batch_size: int = 4096):
        known = table_description.read(workdir)
        self.config, self.step, self.batch_size = config, int(state.step), batch_size
        self.categories: tuple[str, ...] = tuple(known["categories"])
        self.preparation = known["preparation"]
        self.temperature = _temperature(workdir)
        _, self._variables, _ = step_lib.observer(recipe, state)
        self._forward = probing.make_forward(recipe, parallel.make_mesh(1, 1, devices=jax.devices()[:1]))

    def predict(
        self,
        columns: Mapping[str, np.ndarray] | None = None,
        *,
        graph: Mapping[str, np.ndarray] | None = None,
        images: np.ndarray | None = None,
        calibrated: bool = False,
    ) -> np.ndarray:
        """Probabilities float64 [N,C].

        columns: raw, as in training (name -> [N]); they are prepared with the statistics of the training split. graph:
        'neighbours' [N,S,columns], 'edges', 'neighbour_mask' for a star_graph. calibrated: divide logits by the
        temperature fitted on validation. Raises ValueError for missing columns, NaN or unseen levels.
        """
        arrays: dict[str, np.ndarray] = {}
        if columns is not None and self.preparation is not None:
            arrays["features"] = tables.apply_preparation(self.preparation, columns)
        if graph:
            assert columns is not None
            around = np.asarray(graph["neighbours"])
            flat = tables.numeric(list(columns), around.reshape(-1, around.shape[-1]))
            prepared = tables.apply_preparation(self.preparation, flat, "neighbours")
            arrays["neighbours"] = prepared.reshape(*around.shape[:2], -1)
            arrays["edges"] = np.asarray(graph["edges"], np.float32)
            arrays["neighbour_mask"] = np.asarray(graph["neighbour_mask"], bool)
        if images is not None:
            arrays["image"] = np.asarray(images)
        if not arrays:
            raise ValueError("predict: expected columns (a table) or images, got neither.")
        count = len(next(iter(arrays.values())))
        logits = [self._logits({k: v[i : i + self.batch_size] for k, v in arrays.items()})
                  for i in range(0, count, self.batch_size)]  # fmt: skip
        temperature = self.temperature if calibrated else 1.0
        return np.exp(log_softmax(np.concatenate(logits).astype(np.float64) / temperature, axis=1))

    __call__ = predict

    def _logits(self, batch: dict[str, Any]) -> np.ndarray:
        count = len(next(iter(batch.values())))
        return np.asarray(self._forward(self._variables, {**batch, "mask": np.ones(count, bool)})["logits"])


def _temperature(workdir: Path) -> float:
    """The calibration temperature in summary.json; 1 where the run has none yet."""
    path = Path(workdir) / "summary.json"
    if not path.exists():
        return 1.0
    found = json.loads(path.read_text()).get("soft_labels", {}).get("calibrated", {}).get("temperature")
    return 1.0 if found is None else float(found)


def ensemble(models: Sequence[Predict], columns: Mapping[str, np.ndarray], **options: Any) -> np.ndarray:
    """Mean of the probabilities [N,C] of several runs. Raises ValueError when their categories differ."""
    if not models:
        raise ValueError("ensemble: expected at least one model, got none.")
    names = [m.categories for m in models]
    if any(n != names[0] for n in names):
        raise ValueError(f"ensemble: the runs do not have the same categories: {sorted(set(names))}.")
    return np.mean([m.predict(columns, **options) for m in models], axis=0)
