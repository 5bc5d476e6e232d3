"""Schedules as values: pure functions of the step, written in fractions of the run.

A schedule is given as a number (constant), a tuple or a mapping, so that a config can hold it:

    0.1
    ('constant', 0.1)
    ('linear', start, end)                  also ('linear', start, end, warmup, until)
    ('cosine', start, end)                  half a cosine from start to end
    ('exponential', start, end)             start (end / start)^f, both positive
    ('piecewise', (0.0, a), (0.3, b), ...)  linear between the given (fraction, value) points
    {'kind': 'cosine', 'start': 0.1, 'end': 0.0, 'warmup': 0.05, 'until': 0.8}

`warmup` (fraction of the run, default 0): a linear rise from 0 to `start` before the shape begins. `until` (default
1): the fraction at which `end` is reached. Every schedule keeps its last value afterwards, so that a run resumed past
its end neither warms up again nor extrapolates.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from protojax.config import suggest

Array = jax.Array
Schedule = Callable[[Array | float], Array]
ScheduleSpec = float | Sequence[Any] | Mapping[str, Any]

SHAPES = ("constant", "linear", "cosine", "exponential", "piecewise")
_FIELDS = ("start", "end", "warmup", "until")


def check_choice(what: str, given: Any, known: Iterable[str]) -> str:
    """`given` if it is one of `known`; otherwise ValueError with the choices and, if one is close, a suggestion."""
    names = list(known)
    if given in names:
        return str(given)
    raise ValueError(f"{what}: expected one of {names}, got {given!r}{suggest(given, names)}.")


def make_schedule(spec: ScheduleSpec, total_steps: float = 1.0, what: str = "schedule") -> Schedule:
    """A function of the step from a value of a config (see the module's docstring).

    total_steps: length of the run; 1 (the default) gives a function of the fraction of the run. `what` names the
    option in messages. The result has the float dtype of the default precision.

    Raises ValueError for an unknown shape or field (with a suggestion), a missing value, a fraction outside [0, 1],
    a non-positive end of an exponential, unordered points; TypeError for anything but numbers.
    """
    if not is_number(total_steps) or total_steps <= 0:
        raise ValueError(f"{what}: total_steps must be a positive number, got {total_steps!r}.")
    shape = _shape(spec, what)

    def schedule(step: Array | float) -> Array:
        dtype = jnp.result_type(float)
        fraction = jnp.clip(jnp.asarray(step).astype(dtype) / float(total_steps), 0.0, 1.0)
        return shape(fraction)

    return schedule


def is_constant(spec: ScheduleSpec) -> bool:
    """Whether a schedule needs no length of run."""
    return is_number(spec) or (isinstance(spec, Sequence) and len(spec) == 2 and spec[0] == "constant")


# -------------------------------------------------------------------------------------------------- parsing
def is_number(value: Any) -> bool:
    """Whether the value is a real number; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(value: Any, what: str) -> float:
    if not is_number(value):
        raise TypeError(f"{what}: expected a number, got {type(value).__name__} {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{what}: expected a finite number, got {value!r}.")
    return float(value)


def _shape(spec: ScheduleSpec, what: str) -> Schedule:
    if is_number(spec):
        return _constant(_number(spec, what))
    if isinstance(spec, Mapping):
        return _from_mapping(spec, what)
    if isinstance(spec, str) or not isinstance(spec, Sequence) or not spec:
        raise TypeError(
            f"{what}: expected a number, a tuple such as ('cosine', start, end) or a mapping with 'kind', got {spec!r}."
        )
    kind = check_choice(f"{what}, first entry", spec[0], SHAPES)
    if kind == "constant":
        if len(spec) != 2:
            raise ValueError(f"{what}: expected ('constant', value), got {tuple(spec)!r}.")
        return _constant(_number(spec[1], what))
    if kind == "piecewise":
        return _piecewise(spec[1:], what)
    if not 3 <= len(spec) <= 5:
        raise ValueError(f"{what}: expected ({kind!r}, start, end[, warmup[, until]]), got {tuple(spec)!r}.")
    return _ramp(kind, dict(zip(_FIELDS, spec[1:], strict=False)), what)


def _from_mapping(spec: Mapping[str, Any], what: str) -> Schedule:
    kind = check_choice(f"{what}.kind", spec.get("kind"), SHAPES)
    fields = {"constant": ("value",), "piecewise": ("points",)}.get(kind, _FIELDS)
    for name in spec:
        check_choice(f"{what}, field", name, ("kind", *fields))
    required = fields if len(fields) == 1 else ("start", "end")
    missing = [name for name in required if name not in spec]
    if missing:
        raise ValueError(f"{what}: a {kind} schedule needs {list(required)}, got {dict(spec)!r}.")
    if kind == "constant":
        return _constant(_number(spec["value"], what))
    if kind == "piecewise":
        return _piecewise(spec["points"], what)
    return _ramp(kind, {k: v for k, v in spec.items() if k != "kind"}, what)


# --------------------------------------------------------------------------------------------------- shapes
def _constant(value: float) -> Schedule:
    return lambda fraction: jnp.full_like(jnp.asarray(fraction), value)


def _ramp(kind: str, fields: Mapping[str, Any], what: str) -> Schedule:
    values = {name: _number(value, f"{what}.{name}") for name, value in fields.items()}
    start, end = values["start"], values["end"]
    warmup, until = values.get("warmup", 0.0), values.get("until", 1.0)
    if not 0 <= warmup < until <= 1:
        raise ValueError(
            f"{what}: expected fractions of the run 0 <= warmup < until <= 1, got warmup {warmup}, until {until}."
        )
    if kind == "exponential" and (start <= 0 or end <= 0):
        raise ValueError(f"{what}: an exponential schedule needs positive ends, got {start} and {end}.")

    def ramp(fraction: Array | float) -> Array:
        fraction = jnp.asarray(fraction)
        progress = jnp.clip((fraction - warmup) / (until - warmup), 0.0, 1.0)
        if kind == "cosine":
            value = end + (start - end) * 0.5 * (1.0 + jnp.cos(math.pi * progress))
        elif kind == "exponential":
            value = start * jnp.exp(progress * math.log(end / start))
        else:
            value = start + (end - start) * progress
        if warmup == 0.0:
            return value
        return jnp.where(fraction < warmup, start * fraction / warmup, value)

    return ramp


def _piecewise(points: Any, what: str) -> Schedule:
    if isinstance(points, str) or not isinstance(points, Sequence) or len(points) == 0:
        raise ValueError(f"{what}: a piecewise schedule needs (fraction, value) points, got {points!r}.")
    pairs = []
    for point in points:
        if isinstance(point, str) or not isinstance(point, Sequence) or len(point) != 2:
            raise ValueError(f"{what}: expected a (fraction, value) point, got {point!r}.")
        pairs.append((_number(point[0], f"{what} fraction"), _number(point[1], f"{what} value")))
    fractions = [f for f, _ in pairs]
    if fractions != sorted(set(fractions)) or not 0 <= fractions[0] <= fractions[-1] <= 1:
        raise ValueError(f"{what}: fractions must rise strictly within [0, 1], got {fractions}.")

    def piecewise(fraction: Array | float) -> Array:
        fraction = jnp.asarray(fraction)
        knots = jnp.asarray(fractions, fraction.dtype)
        return jnp.interp(fraction, knots, jnp.asarray([v for _, v in pairs], fraction.dtype))

    return piecewise
