"""Schedules: values at known points, clamping, and messages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.schedules import is_constant, make_schedule


@pytest.mark.parametrize(
    ("spec", "expected"),  # at steps 0, 25, 50, 75, 100 and 400 of 100
    [
        (0.3, [0.3] * 6),
        (("constant", 2), [2.0] * 6),
        (("linear", 1.0, 3.0), [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]),
        (("linear", 4.0, 8.0, 0.5), [0.0, 2.0, 4.0, 6.0, 8.0, 8.0]),
        (("linear", 0.04, 0.08, 0.0, 0.5), [0.04, 0.06, 0.08, 0.08, 0.08, 0.08]),
        (["cosine", 2.0, 0.0], [2.0, 1 + np.sqrt(0.5), 1.0, 1 - np.sqrt(0.5), 0.0, 0.0]),
        (("exponential", 1.0, 1e-4), [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-4]),
        (("piecewise", (0.25, 1.0), (0.5, 3.0), (1.0, 0.0)), [1.0, 1.0, 3.0, 1.5, 0.0, 0.0]),
        ({"kind": "cosine", "start": 2.0, "end": 0.0, "warmup": 0.5}, [0.0, 1.0, 2.0, 1.0, 0.0, 0.0]),
        ({"kind": "piecewise", "points": [(0.0, 1.0), (0.5, 0.0)]}, [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]),
        ({"kind": "constant", "value": 0.5}, [0.5] * 6),
    ],
)
def test_values(spec, expected):
    schedule = jax.jit(make_schedule(spec, 100))
    values = [float(schedule(jnp.asarray(step, jnp.int32))) for step in (0, 25, 50, 75, 100, 400)]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert schedule(jnp.asarray(3, jnp.int32)).dtype == jnp.float32
    np.testing.assert_allclose(make_schedule(spec)(0.25), expected[1], rtol=1e-5)  # of the fraction, by default
    assert is_constant(spec) == (len(set(expected)) == 1 and not isinstance(spec, dict))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (("cosin", 1, 2), ValueError, r"eta, first entry.*did you mean 'cosine'"),
        ({"kind": "linear", "start": 1, "ende": 2}, ValueError, r"eta, field.*got 'ende' \(did you mean 'end'"),
        ({"kind": "linear", "start": 1}, ValueError, r"needs \['start', 'end'\]"),
        (("linear", 1.0), ValueError, r"expected \('linear', start, end"),
        (("constant", 1.0, 2.0), ValueError, r"expected \('constant', value\)"),
        (("linear", 1.0, "two"), TypeError, "expected a number, got str 'two'"),
        ("cosine", TypeError, "expected a number, a tuple such as"),
        (True, TypeError, "expected a number, a tuple such as"),
        (float("nan"), ValueError, "expected a finite number"),
        (("cosine", 1.0, 0.0, 0.7, 0.5), ValueError, "0 <= warmup < until <= 1"),
        (("exponential", 1.0, 0.0), ValueError, "needs positive ends"),
        (("piecewise",), ValueError, r"needs \(fraction, value\) points"),
        (("piecewise", 0.5), ValueError, r"expected a \(fraction, value\) point, got 0.5"),
        (("piecewise", (0.5, 1.0), (0.2, 1.0)), ValueError, r"rise strictly within \[0, 1\]"),
    ],
)
def test_bad_specs_are_refused(spec, error, message):
    with pytest.raises(error, match=message):
        make_schedule(spec, 10, what="eta")


def test_length_must_be_positive():
    with pytest.raises(ValueError, match="total_steps must be a positive number"):
        make_schedule(0.1, 0)
