"""The evaluations of prototypical self-supervision as :class:`protojax.api.Evaluation`.

Each `run` returns its own top-level keys in the shape of `summary.json`, so that the results of several evaluations
can be put into one record: `knn`, `groups` and `groups_macro`; `prototypes` and `controls`; `effective_rank` and
`rank`; `clustering`; `attainable`. What can be wrong with labels, splits and k is found when an evaluation is built.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from protojax.api import Evaluation, FeatureBank, Key, Probe, SourceSpec
from protojax.evals import audit as audit_lib
from protojax.evals.asked import Groups, check_groups, class_count, class_counts, in_order, some_labels, split_spec
from protojax.evals.attainable import attainable
from protojax.evals.clustering import clustering_scores
from protojax.evals.geometry import alignment, lidar, uniformity
from protojax.evals.knn import DEFAULT_KS, accuracy_by_group, check_ks, knn_accuracy
from protojax.evals.neighbours import unit_rows
from protojax.evals.rank import rank_summary

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
    classes = class_counts(specs, bank_split, test_split, label_keys, name)
    check_ks(ks, specs[bank_split].size, clamp)
    groups = {} if groups is None else groups
    for label, members in groups.items():
        check_groups(label, members, classes, name)
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
    own usage, shown as prototypes.estimator, never instead of the measured one), and 'active' [K] where the data decide
    the number of prototypes: 'prototypes' then has 'active', how many are on, and 'slots', how many could be. reading:
    how the estimator reads features before it subtracts its centre, 'raw' or 'unit' (normalised first).

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
        active = probe.info.get("active")
        if active is not None:  # the codebook of a probe holds these alone
            result |= {"active": int(np.sum(active)), "slots": len(active)}
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
    'purity', 'pair_precision'}}}; rows without direction are a cluster of their own. Raises ValueError for a missing
    split or label."""
    _check_reading(reading, name)
    spec = split_spec(specs, split, name)
    for label in some_labels(label_keys, name):
        class_count(spec, spec, label, name)

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        if probe.codebook is None:
            raise ValueError(f"evaluation {name!r} needs prototypes, but this checkpoint has no codebook.")
        bank = probe.bank(split)
        rows, center = _estimator_rows(bank, reading), _optional(probe.info, "center")
        nearest = audit_lib.usage(np.asarray(probe.codebook.prototypes), rows, center=center).nearest
        return {"clustering": {label: clustering_scores(bank.labels[label], nearest) for label in label_keys}}

    return Evaluation(name, run)


def attainable_evaluation(
    *,
    split: str = "bank",
    reading: str = "raw",
    iterations: int = 50,
    seed: int = 0,
    name: str = "attainable",
) -> Evaluation:
    """What live-unique counts could be on these features: {name: `attainable.attainable`} for as many centres as there
    are prototypes, on the rows that the audit reads (reading and centre as in `audit_evaluation`).

    Raises ValueError for another reading; `run` does when the probe has no codebook."""
    _check_reading(reading, name)

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        if probe.codebook is None:
            raise ValueError(f"evaluation {name!r} needs prototypes, but this checkpoint has no codebook.")
        rows, center = _estimator_rows(in_order(probe.bank(split)), reading), _optional(probe.info, "center")
        rows = rows if center is None else (rows - center[None, :]).astype(np.float32)
        return {name: attainable(rows, len(probe.codebook.prototypes), seed=seed, iterations=iterations)}

    return Evaluation(name, run)


def views_split(split: str, images: int, views: int, seed: int) -> str:
    """The name under which a probe keeps `views` random views of `images` images of a split, drawn by `seed`."""
    return f"{split}: {views} views of {images} images, seed {seed}"


def parse_views(name: str) -> tuple[str, int, int, int] | None:
    """(split, images, views, seed) of such a name, or None for any other."""
    match = re.fullmatch(r"(.+): (\d+) views of (\d+) images, seed (\d+)", name)
    return None if match is None else (match[1], int(match[3]), int(match[2]), int(match[4]))


def geometry_evaluation(
    *, split: str = "bank", views: int = 0, images: int = 1000, seed: int = 0, name: str = "geometry"
) -> Evaluation:
    """Uniformity of a split, and, with `views` >= 2 random views of `images` of its images, alignment and LiDAR.

    Returns {name: {'uniformity': {'image', 'backbone'}, 'alignment': the same, 'lidar': the same}}; None without views.
    Views need a network: they are there in `protojax eval`, not in training. They are asked of the probe as the bank
    `views_split(...)`, whose `extra` holds 'views/image' [M,V,D] and 'views/backbone' [M,V,F]. Raises ValueError for
    one view or fewer than two images.
    """
    if views < 0 or views == 1 or images < 2:
        raise ValueError(f"evaluation {name!r}: expected views 0 or >= 2 and images >= 2, got {views} and {images}.")

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        bank = in_order(probe.bank(split))
        spaces = {"image": bank.image, "backbone": bank.backbone}
        seen: dict[str, np.ndarray | None] = dict.fromkeys(spaces)
        result: dict[str, Any] = {"uniformity": {k: uniformity(v) for k, v in spaces.items()}}
        if views:
            some = probe.bank(views_split(split, images, views, seed)).extra
            seen = {k: some[f"views/{k}"] for k in spaces}
        result["alignment"] = {k: None if v is None else alignment(v) for k, v in seen.items()}
        result["lidar"] = {k: None if v is None else lidar(v) for k, v in seen.items()}
        return {name: result}

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
