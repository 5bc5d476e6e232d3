"""The evaluations of prototypical self-supervision as :class:`protojax.api.Evaluation`.

Each `run` returns its own top-level keys in the shape of `summary.json`, so that the results of several evaluations
can be put into one record: `knn`, `groups` and `groups_macro`; `prototypes` and `controls`; `effective_rank` and
`rank`; `clustering`. What can be wrong with labels, splits and k is found when an evaluation is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from protojax.api import Evaluation, FeatureBank, Key, Probe, SourceSpec
from protojax.evals import audit as audit_lib
from protojax.evals.clustering import clustering_scores
from protojax.evals.knn import DEFAULT_KS, accuracy_by_group, check_ks, knn_accuracy
from protojax.evals.neighbours import unit_rows
from protojax.evals.rank import rank_summary

Groups = Mapping[str, Mapping[str, Sequence[int] | np.ndarray]]  # label key -> group name -> class ids
REPORTED_K = 20


def knn_evaluation(
    specs: Mapping[str, SourceSpec],
    *,
    bank_split: str = "bank",
    test_split: str = "test",
    label_keys: Sequence[str] = ("fine",),
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = 0.07,
    groups: Groups | None = None,
    group_k: int | None = None,
    clamp: bool = False,
    name: str = "knn",
) -> Evaluation:
    """k-NN accuracy of backbone features, `bank_split` classifying `test_split`.

    Returns {'knn': {label: {str(k): accuracy}}, 'groups': {label: {group: accuracy over its queries}}, 'groups_macro':
    {label: {group: mean over its classes, 'all': over all classes}}}; an empty group is None. Groups are for
    `group_k` neighbours: as given, else 20 where it is in `ks`, else the largest below 20, else the smallest.

    Raises ValueError when a split or label is missing, the two splits are one, k is larger than the bank (unless
    `clamp`), or a group names a class that does not exist.
    """
    bank_spec, test_spec = (_split_spec(specs, split, name) for split in (bank_split, test_split))
    if bank_split == test_split:
        raise ValueError(
            f"evaluation {name!r}: bank and test are both {bank_split!r}, so that every image would be its own nearest "
            "neighbour; give two splits."
        )
    classes = {label: _class_count(bank_spec, test_spec, label, name) for label in _some(label_keys, name)}
    check_ks(ks, bank_spec.size, clamp)
    groups = {} if groups is None else groups
    for label, members in groups.items():
        _check_groups(label, members, classes, name)
    reported = _reported_k(ks) if group_k is None else int(group_k)
    if reported not in set(ks):
        raise ValueError(f"evaluation {name!r}: group_k = {reported} is not one of ks = {tuple(ks)}.")

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        bank, test = probe.bank(bank_split), probe.bank(test_split)
        result: dict[str, Any] = {"knn": {}, "groups": {}, "groups_macro": {}}
        for label, count in classes.items():
            accuracy, correct = knn_accuracy(
                bank.backbone, bank.labels[label], test.backbone, test.labels[label], num_classes=count,
                ks=ks, temperature=temperature, clamp=clamp,
            )  # fmt: skip
            result["knn"][label] = {str(k): value for k, value in accuracy.items()}
            if label in groups:
                scores = accuracy_by_group(correct[reported], test.labels[label], groups[label])
                result["groups"][label] = {group: scores[group] for group in groups[label]}
                result["groups_macro"][label] = {**scores["macro"], "all": scores["balanced"]}
        return result

    return Evaluation(name, run)


def audit_evaluation(
    *,
    split: str = "bank",
    epsilons: Sequence[float] = audit_lib.EPSILONS,
    seed: int = 0,
    reading: str = "raw",
    name: str = "prototypes",
) -> Evaluation:
    """Prototype audit of the teacher's codebook against the features of all training images (`evals.audit`).

    Returns {'prototypes': the audit, 'controls': {'random_unique', and of the same audit right after initialisation
    'initial_unique', 'initial_live', 'initial_live_unique', 'initial_perplexity', 'initial_coverage'}}. Of
    `probe.info` it takes 'center' [D] (what the estimator subtracts from features) and 'usage' [K] (the estimator's
    own usage, shown as prototypes.estimator, never instead of the measured one). reading: how the estimator reads
    features before it subtracts its centre, 'raw' or 'unit' (normalised first).

    Raises ValueError for another reading; `run` does when the probe has no codebook.
    """
    _check_reading(reading, name)

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        if probe.codebook is None:
            raise ValueError(f"evaluation {name!r} needs prototypes, but this checkpoint has no codebook.")
        result = audit_lib.audit(
            np.asarray(probe.codebook.prototypes),
            _estimator_rows(probe.bank(split), reading),
            center=_optional(probe.info, "center"),
            epsilons=epsilons,
            seed=seed,
        )
        own = _optional(probe.info, "usage")
        if own is not None:
            result["estimator"] = {
                "live": int(audit_lib.live_mask(own / max(own.sum(), np.finfo(np.float64).tiny)).sum()),
                "perplexity": audit_lib.perplexity(own),
            }
        first = probe.initial.get("prototypes") or result
        names = ("unique", "live", "live_unique", "perplexity", "coverage")
        controls = {"random_unique": result.pop("control"), **{f"initial_{n}": first[n] for n in names}}
        return {"prototypes": result, "controls": controls}

    return Evaluation(name, run)


def rank_evaluation(*, split: str = "bank", name: str = "rank") -> Evaluation:
    """Effective rank of the teacher's features.

    Returns {'effective_rank': of the centred `image` features (the space of the prototypes), 'rank': {'image':
    `rank.rank_summary`, 'backbone': the same}}.
    """

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        bank = probe.bank(split)
        ranks = {"image": rank_summary(bank.image), "backbone": rank_summary(bank.backbone)}
        return {"effective_rank": ranks["image"]["effective"], "rank": ranks}

    return Evaluation(name, run)


def clustering_evaluation(
    specs: Mapping[str, SourceSpec],
    *,
    split: str = "bank",
    label_keys: Sequence[str] = ("fine",),
    reading: str = "raw",
    name: str = "clustering",
) -> Evaluation:
    """Agreement of the nearest-prototype assignment with labels: {'clustering': {label: {'nmi', 'ari', 'hungarian',
    'purity'}}}; rows without direction are a cluster of their own. Raises ValueError for a missing split or label."""
    _check_reading(reading, name)
    spec = _split_spec(specs, split, name)
    for label in _some(label_keys, name):
        _class_count(spec, spec, label, name)

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        if probe.codebook is None:
            raise ValueError(f"evaluation {name!r} needs prototypes, but this checkpoint has no codebook.")
        bank = probe.bank(split)
        rows, center = _estimator_rows(bank, reading), _optional(probe.info, "center")
        nearest = audit_lib.usage(np.asarray(probe.codebook.prototypes), rows, center=center).nearest
        return {"clustering": {label: clustering_scores(bank.labels[label], nearest) for label in label_keys}}

    return Evaluation(name, run)


# --------------------------------------------------------------------------------------------------- helpers
def _estimator_rows(bank: FeatureBank, reading: str) -> np.ndarray:
    return unit_rows(bank.image).astype(np.float32) if reading == "unit" else bank.image


def _check_reading(reading: str, name: str) -> None:
    if reading not in ("raw", "unit"):
        raise ValueError(f"evaluation {name!r}: reading must be 'raw' or 'unit', got {reading!r}.")


def _optional(info: Mapping[str, Any], name: str) -> np.ndarray | None:
    value = info.get(name)
    return None if value is None else np.asarray(value, np.float64)


def _reported_k(ks: Sequence[int]) -> int:
    below = [k for k in ks if k <= REPORTED_K]
    return max(below) if below else min(ks)


def _some(label_keys: Sequence[str], name: str) -> tuple[str, ...]:
    if isinstance(label_keys, str) or not label_keys:
        raise ValueError(f"evaluation {name!r}: label_keys must be a non-empty list of names, got {label_keys!r}.")
    return tuple(label_keys)


def _split_spec(specs: Mapping[str, SourceSpec], split: str, name: str) -> SourceSpec:
    if split not in specs:
        raise ValueError(f"evaluation {name!r} needs the split {split!r}; this recipe has {sorted(specs)}.")
    if specs[split].size < 1:
        raise ValueError(f"evaluation {name!r}: the split {split!r} of {specs[split].name!r} is empty.")
    return specs[split]


def _class_count(bank: SourceSpec, test: SourceSpec, label: str, name: str) -> int:
    for spec in (bank, test):
        if label not in spec.classes:
            known = sorted(spec.classes)
            raise ValueError(
                f"evaluation {name!r} needs labels {label!r}, but the source {spec.name!r} has "
                f"{known if known else 'no labels'}. Name labels that it has in config.evals.labels, or leave the "
                "evaluation out."
            )
    if tuple(bank.classes[label]) != tuple(test.classes[label]):
        raise ValueError(
            f"evaluation {name!r}: labels {label!r} of {bank.name!r} ({len(bank.classes[label])} classes) and of "
            f"{test.name!r} ({len(test.classes[label])} classes) do not have the same classes in the same order."
        )
    return len(bank.classes[label])


def _check_groups(label: str, members: Mapping[str, Any], classes: Mapping[str, int], name: str) -> None:
    if label not in classes:
        raise ValueError(f"evaluation {name!r}: groups are given for {label!r}, but label_keys are {sorted(classes)}.")
    ids = np.concatenate([np.zeros(0, np.int64), *(np.asarray(m, np.int64).ravel() for m in members.values())])
    bad = ids[(ids < 0) | (ids >= classes[label])]
    if bad.size:
        raise ValueError(
            f"evaluation {name!r}: groups of {label!r} name the classes {bad.tolist()}, but there are {classes[label]}."
        )
