"""The audit of somebody's prototypes, as one plain object (docs/audit.md) and as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protojax.audit import files
from protojax.audit.tensors import FileError
from protojax.evals import audit as audit_lib
from protojax.evals import rank
from protojax.evals.neighbours import check_rows
from protojax.ops.unique import nearest_cosine

VERSION = 1
SPECTRUM_VALUES = 32
DEAD_SHARE, UNIQUE_SHARE = 0.5, 0.9  # where the sentences change their tone; the numbers stand beside them


class Arrays(NamedTuple):
    """What plots are made of: prototypes [K,D] float32, nearest [K] (cosine to the nearest other one), and shares [K]
    of features, None without any."""

    prototypes: np.ndarray
    nearest: np.ndarray
    shares: np.ndarray | None


def audit_file(
    path: str | Path, key: str | None = None, features: str | Path | None = None
) -> tuple[dict[str, Any], Arrays]:
    """(the object of docs/audit.md, its arrays) of a file, a folder of Orbax or a run.

    Raises FileError for a file that cannot be read, prototypes that cannot be found, rows that have no direction, and
    features of another width.
    """
    found = files.load_prototypes(path, key)
    rows = None if features is None else files.load_features(features)
    prototypes = np.ascontiguousarray(found.rows, np.float32)
    try:
        numbers, found_arrays = measure(prototypes, rows)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    about = {
        "version": VERSION,
        "file": str(path),
        "format": found.format,
        "key": found.key,
        "layout": found.layout,
        "dtype": found.dtype,
        "weight_norm": found.weight_norm,
        "features": None if features is None else str(features),
    }
    return about | numbers, found_arrays


def measure(prototypes: np.ndarray, features: np.ndarray | None = None) -> tuple[dict[str, Any], Arrays]:
    """(numbers, arrays) of prototypes [K,D] float32, with features [M,D] where there are any.

    Numbers: those of `evals.audit.audit`, `prototypes` = K, `duplicates` (`evals.audit.duplicate_groups` at 0.025),
    `identical` (rows that repeat an earlier one to the last bit), and `spectrum` of the unit prototypes. Every count is
    exact. Memory: a few arrays of K x D and blocks; never K x K. Raises ValueError as `evals.audit.audit` does.
    """
    prototypes = audit_lib.check_prototypes(prototypes)
    nearest = nearest_cosine(prototypes)
    features, used = _usage(prototypes, features)
    numbers = audit_lib.audit(prototypes, features, nearest=nearest, used=used)
    result = {"prototypes": numbers.pop("count"), **numbers}
    result["duplicates"] = audit_lib.duplicate_groups(prototypes, nearest=nearest)
    result |= {"identical": _identical(prototypes), "spectrum": _spectrum(prototypes)}
    return result, Arrays(prototypes, nearest, None if used is None else used.shares)


def _usage(prototypes: np.ndarray, features: np.ndarray | None) -> tuple[np.ndarray | None, audit_lib.Usage | None]:
    if features is None:
        return None, None
    features = check_rows(features, "features")
    if features.shape[1] != prototypes.shape[1]:
        raise ValueError(f"features have width {features.shape[1]}, prototypes {prototypes.shape[1]}; they must agree.")
    return features, audit_lib.usage(prototypes, features)


def _identical(prototypes: np.ndarray) -> int:
    """Rows that equal an earlier row, bit for bit."""
    words = np.ascontiguousarray(prototypes).view(np.dtype((np.void, prototypes.shape[1] * prototypes.itemsize)))
    return int(len(words) - len(np.unique(words)))


def _spectrum(prototypes: np.ndarray) -> dict[str, Any]:
    """Singular values of the unit prototypes, as shares of their sum, the largest 32; effective rank = exp(entropy of
    all shares); mean_direction: length of the mean unit prototype (1: all point one way; about 1/sqrt(K): none)."""
    length = np.linalg.norm(prototypes, axis=1, keepdims=True)
    unit = prototypes / np.maximum(length, np.finfo(np.float32).tiny)
    values = rank.singular_values(unit)
    shares = values / values.sum()
    positive = shares[shares > 0]
    return {
        "effective_rank": float(np.exp(-np.sum(positive * np.log(positive)))),
        "attainable": int(min(prototypes.shape)),
        "mean_direction": float(np.linalg.norm(unit.mean(axis=0, dtype=np.float64))),
        "singular_value_shares": [float(v) for v in shares[:SPECTRUM_VALUES]],
    }


# --------------------------------------------------------------------------------------------------- sentences
def sentences(result: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(question, status 'good', 'warn', 'bad' or 'unknown', sentences) for a person, most telling first."""
    return [_distinct(result), _used(result), _spread(result)]


def _distinct(result: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    count, unique, control = result["prototypes"], result["unique"], result["control"]
    first, last = next(iter(unique)), list(unique)[-1]
    share = unique[first] / count
    said = [
        f"{unique[first]:,} of {count:,} prototypes ({_percent(share)}) are unique at epsilon {first}: no earlier one "
        f"within that cosine distance. At {last}: {unique[last]:,} ({_percent(unique[last] / count)}).",
        f"As many random directions in {result['dim']} dimensions: {control[first]:,} at {first}, {control[last]:,} at "
        f"{last}. An untrained codebook is as unique as that, so a high count alone proves nothing.",
    ]
    groups = result["duplicates"]
    if groups:
        members = sum(map(len, groups))
        text = f"{members:,} prototypes repeat one another in {len(groups):,} groups, the largest of {len(groups[0]):,}"
        shown = ", ".join(map(str, groups[0][:6])) + (", ..." if len(groups[0]) > 6 else "")
        said.append(f"{text} (rows {shown}). {result['identical']:,} are exact copies of an earlier row.")
    nearest = result["nearest_cosine"]
    if nearest:
        said.append(f"Half of the prototypes have another one within cosine {nearest['0.5']:.3f} or closer.")
    status = "good" if share >= UNIQUE_SHARE else "bad" if share < DEAD_SHARE else "warn"
    return "Are they distinct?", status, said


def _used(result: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    question = "Does each get work?"
    if result["live"] is None:
        return question, "unknown", ["Not known without features: give --features=FILE, features of the training set "
                                     "in the space of the prototypes (before the last layer)."]  # fmt: skip
    count, live, first = result["prototypes"], result["live"], next(iter(result["live_unique"]))
    distinct = result["live_unique"][first]
    said = [
        f"{live:,} of {count:,} ({_percent(live / count)}) are live: nearest to more than 1/(10 K) of the "
        f"{result['rows']:,} features. {distinct:,} ({_percent(distinct / count)}) are live and unique at {first}.",
        f"Usage has perplexity {result['perplexity']:,.1f}: as if so many were used evenly. A feature's nearest "
        f"prototype has cosine {result['coverage']:.3f} on average.",
    ]
    if result["rows"] < 10 * count:
        said.append(
            f"{result['rows']:,} features for {count:,} prototypes are few: one without a feature here may have some "
            "in the whole set."
        )
    shift = result["centred"]
    if shift:
        said.append(
            f"With the mean feature subtracted from both: {shift['live']:,} live, {shift['live_unique'][first]:,} live "
            "and unique."
        )
    usable = min(count, result["rows"])
    status = "good" if distinct >= UNIQUE_SHARE * usable else "bad" if distinct < DEAD_SHARE * usable else "warn"
    return question, status, said


def _spread(result: Mapping[str, Any]) -> tuple[str, str, list[str]]:
    spectrum = result["spectrum"]
    effective, attainable = spectrum["effective_rank"], spectrum["attainable"]
    said = [f"They span {effective:.1f} effective directions of {attainable} attainable."]
    if spectrum["mean_direction"] > 0.5:
        said.append(
            f"Their mean has length {spectrum['mean_direction']:.2f}: they lie in one cone. Unique counts then say "
            "little; look at the centred ones."
        )
    status = "good" if effective >= 0.5 * attainable else "bad" if effective < 0.1 * attainable else "warn"
    return "Do they spread?", status, said


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
