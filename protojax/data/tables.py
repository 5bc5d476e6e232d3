"""Tables of features with label distributions, and the statistics that turn raw columns into inputs.

N samples, F input columns, C categories. Columns are kept raw (float64, or text) until `Preparation` - fitted on the
training split alone and stored with the model - makes inputs [N,F] of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from protojax.schedules import check_choice

logger = logging.getLogger(__name__)

STANDARDISE = ("standard", "robust", "rank", "none")
TOLERANCE = 1e-3
HEAVY = 5.0  # |skewness| from which a column is heavy-tailed
QUANTILES = 257


class Table(NamedTuple):
    """One split. columns: name -> [N] float64 or text; targets [N,C] rows of sum 1; group [N] indices into `groups`
    (a region, a district); bayes [N,C]: E[target | features] where it is known; graph: 'neighbours' [N,S,F] (the
    numeric columns in order), 'edges' [N,S,E], 'neighbour_mask' [N,S], or {}; images: uint8 [N,H,W,3] or None."""

    name: str
    columns: Mapping[str, np.ndarray]
    targets: np.ndarray
    categories: tuple[str, ...]
    group: np.ndarray
    groups: tuple[str, ...]
    bayes: np.ndarray | None = None
    graph: Mapping[str, np.ndarray] = {}
    images: np.ndarray | None = None

    @property
    def size(self) -> int:
        return len(self.targets)

    def take(self, rows: np.ndarray, name: str) -> Table:
        """Some of the samples, as a table of another name."""
        return self._replace(
            name=name,
            columns={k: v[rows] for k, v in self.columns.items()},
            targets=self.targets[rows],
            group=self.group[rows],
            bayes=None if self.bayes is None else self.bayes[rows],
            graph={k: v[rows] for k, v in self.graph.items()},
            images=None if self.images is None else self.images[rows],
        )


# --------------------------------------------------------------------------------------------------- targets
def check_targets(targets: Any, name: str) -> np.ndarray:
    """Targets as float64 [N,C], rows renormalised where their sum is within 1e-3 of 1.

    Raises TypeError for integer labels, ValueError for NaN, negative numbers, zero rows or sums beyond the tolerance
    (with rows and sums), and for fewer than two categories with a mean target above 0.001.
    """
    given = np.asarray(targets)
    if given.ndim == 1 and np.issubdtype(given.dtype, np.integer):
        raise TypeError(
            f"{name}: got int labels [{len(given)}] as targets, expected distributions [N,C]; use one_hot, or a "
            "classification recipe."
        )
    if given.ndim != 2 or given.shape[1] < 2:
        raise ValueError(f"{name}: expected targets [N,C] with C >= 2 categories, got shape {given.shape}.")
    rows = given.astype(np.float64)
    sums = rows.sum(axis=1)
    bad = ~np.isfinite(rows).all(axis=1) | (rows < 0).any(axis=1) | ~(np.abs(sums - 1.0) <= TOLERANCE)
    if bad.any():
        where = np.flatnonzero(bad)[:5]
        raise ValueError(
            f"{name}: targets must be >= 0 and sum to 1 (within {TOLERANCE}); {int(bad.sum())} of {len(rows)} rows do "
            f"not, for example rows {where.tolist()} with sums {[round(float(s), 4) for s in sums[where]]}. If "
            f"these are "
            "distances, pass them with data.distance_scale."
        )
    used = rows.mean(axis=0) > 1e-3
    if used.sum() < 2:
        raise ValueError(
            f"{name}: fewer than 2 categories have a mean target above 0.001 (column {np.flatnonzero(used).tolist()}): "
            "there is no distribution to learn."
        )
    return rows / sums[:, None]


def from_distances(distances: Any, scale: float, missing: float) -> np.ndarray:
    """softmax(-d / scale) [N,C] of distances [N,C]; NaN (no such category near) stands for `missing`.

    Raises ValueError for a scale that is not positive or a negative distance.
    """
    if not scale > 0:
        raise ValueError(f"data.distance_scale: expected a positive number, got {scale!r}.")
    d = np.where(np.isnan(np.asarray(distances, np.float64)), missing, np.asarray(distances, np.float64))
    if (d < 0).any():
        raise ValueError(f"distances must be >= 0, got {float(np.min(d))} in row {int(np.argmin(d.min(axis=1)))}.")
    z = -d / scale
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


# -------------------------------------------------------------------------------------------------- splitting
def split_table(
    table: Table, *, by: str = "group", val: float = 0.1, test: float = 0.3, seed: int = 0
) -> dict[str, Table]:
    """'train', 'val' and 'test'. by: 'group', whole groups (no group on both sides), or 'random' samples.

    Raises ValueError when fractions leave nothing to train on, or there are too few groups.
    """
    check_choice("data.source.split", by, ("group", "random"))
    if not (0 < val < 1 and 0 < test < 1 and val + test < 1):
        raise ValueError(f"split: expected val and test in (0, 1) with val + test < 1, got {val} and {test}.")
    units = len(table.groups) if by == "group" else table.size
    first, second = round(units * (1 - val - test)), round(units * (1 - test))
    if not 0 < first < second < units:
        raise ValueError(
            f"{table.name}: {units} {'groups' if by == 'group' else 'samples'} cannot be split into train, val "
            f"and test "
            f"with fractions {1 - val - test:.2f}, {val}, {test}; give more, or split='random'."
        )
    order = np.random.default_rng(seed).permutation(units)
    part = np.empty(units, np.int64)
    part[order[:first]], part[order[first:second]], part[order[second:]] = 0, 1, 2
    which = part[table.group] if by == "group" else part
    return {name: table.take(np.flatnonzero(which == i), f"{table.name}/{name}")
            for i, name in enumerate(("train", "val", "test"))}  # fmt: skip


def check_filled(splits: Mapping[str, Table]) -> None:
    """Raise ValueError for a split without samples."""
    for name, table in splits.items():
        if not table.size:
            raise ValueError(f"{table.name}: the split {name!r} is empty: no group or row belongs to it.")


def check_groups(splits: Mapping[str, Table]) -> None:
    """Raise ValueError, naming them, for groups that stand in two splits."""
    seen: dict[int, str] = {}
    for name, table in splits.items():
        for group in np.unique(table.group):
            if group in seen:
                raise ValueError(
                    f"group {table.groups[group]!r} is in the splits {seen[group]!r} and {name!r}: neighbours of a "
                    "training sample would be tested on. Use data.source.split='group', or 'random' if this is meant."
                )
            seen[int(group)] = name


# ---------------------------------------------------------------------------------------------- preparation
class Column(NamedTuple):
    """One raw column: numbers (levels None) become (f(x) - center) / scale, f = identity, 'log1p' or 'signed';
    text becomes one input a level. quantiles: of 'rank', the training column at equal steps."""

    name: str
    levels: tuple[str, ...] | None = None
    log: str | None = None
    median: float = 0.0
    center: float = 0.0
    scale: float = 1.0
    quantiles: tuple[float, ...] | None = None


class Preparation(NamedTuple):
    """What turns raw columns into inputs, fitted on the training split alone; plain values, kept as JSON with a model.

    dropped: name -> why. std: of every numeric input before scaling, for the report (name -> training standard
    deviation). clip: bound in standard deviations, None: none.
    """

    columns: tuple[Column, ...]
    dropped: Mapping[str, str]
    std: Mapping[str, float]
    method: str
    clip: float | None
    impute: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs [F]; a level of text is 'column=level'."""
        return tuple(
            n for c in self.columns for n in ([c.name] if c.levels is None else [f"{c.name}={v}" for v in c.levels])
        )

    def plain(self) -> dict[str, Any]:
        """JSON types."""
        return {**self._asdict(), "columns": [c._asdict() for c in self.columns]}


def read_preparation(plain: Mapping[str, Any]) -> Preparation:
    """The inverse of `Preparation.plain`."""
    tuples = lambda v: None if v is None else tuple(v)  # noqa: E731
    columns = [Column(**{**c, "levels": tuples(c["levels"]), "quantiles": tuples(c["quantiles"])})
               for c in plain["columns"]]  # fmt: skip
    return Preparation(**{**plain, "columns": tuple(columns)})


def fit_preparation(
    columns: Mapping[str, np.ndarray],
    *,
    standardise: str = "standard",
    clip: float | None = 8.0,
    heavy_tails: str | None = None,
    impute: str | None = None,
    groups: np.ndarray | None = None,
) -> Preparation:
    """Statistics of the training columns.

    standardise: 'standard' (mean, standard deviation), 'robust' (median, interquartile range / 1.349), 'rank' (mid-rank
    in the training column, to [-1.73, 1.73]: a uniform of variance 1), 'none'. Columns with std < 1e-6 max(1,
    |mean|) are dropped and listed. heavy_tails='log': columns of |skewness| > 5 pass log1p (signed where they go
    below 0) first. impute='median': for NaN, of any split. groups [N]: ids of groups of which other splits hold others;
    numeric columns that are constant within each of G groups are then dropped where there are G or more of them: G
    values cannot tell them apart, and what a network makes of them on a new group is chance.

    Raises ValueError for NaN without impute (named columns and counts), or when no column varies.
    """
    check_choice("data.standardise", standardise, STANDARDISE)
    check_choice("data.heavy_tails", heavy_tails, (None, "none", "log"))  # type: ignore[arg-type]
    check_choice("data.impute", impute, (None, "none", "median"))  # type: ignore[arg-type]
    impute = None if impute == "none" else impute
    _check_missing(columns, impute, "the training split")
    kept: list[Column] = []
    dropped: dict[str, str] = {}
    stds: dict[str, float] = {}
    for name, raw in columns.items():
        if raw.dtype.kind not in "fiub":
            levels = tuple(sorted({str(v) for v in raw}))
            if len(levels) < 2:
                dropped[name] = f"one level, {levels[0]!r}"
            else:
                kept.append(Column(name, levels=levels))
            continue
        fitted = _fit_numbers(name, raw.astype(np.float64), standardise, heavy_tails == "log")
        if isinstance(fitted, str):
            dropped[name] = fitted
            continue
        kept.append(fitted)
        stds[name] = float(np.nanstd(raw.astype(np.float64)))
    if groups is not None:
        unidentified = _unidentified({c.name: columns[c.name] for c in kept if c.levels is None}, groups)
        others = [c for c in kept if c.name not in unidentified]
        if others:
            kept, dropped = others, dropped | unidentified
        else:
            logger.warning("every column is constant within groups: on a new group predictions are a guess.")
    if not kept:
        raise ValueError(f"no feature column varies over the training split; all are constant: {list(columns)[:8]}.")
    if dropped:
        reasons = {why: [n for n, w in dropped.items() if w == why] for why in dropped.values()}
        said = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
        logger.warning("dropped columns: %s", said)
    return Preparation(tuple(kept), dropped, stds, standardise, clip if standardise != "none" else None, impute)


def _unidentified(columns: Mapping[str, np.ndarray], groups: np.ndarray) -> dict[str, str]:
    """name -> why, of columns that are constant within every group, where there are at least as many as groups."""
    _, first, ids = np.unique(groups, return_index=True, return_inverse=True)
    fixed = [name for name, x in columns.items() if np.array_equal(x, x[first][ids], equal_nan=x.dtype.kind == "f")]
    if len(first) < 2 or len(fixed) < len(first):
        return {}
    why = f"one of {len(fixed)} constant within each of {len(first)} training groups"
    return dict.fromkeys(fixed, why)


def _fit_numbers(name: str, x: np.ndarray, method: str, heavy: bool) -> Column | str:
    median = float(np.nanmedian(x))
    x = np.where(np.isnan(x), median, x)
    mean, std = float(x.mean()), float(x.std())
    if std < 1e-6 * max(1.0, abs(mean)):
        return f"constant, {mean:.6g}"
    log = None
    if heavy and abs(float(np.mean(((x - mean) / std) ** 3))) > HEAVY:
        log = "log1p" if np.min(x) >= 0 else "signed"
        x = _log(x, log)
        mean, std = float(x.mean()), float(x.std())
    if method == "none":
        return Column(name, log=log, median=median)
    if method == "rank":
        return Column(name, log=log, median=median,
                      quantiles=tuple(np.quantile(x, np.linspace(0, 1, QUANTILES)).tolist()))  # fmt: skip
    if method == "robust":
        low, high = np.quantile(x, [0.25, 0.75])
        spread = float(high - low) / 1.349
        return Column(name, log=log, median=median, center=float(np.median(x)), scale=spread if spread > 0 else std)
    return Column(name, log=log, median=median, center=mean, scale=std)


def _log(x: np.ndarray, kind: str | None) -> np.ndarray:
    if kind is None:
        return x
    return np.log1p(np.maximum(x, 0.0)) if kind == "log1p" else np.sign(x) * np.log1p(np.abs(x))


def apply_preparation(preparation: Preparation, columns: Mapping[str, np.ndarray], name: str = "table") -> np.ndarray:
    """Inputs float32 [N,F]: in float64 until the last step, so that a shift of 10^9 costs no digits.

    Raises ValueError for missing columns (both lists), NaN without impute, or a level that training did not have.
    """
    wanted = [c.name for c in preparation.columns]
    missing = [n for n in wanted if n not in columns]
    if missing:
        raise ValueError(
            f"{name} lacks the columns {missing} that the model was fitted on. The model has {wanted}; {name} has "
            f"{sorted(columns)}."
        )
    _check_missing({n: columns[n] for n in wanted}, preparation.impute, name)
    parts = [_apply_column(c, np.asarray(columns[c.name]), preparation.clip, name) for c in preparation.columns]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _apply_column(column: Column, raw: np.ndarray, clip: float | None, name: str) -> np.ndarray:
    if column.levels is not None:
        text = np.asarray([str(v) for v in raw])
        unseen = sorted(set(text.tolist()) - set(column.levels))
        if unseen:
            raise ValueError(
                f"{name}: column {column.name!r} holds {unseen[:4]}, which training did not have; it had "
                f"{list(column.levels)[:8]}. Map them to known values, or train again."
            )
        return (text[:, None] == np.asarray(column.levels)[None, :]).astype(np.float64)
    if raw.dtype.kind not in "fiub":
        raise ValueError(
            f"{name}: column {column.name!r} was numbers in training and is text here: {raw[:3].tolist()}."
        )
    x = raw.astype(np.float64)
    x = _log(np.where(np.isnan(x), column.median, x), column.log)
    if column.quantiles is not None:
        known = np.asarray(column.quantiles)
        low, high = np.searchsorted(known, x, "left"), np.searchsorted(known, x, "right")
        inside = np.interp(x, known, np.linspace(0, 1, len(known)))
        rank = np.where(high > low + 1, (low + high - 1) / 2 / (len(known) - 1), inside)
        x = (2.0 * rank - 1.0) * np.sqrt(3.0)
    else:
        x = (x - column.center) / column.scale
    return (x if clip is None else np.clip(x, -clip, clip))[:, None]


def _check_missing(columns: Mapping[str, np.ndarray], impute: str | None, name: str) -> None:
    holes = {n: int(np.isnan(v.astype(np.float64)).sum()) for n, v in columns.items() if v.dtype.kind in "fiub"}
    holes = {n: count for n, count in holes.items() if count}
    if holes and impute is None:
        listed = ", ".join(f"{n} ({count})" for n, count in list(holes.items())[:6])
        raise ValueError(f"{name}: features hold NaN: {listed}. Fill them, or set data.impute='median'.")


def numeric(columns: Sequence[str], matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of a matrix [N,F] by name."""
    return {name: np.asarray(matrix[:, i], np.float64) for i, name in enumerate(columns)}
