"""One primitive: the streamed log-sum-exp and its attention forms against materialised twins, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.ops import kernels
from protojax.ops.lse import attend, expectation, lse, soft_cross_entropy, soft_cross_entropy_pairs
from protojax.ops.moments import accumulate
from tests.ops import twins
from tests.ops.cases import TILES, D, K, N, close, side, weights

pytestmark = pytest.mark.usefixtures("x64")


def check_values_and_gradients(ours, theirs, args, tolerance=1e-12):
    """Values, and the gradient of a random linear functional of them with respect to every argument."""

    def functional(function):
        def value(*args):
            results = jax.tree.leaves(function(*args))
            return sum(jnp.sum(r * weights(i, *r.shape)) for i, r in enumerate(results)), results

        return jax.jit(jax.value_and_grad(value, tuple(range(len(args))), has_aux=True))

    (_, values), gradients = functional(ours)(*args)
    (_, expected_values), expected_gradients = functional(theirs)(*args)
    for actual, expected in zip([*values, *gradients], [*expected_values, *expected_gradients], strict=True):
        close(actual, expected, tolerance)


@pytest.mark.parametrize("peaked", [False, True])
def test_lse(peaked):
    check_values_and_gradients(lambda *a: lse(*a, **TILES), twins.lse, side(0, peaked))


@pytest.mark.parametrize("peaked", [False, True])
def test_attend(peaked):
    check_values_and_gradients(lambda *a: attend(*a, **TILES), twins.attend, side(0, peaked))


@pytest.mark.parametrize("peaked", [False, True])
def test_attention_form_of_soft_cross_entropy(peaked):
    # Gradients with respect to all six arrays: those of the teacher must be exactly zero in both.
    args = (*side(0, peaked), *side(1, peaked))
    check_values_and_gradients(
        lambda *a: soft_cross_entropy(*a, **TILES), twins.soft_cross_entropy, args, 1e-11 if peaked else 1e-12
    )


def test_gradient_of_cross_entropy_is_difference_of_attention_outputs():
    student, teacher = side(0, False), side(1, False)
    gradient = jax.grad(lambda q: jnp.sum(soft_cross_entropy(q, *student[1:], *teacher, **TILES)))(student[0])
    _, own = attend(*student, **TILES)
    target, _ = expectation(*teacher, *student[1:], **TILES)
    close(gradient, own - target)


def test_cross_entropy_of_itself_is_entropy_and_its_gradient_vanishes():
    queries, prototypes, bias = side(0, False)
    loss, gradient = jax.value_and_grad(
        lambda q: jnp.sum(soft_cross_entropy(q, prototypes, bias, queries, prototypes, bias, **TILES))
    )(queries)
    share = jax.nn.softmax(twins.logits(queries, prototypes, bias), axis=1)
    close(loss, -jnp.sum(share * jnp.log(share)))
    close(gradient, jnp.zeros((N, D)))


def test_pairs_of_views_equal_separate_losses():
    (_, prototypes, bias), teacher = side(0, False), side(1, False)
    views, targets = weights(2, 3, N, D), weights(3, 2, N, D)

    def pairs(views, prototypes):
        losses = soft_cross_entropy_pairs((views, prototypes, bias), (targets, *teacher[1:]), **TILES)
        return jnp.sum(losses * weights(4, 3, 2, N)), losses

    def separate(views, prototypes):
        losses = [[twins.soft_cross_entropy(s, prototypes, bias, t, *teacher[1:]) for t in targets] for s in views]
        losses = jnp.stack([jnp.stack(row) for row in losses])
        return jnp.sum(losses * weights(4, 3, 2, N)), losses

    (_, losses), gradients = jax.value_and_grad(pairs, (0, 1), has_aux=True)(views, prototypes)
    (_, expected), expected_gradients = jax.value_and_grad(separate, (0, 1), has_aux=True)(views, prototypes)
    close(losses, expected)
    jax.tree.map(close, gradients, expected_gradients)


def test_gradient_of_lse_is_the_e_step():
    """d sum_n w_n lse_n: bias -> n_k, prototypes -> m1_k, second-order parameters -> m2_k (performance notes, 1)."""
    rng = np.random.default_rng(0)
    features, weight = jnp.asarray(rng.normal(size=(N, D))), jnp.asarray((rng.random(N) < 0.7).astype(np.float64))
    natural = jnp.asarray(rng.normal(size=(K, 2 * D))) - 1.0
    bias = jnp.asarray(rng.normal(size=K))
    queries = jnp.concatenate([features, features**2], axis=1)
    by_natural, by_bias = jax.grad(lambda m, c: jnp.sum(weight * lse(queries, m, c, **TILES)), (0, 1))(natural, bias)
    statistics, _ = accumulate(queries, natural, bias, features, weight > 0, second="diag", **TILES)
    close(by_bias, statistics.count)
    close(by_natural[:, :D], statistics.first)
    close(by_natural[:, D:], statistics.second)


def test_permuting_prototypes_changes_nothing_and_permutes_gradients():
    queries, prototypes, bias = side(0, False)
    order = np.random.default_rng(1).permutation(K)
    gradient = jax.grad(lambda m, c: jnp.sum(lse(queries, m, c, **TILES)))
    close(lse(queries, prototypes[order], bias[order], **TILES), lse(queries, prototypes, bias, **TILES))
    close(gradient(prototypes[order], bias[order]), gradient(prototypes, bias)[order])


def test_logits_of_ten_thousand_stay_finite():
    queries = jnp.asarray([[1e2], [-1e2], [1.0]], jnp.float32)
    prototypes = jnp.asarray([[1e2], [-1e2], [0.0]], jnp.float32)
    bias = jnp.asarray([0.0, 0.0, -1e4], jnp.float32)

    def value(queries, prototypes, bias):
        entropy = soft_cross_entropy(queries, prototypes, bias, queries, prototypes, bias, tile=2)
        return jnp.sum(lse(queries, prototypes, bias, tile=2)) + jnp.sum(entropy)

    found, gradients = jax.value_and_grad(value, (0, 1, 2))(queries, prototypes, bias)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(lse(queries, prototypes, bias, tile=2), [1e4, 1e4, 100.0])
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in (found, *gradients))


def test_excluded_prototypes_count_nothing():
    queries, prototypes, bias = side(0, False)
    open_ones = np.arange(K) % 3 != 0
    shut = jnp.where(jnp.asarray(open_ones), bias, -jnp.inf)
    kept = (queries, prototypes[open_ones], bias[open_ones])
    close(lse(queries, prototypes, shut, **TILES), twins.lse(*kept))
    both = soft_cross_entropy(queries, prototypes, shut, queries, prototypes, shut, **TILES)
    close(both, twins.soft_cross_entropy(*kept, *kept))
    nothing = jnp.full((K,), -jnp.inf)
    value, gradients = jax.value_and_grad(lambda q, m: jnp.sum(jnp.exp(lse(q, m, nothing, **TILES))), (0, 1))(
        queries, prototypes
    )
    assert value == 0.0
    assert all(bool(jnp.all(g == 0.0)) for g in gradients)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_rows_that_are_not_finite_stay_in_their_row(value):
    queries, prototypes, bias = side(0, False)
    found = lse(queries.at[3].set(value), prototypes, bias, **TILES)
    assert not bool(jnp.isfinite(found[3]))
    close(jnp.delete(found, 3), jnp.delete(twins.lse(queries, prototypes, bias), 3))


def test_single_prototype_and_no_rows():
    queries, prototypes, bias = side(0, False)
    close(lse(queries, prototypes[:1], bias[:1]), twins.logits(queries, prototypes[:1], bias[:1])[:, 0])
    entropy = soft_cross_entropy(queries, prototypes[:1], bias[:1], queries, prototypes[:1], bias[:1])
    close(entropy, jnp.zeros(N))
    assert lse(queries[:0], prototypes, bias).shape == (0,)
    gradient = jax.grad(lambda m: jnp.sum(lse(queries[:0], m, bias)))(prototypes)
    assert bool(jnp.all(gradient == 0.0))


def test_bfloat16_operands_accumulate_in_float32():
    """With bfloat16 operands the result is that of rounded operands in exact arithmetic: nothing after the product is
    rounded to bfloat16 (an LSE in bfloat16 would be off by 2^-9 relative)."""
    queries, prototypes, bias = (a.astype(jnp.float32) for a in side(0, False, width=64))
    found = lse(queries, prototypes, bias, matmul_dtype=jnp.bfloat16, **TILES)
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float64) for a in (queries, prototypes)]
    expected = twins.lse(*rounded, bias.astype(jnp.float64))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=5e-6)
    native = lse(queries.astype(jnp.bfloat16), prototypes.astype(jnp.bfloat16), bias, **TILES)
    np.testing.assert_array_equal(native, found)


def test_unwanted_gradients_cost_no_sweep():
    """Decoupled: only the queries are differentiated, and the backward pass must then hold no loop."""
    queries, prototypes, bias = side(0, False)

    def loss(queries):
        return jnp.sum(lse(queries, prototypes, bias, **TILES))

    _, pull = jax.vjp(loss, queries)
    backward = str(jax.make_jaxpr(pull)(jnp.ones(())))
    assert "scan" not in backward
    assert "while" not in backward


def test_works_under_vmap_and_jit():
    queries, prototypes, bias = side(0, False)
    seeds = jnp.stack([prototypes, 2.0 * prototypes])
    found = jax.jit(jax.vmap(jax.grad(lambda m: jnp.sum(lse(queries, m, bias, **TILES)))))(seeds)
    for one, expected in zip(found, seeds, strict=True):
        close(one, jax.grad(lambda m: jnp.sum(twins.lse(queries, m, bias)))(expected))


def test_policy_around_a_program_is_the_option_of_every_call():
    """`products_in` stands in for a missing `matmul_dtype`, leaves a given one and float64 alone, and ends."""
    wide = side(0, False, width=64)
    narrow = tuple(a.astype(jnp.float32) for a in wide)
    with kernels.products_in(jnp.bfloat16):
        found, named, double = lse(*narrow), lse(*narrow, matmul_dtype=jnp.float32), lse(*wide)
    np.testing.assert_array_equal(found, lse(*narrow, matmul_dtype=jnp.bfloat16))
    np.testing.assert_array_equal(named, lse(*narrow))
    np.testing.assert_array_equal(double, lse(*wide))
    assert float(jnp.max(jnp.abs(found - named))) > 1e-4
    with pytest.raises(TypeError, match=r"matmul_dtype must be .* got float16"), kernels.products_in(jnp.float16):
        pass
