"""Projection heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.models import count_parameters
from protojax.models.functional import functional
from protojax.models.heads import HEADS, Head


def test_papers_sizes(key):
    shapes = jax.eval_shape(functional(HEADS["carp"], 2048).init, key)
    dense = 2048 * 2048 * 2 + 2048 * 256 + 256
    assert count_parameters(shapes["params"]) == dense + 2 * 2 * 2048
    assert count_parameters(shapes["stats"]) == 2 * (2 * 2048 + 1)  # mean, var, and the number of updates
    shapes = jax.eval_shape(functional(HEADS["dino"], 384).init, key)
    assert count_parameters(shapes["params"]) == 384 * 2048 + 2048 * 2048 + 2 * 2048 + 2048 * 256 + 256
    assert shapes["stats"] == {}


def test_carp_output_is_free_and_dino_output_has_unit_norm(key):
    rows = jax.random.normal(key, (6, 5))
    for name, unit in (("carp", False), ("dino", True)):
        network = functional(HEADS[name], 5, hidden=8, dim=4)
        heads = jax.jit(lambda k, x, n=network: n.apply(n.init(k), x, train=True)[0])(key, rows)
        norms = jnp.linalg.norm(heads, axis=-1)
        assert bool(jnp.allclose(norms, 1.0, atol=1e-6)) is unit


def test_normalisation_of_a_zero_row_has_a_finite_gradient(key):
    network = functional(HEADS["identity"], 3, normalise=True)
    rows = jnp.array([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    unit, pull = jax.vjp(lambda x: network.apply(network.init(key), x)[0], rows)
    np.testing.assert_allclose(unit, [[0, 0, 0], [0.6, 0, 0.8]], atol=1e-7)
    assert bool(jnp.isfinite(pull(jnp.ones((2, 3)))[0]).all())


def test_no_bias_before_a_batch_norm_because_it_would_do_nothing(key):
    carp, plain = (functional(Head, 4, hidden=8, dim=2, norm=norm) for norm in ("batch", "none"))
    for network, expected in ((carp, [False, False, True]), (plain, [True, True, True])):
        params = jax.eval_shape(network.init, key)["params"]
        assert ["bias" in params[f"dense{i}"] for i in (1, 2, 3)] == expected


@pytest.mark.parametrize(("init", "deviation"), [("normal", 0.02), ("xavier", np.sqrt(2 / (200 + 100)))])
def test_initial_weights_have_the_stated_deviation(init, deviation, key):
    params = functional(HEADS["linear"], 200, dim=100, init=init).init(key)["params"]["dense1"]
    # four standard errors of a deviation over 20000 draws
    np.testing.assert_allclose(params["kernel"].std(), deviation, rtol=4 / np.sqrt(2 * 20000))
    assert not params["bias"].any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("carp", {"norm": "group"}, "head norm must be 'batch' or 'none'; given 'group'"),
        ("carp", {"init": "zeros"}, "head init must be one of 'normal', 'xavier'; given 'zeros'"),
        ("carp", {"dim": 0}, "dim >= 1; given 3, 2048, 0"),
        ("linear", {"layers": 0, "dim": 7}, "the identity head keeps the backbone's width 5; given dim=7"),
    ],
)
def test_bad_options(name, options, message, key):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functional(HEADS[name], 5, **options).init, key)
