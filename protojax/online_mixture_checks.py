"""Checked parameters of `OnlineGaussianMixture`, and the order in which its passes visit rows."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from protojax.ops.gaussian import Covariance
from protojax.schedules import make_schedule


def integer(name: str, value: Any, least: int) -> int:
    """`value`, a Python or NumPy integer of at least `least`; TypeError or ValueError naming the parameter."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}.")
    if value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value}.")
    return int(value)


def not_negative(name: str, value: Any) -> float:
    """`value`, a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}.")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}.")
    return float(value)


def share_at(name: str, spec: Any, fraction: float) -> float:
    """The value of a number or schedule at a fraction of the run; ValueError where it leaves (0, 1]."""
    # A number needs no JAX, and a stream asks at every batch.
    plain = isinstance(spec, numbers.Real) and not isinstance(spec, bool)
    value = float(spec) if plain else float(make_schedule(spec, what=name)(fraction))
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected values in (0, 1], got {value} at {fraction:.0%} of the run from {spec!r}.")
    return value


def covariance_shape(covariance: Covariance, count: int, width: int) -> tuple[int, ...]:
    """Shape of `covariances_` and `precisions_` for K = count and D = width."""
    return {"diag": (count, width), "spherical": (count,), "tied": (width,)}[covariance]


def given_array(name: str, value: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """`value` as a finite array of `shape`, or None when it is None."""
    if value is None:
        return None
    array = np.asarray(value, dtype)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}.")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity.")
    return array


def given_weights(value: Any, count: int, dtype: Any) -> np.ndarray:
    """weights_init [K], or equal weights."""
    weights = given_array("weights_init", value, (count,), dtype)
    if weights is None:
        return np.full(count, 1.0 / count, dtype)
    total = float(np.sum(weights, dtype=np.float64))
    if np.any(weights < 0) or abs(total - 1.0) > 1e-4:
        raise ValueError(
            f"weights_init: expected non-negative values that sum to 1, got a sum of {total:.6g} and a least value of "
            f"{float(np.min(weights)):.6g}."
        )
    return weights


def given_precisions(value: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """precisions_init, positive, or None."""
    precisions = given_array("precisions_init", value, shape, dtype)
    if precisions is not None and np.any(precisions <= 0):
        raise ValueError(
            f"precisions_init: expected positive values, got a least value of {float(np.min(precisions)):.6g}."
        )
    return precisions


class Order:
    """A pseudo-random order of `rows` row numbers that needs no array of that length: i -> (factor i + shift) mod rows.

    The factor lies in the middle half of the row numbers and has no divisor in common with them, so that every row
    comes once and neighbours in the order are far apart in the data."""

    def __init__(self, rows: int, random: np.random.RandomState):
        self.rows = rows
        self.shift = int(random.randint(rows))
        self.factor = rows // 4 + int(random.randint(rows // 2 + 1))
        while math.gcd(self.factor, rows) != 1:
            self.factor += 1

    def batch(self, start: int, size: int) -> np.ndarray:
        """Row numbers [<= size] at positions start, start + 1, ..., sorted: a file is read in one direction."""
        position = np.arange(start, min(start + size, self.rows), dtype=np.int64)
        return np.sort((self.factor * position + self.shift) % self.rows)
