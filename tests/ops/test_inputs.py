"""Bad arguments: the message says what was expected, what came, and what to do; raised while tracing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from protojax.ops.block import block_consistency
from protojax.ops.gaussian import gaussian_scores
from protojax.ops.lse import attend, expectation, lse, soft_cross_entropy, soft_cross_entropy_pairs
from protojax.ops.moments import accumulate
from protojax.ops.transport import balanced_potentials

Q, M, C, H, W = jnp.ones((6, 4)), jnp.ones((8, 4)), jnp.ones((8,)), jnp.ones((6, 4)), jnp.ones((6,), bool)
BOOK = (M, C)
VIEWS = jnp.ones((2, 6, 4))
ORDER = jnp.arange(8)


def carp(student=VIEWS, teacher=VIEWS, prediction=BOOK, target=BOOK, mask=W, order=ORDER, block=4):
    return block_consistency(student, teacher, prediction, target, mask, order, block=block)


CASES = {
    "integers": (lambda: lse(Q.astype(jnp.int32), M, C), TypeError, r"queries must be .* got int32.*astype"),
    "half": (lambda: lse(Q, M.astype(jnp.float16), C), TypeError, "prototypes must be .* got float16"),
    "rank": (lambda: lse(Q[0], M, C), ValueError, r"queries must have 2 axes, got shape \(4,\)"),
    "bias_rank": (lambda: attend(Q, M, C[:, None]), ValueError, r"bias must have 1 axes, got shape \(8, 1\)"),
    "width": (lambda: lse(Q[:, :3], M, C), ValueError, "same width.*D = 4"),
    "empty": (lambda: lse(Q, M[:0], C[:0]), ValueError, r"at least one row.*K = 0"),
    "bias": (lambda: lse(Q, M, C[:5]), ValueError, r"one value a prototype \(\[8\]\), got shape \(5,\)"),
    "tile": (lambda: lse(Q, M, C, tile=0), ValueError, "tile must be an integer of at least 1, got 0"),
    "row_tile": (lambda: lse(Q, M, C, row_tile=-2), ValueError, "row_tile must be an integer of at least 1"),
    "policy": (lambda: lse(Q, M, C, matmul_dtype=jnp.float16), TypeError, "matmul_dtype must be .* got float16"),
    "sides": (lambda: soft_cross_entropy(Q, M, C, Q[:3], M, C), ValueError, "the same rows against the same number"),
    "books": (lambda: soft_cross_entropy(Q, M, C, Q, M[:5], C[:5]), ValueError, "the same rows against the same numb"),
    "teacher": (lambda: soft_cross_entropy(Q, M, C, Q[:, :3], M, C), ValueError, "teacher_queries and teacher_proto"),
    "pairs": (lambda: soft_cross_entropy_pairs((VIEWS, *BOOK), (VIEWS[:, :3], *BOOK)), ValueError, "agree on B and K"),
    "values": (lambda: expectation(Q, M, C, M[:5], C), ValueError, r"one row a prototype \(8\)"),
    "mask": (lambda: accumulate(Q, M, C, H, W[:3]), ValueError, r"mask must have one value a row \(6\), got"),
    "rows_of_features": (lambda: accumulate(Q, M, C, H[:3], W[:3]), ValueError, r"features must have one row a query"),
    "second": (lambda: accumulate(Q, M, C, H, W, second="full"), ValueError, "'diag', 'spherical', 'tied' or 'none'"),
    "normaliser": (
        lambda: accumulate(Q, M, C, H, W, log_normaliser=C),
        ValueError,
        r"log_normaliser must hold one value a row \(6\)",
    ),
    "covariance": (lambda: gaussian_scores(H, M, M, C, covariance="full"), ValueError, "'diag', 'spherical' or 'tied'"),
    "variances": (lambda: gaussian_scores(H, M, C[:4], C), ValueError, "variances must have 2 axes"),
    "variance_shape": (lambda: gaussian_scores(H, M, M[:5], C), ValueError, r"needs variances of shape \(8, 4\)"),
    "means": (lambda: gaussian_scores(H, M[:0], M[:0], C[:0]), ValueError, "K = 0"),
    "features": (lambda: gaussian_scores(H[:, :2], M, M, C), ValueError, "features and means must have the same width"),
    "block": (lambda: carp(block=3), ValueError, r"multiple of block, got K = 8 and block = 3: set K to 6 or 9"),
    "one_view": (lambda: carp(VIEWS[:1], VIEWS[:1]), ValueError, "at least 2 student views and 1 teacher view"),
    "teacher_views": (lambda: carp(VIEWS, jnp.ones((3, 6, 4))), ValueError, r"teacher must be \[T,B,D\] with T <= S"),
    "carp_mask": (lambda: carp(mask=W[:2]), ValueError, r"mask must have one value an image \(6\)"),
    "order": (lambda: carp(order=ORDER[:4]), ValueError, "must agree on K"),
    "codebook": (lambda: carp(prediction=(M[:, :3], C)), ValueError, r"prediction must be \(prototypes \[K,4\], bias"),
    "iterations": (
        lambda: balanced_potentials(Q, M, C, C, temperature=0.1, iterations=-1),
        ValueError,
        "iterations must be 0 or more",
    ),
    "prior": (
        lambda: balanced_potentials(Q, M, C[:3], C, temperature=0.1, iterations=1),
        ValueError,
        "log_prior must have the shape of potentials",
    ),
    "rows": (
        lambda: balanced_potentials(Q, M, C, C, temperature=0.1, iterations=1, mask=C),
        ValueError,
        r"mask must have one value a row \(6\)",
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_message(name):
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        jax.eval_shape(call)
