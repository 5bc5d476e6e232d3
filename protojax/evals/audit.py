"""Prototype audit: are the prototypes distinct, and does each of them get work?

Uniqueness alone proves nothing: random directions are unique and a prototype that no feature is near stays unique for
ever. So unique counts stand beside those of random directions, and *live-unique*, the unique count among prototypes
that features really choose, is the headline number. Everything is given again after subtracting the mean feature,
because features often share one large direction in which everything looks alike.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from protojax.evals.neighbours import check_rows, nearest_rows, unit_rows
from protojax.ops.unique import nearest_cosine, unique_count

EPSILONS = (0.025, 0.1, 0.25, 0.5)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_NO_DIRECTION = 1e-6  # relative length below which float32 rounding, not the data, decides a direction


class Usage(NamedTuple):
    """shares float64 [K]: share of *all* rows whose nearest prototype is k (they add up to 1 - undirected / M).
    nearest int64 [M]: that prototype, -1 for a row without direction. coverage: mean over rows of the largest cosine.
    undirected: rows that equal the centre and so are near no prototype."""

    shares: np.ndarray
    nearest: np.ndarray
    coverage: float
    undirected: int


def usage(
    prototypes: np.ndarray, features: np.ndarray, *, center: np.ndarray | None = None, block: int = 1024
) -> Usage:
    """Nearest prototype of every feature: argmax_k cos(h_i - center, c_k), ties to the lowest k.

    prototypes c [K,D], features h [M,D] (teacher features of one centre view an image), center [D] where the estimator
    centres. No prior, price, potential or annealing enters, so a balanced E-step cannot make itself look alive.
    """
    prototypes, rows = check_rows(prototypes, "prototypes"), _centred(features, center)
    directed = _has_direction(rows, features, center)
    nearest = np.full(len(rows), -1, np.int64)
    cosine = np.zeros(len(rows))
    if directed.any():
        found = nearest_rows(rows[directed], prototypes, 1, block=block)
        nearest[directed], cosine[directed] = found.indices[:, 0], found.cosines[:, 0]
    shares = np.bincount(nearest[directed], minlength=len(prototypes)) / len(rows)
    return Usage(shares, nearest, float(cosine.mean()), int((~directed).sum()))


def perplexity(shares: np.ndarray) -> float:
    """exp(-sum_k s_k ln s_k) of shares [K] normalised to sum 1: how many prototypes carry the work; 0 without any."""
    shares = np.asarray(shares, np.float64)
    total = shares.sum()
    if not total > 0:
        return 0.0
    shares = shares[shares > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def live_mask(shares: np.ndarray) -> np.ndarray:
    """bool [K]: usage share above 1 / (10 K)."""
    return np.asarray(shares) > 1.0 / (10.0 * len(shares))


def unique_counts(
    prototypes: np.ndarray, epsilons: Sequence[float] = EPSILONS, *, among: np.ndarray | None = None
) -> dict[str, int]:
    """{str(epsilon): unique prototypes} of prototypes [K,D], greedy cover in index order (`ops.unique`).

    among bool [K]: count these alone. Raises ValueError for a zero or non-finite row.
    """
    rows = np.asarray(prototypes)
    rows = rows if among is None else rows[np.asarray(among, bool)]
    counts: dict[float, int] = {}
    for epsilon in sorted((float(e) for e in epsilons), reverse=True):
        # Where no row is within a larger epsilon of another, none is within a smaller one.
        apart = len(rows) in counts.values()
        counts[epsilon] = len(rows) if apart or not len(rows) else unique_count(rows, epsilon)
    return {_name(epsilon): counts[float(epsilon)] for epsilon in epsilons}


@functools.lru_cache(maxsize=8)
def _random_unique(count: int, dim: int, epsilons: tuple[float, ...], seed: int) -> tuple[tuple[str, int], ...]:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return tuple(unique_counts(rows, epsilons).items())


def random_unique(count: int, dim: int, epsilons: Sequence[float] = EPSILONS, seed: int = 0) -> dict[str, int]:
    """The control: unique counts of `count` uniformly random directions in `dim` dimensions. Remembered."""
    return dict(_random_unique(int(count), int(dim), tuple(float(e) for e in epsilons), int(seed)))


def nearest_cosine_quantiles(prototypes: np.ndarray) -> dict[str, float] | None:
    """Quantiles over prototypes of the cosine to their nearest other prototype; None for a single prototype."""
    if len(prototypes) < 2:
        return None
    values = np.asarray(nearest_cosine(prototypes), np.float64)
    return {_name(q): float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def audit(
    prototypes: np.ndarray,
    features: np.ndarray | None = None,
    *,
    center: np.ndarray | None = None,
    epsilons: Sequence[float] = EPSILONS,
    seed: int = 0,
    block: int = 1024,
) -> dict[str, Any]:
    """Audit prototypes [K,D], with features [M,D] of the whole training set where there are any.

    Returns plain numbers: count K, dim D, unique {epsilon: count}, control (the same for random directions drawn with
    `seed`), nearest_cosine (quantiles); from the features: rows M, undirected, live (count of prototypes with usage
    above 1/(10 K)), live_unique {epsilon: count}, perplexity, coverage; and `centred`: unique, nearest_cosine, live,
    live_unique, perplexity, coverage again after subtracting the mean feature. Without features these are None.

    center [D]: what the estimator itself subtracts from features; its prototypes already live in that centred space
    and are taken as they are. The `centred` part makes both sides unit rows first (h_i after `center`), takes
    m = mean_i h_i, and compares unit(h_i - m) with unit(c_k - m): one translation of features and prototypes alike.
    Prototypes that coincide with m have no direction; together they count as one unique prototype that is not live.

    Raises ValueError when widths differ, features are empty, or a row is not finite, or a prototype is zero.
    """
    prototypes = check_rows(prototypes, "prototypes")
    zero = ~(np.abs(prototypes) > 0).any(axis=1)
    if zero.any():
        raise ValueError(
            f"prototypes: {int(zero.sum())} of {len(zero)} rows are zero (first: row {int(np.argmax(zero))}); a zero "
            "row has no direction and cannot be audited. Drop such rows first."
        )
    result: dict[str, Any] = {
        "count": int(prototypes.shape[0]),
        "dim": int(prototypes.shape[1]),
        "unique": unique_counts(prototypes, epsilons),
        "control": random_unique(len(prototypes), prototypes.shape[1], epsilons, seed),
        "nearest_cosine": nearest_cosine_quantiles(prototypes),
        **dict.fromkeys(("rows", "undirected", "live", "live_unique", "perplexity", "coverage", "centred")),
    }
    if features is None:
        return result
    features = check_rows(features, "features")
    if features.shape[1] != prototypes.shape[1]:
        raise ValueError(f"features have width {features.shape[1]}, prototypes {prototypes.shape[1]}; they must agree.")
    used = usage(prototypes, features, center=center, block=block)
    result |= {"rows": len(features), "undirected": used.undirected, **_usage_numbers(prototypes, used, epsilons)}
    result["centred"] = _centred_audit(prototypes, _centred(features, center), epsilons, block)
    return result


def _usage_numbers(prototypes: np.ndarray, used: Usage, epsilons: Sequence[float]) -> dict[str, Any]:
    live = live_mask(used.shares)
    return {
        "live": int(live.sum()),
        "live_unique": unique_counts(prototypes, epsilons, among=live),
        "perplexity": perplexity(used.shares),
        "coverage": used.coverage,
    }


def _centred_audit(
    prototypes: np.ndarray, features: np.ndarray, epsilons: Sequence[float], block: int
) -> dict[str, Any]:
    unit = unit_rows(features).astype(np.float32)
    mean = unit.mean(axis=0, dtype=np.float64)
    moved = unit_rows(prototypes) - mean[None, :]
    directed = np.linalg.norm(moved, axis=1) > _NO_DIRECTION
    rows = np.where(directed[:, None], moved, 0.0).astype(np.float32)
    used = usage(rows, unit, center=mean, block=block)
    shares = np.where(directed, used.shares, 0.0)
    live = live_mask(shares)
    at_mean = int(not directed.all())
    return {
        "unique": {e: n + at_mean for e, n in unique_counts(rows, epsilons, among=directed).items()},
        "nearest_cosine": nearest_cosine_quantiles(rows[directed]),
        "live": int(live.sum()),
        "live_unique": unique_counts(rows, epsilons, among=live),
        "perplexity": perplexity(shares),
        "coverage": used.coverage,
    }


def _centred(features: np.ndarray, center: np.ndarray | None) -> np.ndarray:
    features = check_rows(features, "features")
    if center is None:
        return features
    center = np.asarray(center, np.float64)
    if center.shape != features.shape[1:]:
        raise ValueError(f"center: expected one value a column ({features.shape[1:]}), got shape {center.shape}.")
    return (features - center[None, :]).astype(features.dtype)


def _has_direction(rows: np.ndarray, features: np.ndarray, center: np.ndarray | None) -> np.ndarray:
    """bool [M]: rows that are more than rounding away from zero, seen against what was subtracted."""
    size = np.linalg.norm(rows, axis=1)
    if center is None:
        return size > 0
    return size > _NO_DIRECTION * (np.linalg.norm(features, axis=1) + float(np.linalg.norm(center)))


def _name(number: float) -> str:
    """0.025 -> '0.025', 1.0 -> '1': the same key whatever the input type."""
    return f"{float(number):g}"
