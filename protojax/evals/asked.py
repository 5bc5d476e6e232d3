"""What an evaluation asks of splits and labels, checked when it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from protojax.api import FeatureBank, SourceSpec

Groups = Mapping[str, Mapping[str, Sequence[int] | np.ndarray]]  # label key -> group name -> class ids


def some_labels(label_keys: Sequence[str], name: str) -> tuple[str, ...]:
    """The label keys as a tuple. Raises ValueError when there are none."""
    if isinstance(label_keys, str) or not label_keys:
        raise ValueError(f"evaluation {name!r}: label_keys must be a non-empty list of names, got {label_keys!r}.")
    return tuple(label_keys)


def split_spec(specs: Mapping[str, SourceSpec], split: str, name: str) -> SourceSpec:
    """What the recipe says of a split. Raises ValueError for a missing or empty one."""
    if split not in specs:
        raise ValueError(f"evaluation {name!r} needs the split {split!r}; this recipe has {sorted(specs)}.")
    if specs[split].size < 1:
        raise ValueError(f"evaluation {name!r}: the split {split!r} of {specs[split].name!r} is empty.")
    return specs[split]


def class_count(bank: SourceSpec, test: SourceSpec, label: str, name: str) -> int:
    """Classes C of a label in two splits. Raises ValueError when one lacks it or they differ."""
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


def class_counts(
    specs: Mapping[str, SourceSpec], bank_split: str, test_split: str, label_keys: Sequence[str], name: str
) -> dict[str, int]:
    """label -> classes C, for evaluations that learn on one split and are scored on another.

    Raises ValueError when a split or label is missing or the two splits are one.
    """
    bank, test = split_spec(specs, bank_split, name), split_spec(specs, test_split, name)
    if bank_split == test_split:
        raise ValueError(
            f"evaluation {name!r}: bank and test are both {bank_split!r}, so that every image would be its own nearest "
            "neighbour; give two splits."
        )
    return {label: class_count(bank, test, label, name) for label in some_labels(label_keys, name)}


def check_groups(label: str, members: Mapping[str, Any], classes: Mapping[str, int], name: str) -> None:
    """Raises ValueError when groups are given for another label, or name a class that does not exist."""
    if label not in classes:
        raise ValueError(f"evaluation {name!r}: groups are given for {label!r}, but label_keys are {sorted(classes)}.")
    ids = np.concatenate([np.zeros(0, np.int64), *(np.asarray(m, np.int64).ravel() for m in members.values())])
    bad = ids[(ids < 0) | (ids >= classes[label])]
    if bad.size:
        raise ValueError(
            f"evaluation {name!r}: groups of {label!r} name the classes {bad.tolist()}, but there are {classes[label]}."
        )


def in_order(bank: FeatureBank) -> FeatureBank:
    """The rows by their position in the split: what a seed draws then does not depend on how the bank was gathered."""
    order = np.argsort(bank.positions, kind="stable")
    if (order[:-1] < order[1:]).all():
        return bank
    return FeatureBank(
        backbone=bank.backbone[order],
        image=bank.image[order],
        labels={k: v[order] for k, v in bank.labels.items()},
        positions=bank.positions[order],
        extra={k: v[order] for k, v in bank.extra.items()},
    )
