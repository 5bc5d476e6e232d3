"""Evaluations that learn from a labelled bank and are scored on a test split, as :class:`protojax.api.Evaluation`.

All take `specs` (what the splits hold), `bank_split`, `test_split` and `label_keys`, and raise ValueError when they are
built where a split or label is missing or the two splits are one. They look at backbone features in the order of the
split, so that what a seed draws does not depend on how the features were gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from protojax.api import Evaluation, FeatureBank, Key, Probe, SourceSpec
from protojax.evals import few_shot, linear
from protojax.evals.asked import Groups, check_groups, class_counts, in_order
from protojax.evals.calibration import calibration_scores, fit_temperature, reliability
from protojax.evals.clustering import clustering_scores
from protojax.evals.kmeans import kmeans
from protojax.evals.knn import accuracy_by_group
from protojax.evals.neighbours import unit_rows
from protojax.evals.retrieval import DEFAULT_RECALLS, retrieve

Specs = Mapping[str, SourceSpec]
Scored = Callable[[FeatureBank, FeatureBank, str, int], dict[str, Any]]  # (bank, test, label, classes) -> numbers
LABELS = ("fine",)


def _evaluation(
    name: str, specs: Specs, bank_split: str, test_split: str, label_keys: Sequence[str], score: Scored
) -> Evaluation:
    """{name: {label: score(...)}} for every label."""
    classes = class_counts(specs, bank_split, test_split, label_keys, name)

    def run(probe: Probe, key: Key) -> dict[str, Any]:
        bank, test = in_order(probe.bank(bank_split)), in_order(probe.bank(test_split))
        return {name: {label: score(bank, test, label, count) for label, count in classes.items()}}

    return Evaluation(name, run)


def linear_evaluation(
    specs: Specs,
    *,
    method: Literal["softmax", "ridge", "logistic"] = "softmax",
    bank_split: str = "bank",
    test_split: str = "test",
    label_keys: Sequence[str] = LABELS,
    groups: Groups | None = None,
    learning_rates: Sequence[float] = linear.LEARNING_RATES,
    decays: Sequence[float] | None = None,
    steps: int = 1000,
    batch_size: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
    name: str = "linear",
) -> Evaluation:
    """Linear classification of frozen features; hyperparameters are chosen on a held-out slice of the bank.

    method: 'softmax' (`linear.softmax_probe`: every learning rate and decay trained at once), 'ridge' (closed form) or
    'logistic' (L-BFGS). decays: None for the method's own grid.

    Returns {name: {label: {'accuracy', 'balanced' (mean over classes that have a test row), 'chosen': hyperparameters,
    'groups': {group: accuracy over its rows}, 'groups_macro': {group: mean over its classes}}}}; groups where given.
    Raises ValueError also for another method, or groups that name a class that does not exist.
    """
    probes = {"softmax": linear.softmax_probe, "ridge": linear.ridge_probe, "logistic": linear.logistic_probe}
    if method not in probes:
        raise ValueError(f"evaluation {name!r}: method must be one of {sorted(probes)}, got {method!r}.")
    groups = {} if groups is None else groups
    classes = class_counts(specs, bank_split, test_split, label_keys, name)
    for label, members in groups.items():
        check_groups(label, members, classes, name)
    options: dict[str, Any] = {"held_out": held_out, "seed": seed}
    options |= {} if decays is None else {"decays": decays}
    if method == "softmax":
        options |= {"learning_rates": learning_rates, "steps": steps, "batch_size": batch_size}

    def score(bank: FeatureBank, test: FeatureBank, label: str, count: int) -> dict[str, Any]:
        features = bank.backbone, bank.labels[label], test.backbone, test.labels[label]
        result = probes[method](*features, num_classes=count, **options)
        scores = accuracy_by_group(result.correct, test.labels[label], groups.get(label, {}))
        numbers = {"accuracy": result.accuracy, "balanced": scores["balanced"], "chosen": result.chosen}
        if label in groups:
            numbers["groups"] = {group: scores[group] for group in groups[label]}
            numbers["groups_macro"] = scores["macro"]
        return numbers

    return _evaluation(name, specs, bank_split, test_split, label_keys, score)


def few_shot_evaluation(
    specs: Specs,
    *,
    bank_split: str = "bank",
    test_split: str = "test",
    label_keys: Sequence[str] = LABELS,
    shots: Sequence[int] = few_shot.SHOTS,
    seeds: Sequence[int] = few_shot.SEEDS,
    classifier: few_shot.Classifier = "centroid",
    decay: float = 1e-3,
    name: str = "few_shot",
) -> Evaluation:
    """`few_shot.few_shot_accuracy`: {name: {label: {str(shots): {'mean', 'std', 'rows', 'short', 'runs': {str(seed):
    accuracy}}}}}."""

    def score(bank: FeatureBank, test: FeatureBank, label: str, count: int) -> dict[str, Any]:
        found = few_shot.few_shot_accuracy(
            bank.backbone, bank.labels[label], test.backbone, test.labels[label], num_classes=count, shots=shots,
            seeds=seeds, classifier=classifier, decay=decay,
        )  # fmt: skip
        return {
            n: {**numbers, "runs": dict(zip(map(str, seeds), numbers["runs"], strict=True))}
            for n, numbers in found.items()
        }

    return _evaluation(name, specs, bank_split, test_split, label_keys, score)


def retrieval_evaluation(
    specs: Specs,
    *,
    bank_split: str = "bank",
    test_split: str = "test",
    label_keys: Sequence[str] = LABELS,
    ks: Sequence[int] = DEFAULT_RECALLS,
    name: str = "retrieval",
) -> Evaluation:
    """Test images look for bank images of their class: {name: {label: `retrieval.Retrieval.means`}}."""

    def score(bank: FeatureBank, test: FeatureBank, label: str, count: int) -> dict[str, Any]:
        features = test.backbone, test.labels[label], bank.backbone, bank.labels[label]
        return dict(retrieve(*features, num_classes=count, ks=ks).means())

    return _evaluation(name, specs, bank_split, test_split, label_keys, score)


def kmeans_evaluation(
    specs: Specs,
    *,
    bank_split: str = "bank",
    test_split: str = "test",
    label_keys: Sequence[str] = LABELS,
    clusters: int | None = None,
    restarts: int = 3,
    iterations: int = 100,
    seed: int = 0,
    name: str = "kmeans",
) -> Evaluation:
    """Agreement with labels of k-means on unit backbone features of the bank: the control for the prototypes' clusters.

    clusters: None for as many as the label has classes. Returns {name: {label: {'nmi', 'ari', 'hungarian', 'purity',
    'pair_precision', 'clusters'}}}; more clusters than rows mean one a row. Raises ValueError also for clusters that
    are no number >= 1.
    """
    if clusters is not None and (not isinstance(clusters, int) or clusters < 1):
        raise ValueError(f"evaluation {name!r}: clusters must be None or a number >= 1, got {clusters!r}.")

    def score(bank: FeatureBank, test: FeatureBank, label: str, count: int) -> dict[str, Any]:
        number = min(count if clusters is None else clusters, len(bank.backbone))
        found = kmeans(unit_rows(bank.backbone), number, seed=seed, restarts=restarts, iterations=iterations)
        return {**clustering_scores(bank.labels[label], found.assignment), "clusters": number}

    return _evaluation(name, specs, bank_split, test_split, label_keys, score)


def calibration_evaluation(
    specs: Specs,
    *,
    bank_split: str = "bank",
    test_split: str = "test",
    label_keys: Sequence[str] = LABELS,
    bins: int = 15,
    decays: Sequence[float] = linear.LOGISTIC_DECAYS,
    held_out: float = 0.1,
    seed: int = 0,
    name: str = "calibration",
) -> Evaluation:
    """How far the probabilities of a logistic probe can be believed, as they are and after one temperature.

    The temperature is fitted on the held-out slice of the bank, to the probe that was fitted on the rest. Returns
    {name: {label: {`calibration_scores`, 'temperature', 'tempered': scores after it, 'reliability': {str(bin):
    {'lower', 'upper', 'count', 'confidence', 'accuracy'}}}}}; bins are counted from 0.
    """

    def score(bank: FeatureBank, test: FeatureBank, label: str, count: int) -> dict[str, Any]:
        train, targets = bank.backbone, bank.labels[label]
        result = linear.logistic_probe(
            train, targets, test.backbone, test.labels[label], num_classes=count, decays=decays, held_out=held_out,
            seed=seed,
        )  # fmt: skip
        split = linear.held_out_split(len(train), held_out, seed)
        part = linear.logistic_probe(
            train[split.fit], targets[split.fit], train[split.held], targets[split.held], num_classes=count,
            decays=(result.chosen["decay"],), held_out=held_out, seed=seed,
        )  # fmt: skip
        # A class that the rest lacks has logit -inf: no temperature could make its rows likely.
        logits = np.maximum(part.scores, part.scores.max(axis=1, keepdims=True) - 1e3)
        temperature = fit_temperature(logits, targets[split.held])
        plain, tempered = (linear.probabilities(result, t) for t in (1.0, temperature))
        table = reliability(plain, test.labels[label], bins)
        return {
            **calibration_scores(plain, test.labels[label], bins),
            "temperature": temperature,
            "tempered": calibration_scores(tempered, test.labels[label], bins),
            "reliability": {str(i): {k: v[i] for k, v in table.items()} for i in range(bins)},
        }

    return _evaluation(name, specs, bank_split, test_split, label_keys, score)
