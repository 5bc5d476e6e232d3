"""The evaluations by name: what `config.evals.evaluations` and a protocol file choose from.

An entry is a function (setting, **options) -> Evaluation; its keyword options are those of the protocol file.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from protojax.api import Evaluation, SourceSpec
from protojax.config import check_options, options_of
from protojax.evals import evaluations as ours
from protojax.evals import few_shot, labelled, linear
from protojax.evals.asked import Groups
from protojax.evals.audit import EPSILONS
from protojax.evals.knn import DEFAULT_KS
from protojax.evals.retrieval import DEFAULT_RECALLS


class Setting(NamedTuple):
    """What all evaluations share: the splits, the labels and their groups, k, temperature and seed of a protocol.
    reading: how the estimator reads features, 'raw' or 'unit'."""

    specs: Mapping[str, SourceSpec]
    labels: tuple[str, ...] = ()
    groups: Groups = types.MappingProxyType({})
    ks: tuple[int, ...] = DEFAULT_KS
    temperature: float = 0.07
    seed: int = 0
    reading: str = "raw"


def _labelled(setting: Setting) -> dict[str, Any]:
    return {"specs": setting.specs, "label_keys": setting.labels}


def _knn(setting: Setting, *, clamp: bool = False) -> Evaluation:
    return ours.knn_evaluation(
        **_labelled(setting), ks=setting.ks, temperature=setting.temperature, groups=setting.groups, clamp=clamp
    )


def _softmax(
    setting: Setting,
    *,
    learning_rates: Sequence[float] = linear.LEARNING_RATES,
    decays: Sequence[float] = linear.DECAYS,
    steps: int = 1000,
    batch_size: int = 256,
    held_out: float = 0.1,
) -> Evaluation:
    return labelled.linear_evaluation(
        **_labelled(setting), groups=setting.groups, seed=setting.seed, learning_rates=learning_rates, decays=decays,
        steps=steps, batch_size=batch_size, held_out=held_out,
    )  # fmt: skip


def _closed(
    method: Literal["ridge", "logistic"],
    setting: Setting,
    *,
    decays: Sequence[float],
    held_out: float = 0.1,
) -> Evaluation:
    return labelled.linear_evaluation(
        **_labelled(setting), groups=setting.groups, seed=setting.seed, method=method, name=method,
        decays=decays, held_out=held_out,
    )  # fmt: skip


def _few_shot(
    setting: Setting,
    *,
    shots: Sequence[int] = few_shot.SHOTS,
    seeds: Sequence[int] = few_shot.SEEDS,
    classifier: few_shot.Classifier = "centroid",
    decay: float = 1e-3,
) -> Evaluation:
    return labelled.few_shot_evaluation(
        **_labelled(setting), shots=shots, seeds=[setting.seed + s for s in seeds], classifier=classifier, decay=decay
    )


def _retrieval(setting: Setting, *, ks: Sequence[int] = DEFAULT_RECALLS) -> Evaluation:
    return labelled.retrieval_evaluation(**_labelled(setting), ks=ks)


def _kmeans(setting: Setting, *, clusters: int | None = None, restarts: int = 3, iterations: int = 100) -> Evaluation:
    return labelled.kmeans_evaluation(
        **_labelled(setting), clusters=clusters, restarts=restarts, iterations=iterations, seed=setting.seed
    )


def _calibration(
    setting: Setting, *, bins: int = 15, decays: Sequence[float] = linear.LOGISTIC_DECAYS, held_out: float = 0.1
) -> Evaluation:
    return labelled.calibration_evaluation(
        **_labelled(setting), bins=bins, decays=decays, held_out=held_out, seed=setting.seed
    )


def _clustering(setting: Setting) -> Evaluation:
    return ours.clustering_evaluation(**_labelled(setting), reading=setting.reading)


def _prototypes(setting: Setting, *, epsilons: Sequence[float] = EPSILONS) -> Evaluation:
    return ours.audit_evaluation(seed=setting.seed, reading=setting.reading, epsilons=epsilons)


def _attainable(setting: Setting, *, iterations: int = 50) -> Evaluation:
    return ours.attainable_evaluation(seed=setting.seed, reading=setting.reading, iterations=iterations)


def _rank(setting: Setting) -> Evaluation:
    return ours.rank_evaluation()


def _geometry(setting: Setting, *, views: int = 0, images: int = 1000) -> Evaluation:
    return ours.geometry_evaluation(views=views, images=images, seed=setting.seed)


EVALUATIONS: Mapping[str, Callable[..., Evaluation]] = {
    "knn": _knn,
    "linear": _softmax,
    "ridge": functools.partial(_closed, "ridge", decays=linear.RIDGE_DECAYS),
    "logistic": functools.partial(_closed, "logistic", decays=linear.LOGISTIC_DECAYS),
    "few_shot": _few_shot,
    "retrieval": _retrieval,
    "clustering": _clustering,
    "kmeans": _kmeans,
    "calibration": _calibration,
    "prototypes": _prototypes,
    "attainable": _attainable,
    "rank": _rank,
    "geometry": _geometry,
}
NEEDS_LABELS = frozenset(EVALUATIONS) - {"prototypes", "attainable", "rank", "geometry"}
NEEDS_CODEBOOK = frozenset({"prototypes", "attainable", "clustering"})


def resolved(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of an evaluation, as given or at its default. Raises ValueError or TypeError for an unknown name or
    option (with the nearest one) or a value of another type."""
    check_options("evaluation", name, EVALUATIONS, options, ("setting",))
    known = {k: p for k, p in options_of(EVALUATIONS[name]).items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {k: options.get(k, p.default) for k, p in known.items()}


def make_evaluations(chosen: Mapping[str, Mapping[str, Any]], setting: Setting) -> tuple[Evaluation, ...]:
    """The evaluations `chosen` (name -> options), in that order; those that need labels are left out without labels.

    Raises ValueError or TypeError for what can be known to be wrong before anything is computed.
    """
    made = []
    for name, options in chosen.items():
        options = resolved(name, options)
        if setting.labels or name not in NEEDS_LABELS:
            made.append(EVALUATIONS[name](setting, **options))
    return tuple(made)
