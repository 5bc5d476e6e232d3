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
from scipy.special import betainc

from protojax.evals.neighbours import check_rows, nearest_rows, unit_rows
from protojax.ops.unique import nearest_cosine, unique_groups

EPSILONS = (0.025, 0.1, 0.25, 0.5)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
USAGE_LIMITS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, np.inf)  # of K * usage
_NEVER = 1e-6  # expected close pairs of a control that need not be drawn
_ROUNDING = 1e-5  # above what float32 accumulation of a cosine loses, so that blocking decides no group
_NO_DIRECTION = 1e-6  # relative length below which float32 rounding, not the data, decides a direction


class Usage(NamedTuple):
    """shares float64 [K]: share of *all* rows whose nearest prototype is k (they add up to 1 - undirected / M).
    nearest int64 [M]: that prototype, -1 for a row without direction. coverage: mean over rows of the largest cosine.
    undirected: rows that equal the centre and so are near no prototype. cosines float64 [M]: of each row to its nearest
    prototype, 0 without direction."""

    shares: np.ndarray
    nearest: np.ndarray
    coverage: float
    undirected: int
    cosines: np.ndarray


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
    return Usage(shares, nearest, float(cosine.mean()), int((~directed).sum()), cosine)


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


def groups_at(prototypes: np.ndarray, epsilon: float, nearest: np.ndarray | None = None) -> np.ndarray:
    """`ops.unique.unique_groups`, int64 [K], at the cost of the rows that have a neighbour.

    nearest [K]: cosine of each row to its nearest other one, among these rows or more of them. A row further than
    epsilon from all others neither joins a group nor is joined: it stands for itself and need not be compared again.
    """
    rows = np.asarray(prototypes)
    nearest = nearest_cosine(rows) if nearest is None else nearest
    close = np.flatnonzero(nearest >= 1.0 - epsilon - _ROUNDING)
    groups = np.arange(len(rows))
    if close.size:
        groups[close] = close[unique_groups(rows[close], epsilon)]
    return groups


def unique_counts(
    prototypes: np.ndarray,
    epsilons: Sequence[float] = EPSILONS,
    *,
    among: np.ndarray | None = None,
    nearest: np.ndarray | None = None,
) -> dict[str, int]:
    """{str(epsilon): unique prototypes} of prototypes [K,D], greedy cover in index order (`ops.unique`).

    among bool [K]: count these alone. nearest [K]: as `groups_at` takes it, where it is known already (of all rows).
    Raises ValueError for a zero or non-finite row.
    """
    rows = np.asarray(prototypes)
    chosen = np.ones(len(rows), bool) if among is None else np.asarray(among, bool)
    rows = rows if among is None else rows[chosen]
    if not len(rows):
        return {_name(epsilon): 0 for epsilon in epsilons}
    nearest = nearest_cosine(rows) if nearest is None else nearest[chosen]
    return {_name(e): int(np.unique(groups_at(rows, float(e), nearest)).size) for e in epsilons}


def duplicate_groups(
    prototypes: np.ndarray, epsilon: float = EPSILONS[0], nearest: np.ndarray | None = None
) -> list[list[int]]:
    """Indices of prototypes [K,D] that repeat one another: the groups of `unique_counts` at epsilon that have more than
    one member, largest first. Over all groups, sum(size - 1) = K - unique at epsilon."""
    groups = groups_at(prototypes, epsilon, nearest)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    members = [part.tolist() for part in np.split(order, starts[1:])]
    return sorted((m for m in members if len(m) > 1), key=lambda m: (-len(m), m[0]))


def pairs_expected(count: int, dim: int, epsilon: float) -> float:
    """Expected pairs within cosine distance epsilon among `count` uniformly random directions.

    P(cos >= t) = I_{1 - t^2}((D - 1) / 2, 1/2) / 2 for t >= 0, with I the regularised incomplete beta function.
    """
    t = 1.0 - epsilon
    tail = 0.5 * float(betainc((dim - 1) / 2, 0.5, 1.0 - t * t)) if dim > 1 else 0.5
    return 0.5 * count * (count - 1) * (tail if t >= 0 else 1.0)


@functools.lru_cache(maxsize=8)
def _random_unique(count: int, dim: int, epsilons: tuple[float, ...], seed: int) -> tuple[tuple[str, int], ...]:
    sure = {e for e in epsilons if pairs_expected(count, dim, e) < _NEVER}
    if len(sure) == len(epsilons):
        return tuple((_name(e), count) for e in epsilons)
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return tuple(unique_counts(rows, epsilons).items())


def random_unique(count: int, dim: int, epsilons: Sequence[float] = EPSILONS, seed: int = 0) -> dict[str, int]:
    """The control: unique counts of `count` uniformly random directions in `dim` dimensions. Remembered.

    Where fewer than 1e-6 close pairs are to be expected (a union bound), no direction is drawn: all are unique."""
    return dict(_random_unique(int(count), int(dim), tuple(float(e) for e in epsilons), int(seed)))


def nearest_cosine_quantiles(prototypes: np.ndarray, nearest: np.ndarray | None = None) -> dict[str, float] | None:
    """Quantiles over prototypes of the cosine to their nearest other prototype; None for a single prototype."""
    if len(prototypes) < 2:
        return None
    values = np.asarray(nearest_cosine(prototypes) if nearest is None else nearest, np.float64)
    return {_name(q): float(v) for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def usage_histogram(shares: np.ndarray) -> dict[str, int]:
    """How evenly prototypes are used: {upper limit of a bin of K * share: prototypes in it}.

    The bin '0' holds those without any image; '0.1' ends where live begins; 1 is an equal share; 'inf' is the rest.
    """
    scaled = np.asarray(shares, np.float64) * len(shares)
    places = np.searchsorted(USAGE_LIMITS, scaled, side="left")
    counts = np.bincount(places, minlength=len(USAGE_LIMITS))
    return {_name(limit): int(n) for limit, n in zip(USAGE_LIMITS, counts, strict=True)}


def check_prototypes(prototypes: np.ndarray) -> np.ndarray:
    """Prototypes [K,D] as floating-point rows that all have a direction. Raises ValueError where one is zero or not
    finite."""
    prototypes = check_rows(prototypes, "prototypes")
    zero = ~np.any(prototypes, axis=1)
    if zero.any():
        raise ValueError(
            f"prototypes: {int(zero.sum())} of {len(zero)} rows are zero (first: row {int(np.argmax(zero))}); a zero "
            "row has no direction and cannot be audited. Drop such rows first."
        )
    return prototypes


def audit(
    prototypes: np.ndarray,
    features: np.ndarray | None = None,
    *,
    center: np.ndarray | None = None,
    epsilons: Sequence[float] = EPSILONS,
    seed: int = 0,
    block: int = 1024,
    nearest: np.ndarray | None = None,
    used: Usage | None = None,
) -> dict[str, Any]:
    """Audit prototypes [K,D], with features [M,D] of the whole training set where there are any.

    Returns plain numbers: count K, dim D, unique {epsilon: count}, control (the same for random directions drawn with
    `seed`), nearest_cosine (quantiles); from the features: rows M, undirected, live (count of prototypes with usage
    above 1/(10 K)), live_unique {epsilon: count}, perplexity, coverage, usage (`usage_histogram`); and `centred`:
    unique, nearest_cosine, live,
    live_unique, perplexity, coverage again after subtracting the mean feature. Without features these are None.

    center [D]: what the estimator itself subtracts from features; its prototypes already live in that centred space
    and are taken as they are. The `centred` part makes both sides unit rows first (h_i after `center`), takes
    m = mean_i h_i, and compares unit(h_i - m) with unit(c_k - m): one translation of features and prototypes alike.
    Prototypes that coincide with m have no direction; together they count as one unique prototype that is not live.

    nearest [K] and used: `ops.unique.nearest_cosine` and `usage` of the same arrays, where they are known already.

    Raises ValueError when widths differ, features are empty, or a row is not finite, or a prototype is zero.
    """
    prototypes = check_prototypes(prototypes)
    nearest = nearest_cosine(prototypes) if nearest is None else nearest
    result: dict[str, Any] = {
        "count": int(prototypes.shape[0]),
        "dim": int(prototypes.shape[1]),
        "unique": unique_counts(prototypes, epsilons, nearest=nearest),
        "control": random_unique(len(prototypes), prototypes.shape[1], epsilons, seed),
        "nearest_cosine": nearest_cosine_quantiles(prototypes, nearest),
        **dict.fromkeys(("rows", "undirected", "live", "live_unique", "perplexity", "coverage", "usage", "centred")),
    }
    if features is None:
        return result
    features = check_rows(features, "features")
    if features.shape[1] != prototypes.shape[1]:
        raise ValueError(f"features have width {features.shape[1]}, prototypes {prototypes.shape[1]}; they must agree.")
    used = usage(prototypes, features, center=center, block=block) if used is None else used
    result |= {
        "rows": len(features),
        "undirected": used.undirected,
        **_usage_numbers(prototypes, used, epsilons, nearest),
    }
    result["centred"] = _centred_audit(prototypes, _centred(features, center), epsilons, block)
    return result


def _usage_numbers(
    prototypes: np.ndarray, used: Usage, epsilons: Sequence[float], nearest: np.ndarray
) -> dict[str, Any]:
    live = live_mask(used.shares)
    return {
        "live": int(live.sum()),
        "live_unique": unique_counts(prototypes, epsilons, among=live, nearest=nearest),
        "perplexity": perplexity(used.shares),
        "coverage": used.coverage,
        "usage": usage_histogram(used.shares),
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
    nearest = np.full(len(rows), -np.inf)
    if directed.any():
        nearest[directed] = nearest_cosine(rows[directed])
    return {
        "unique": {e: n + at_mean for e, n in unique_counts(rows, epsilons, among=directed, nearest=nearest).items()},
        "nearest_cosine": nearest_cosine_quantiles(rows[directed], nearest[directed]),
        "live": int(live.sum()),
        "live_unique": unique_counts(rows, epsilons, among=live, nearest=nearest),
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
