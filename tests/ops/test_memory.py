"""What the compiled programs hold: no buffer of N x K elements, temporaries under the target and flat in N.

Programs are lowered and compiled from shapes alone; nothing here is executed."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

from protojax.ops.block import block_consistency
from protojax.ops.lse import attend, soft_cross_entropy
from protojax.ops.moments import accumulate
from protojax.ops.transport import balanced_potentials
from tests.ops import twins

WIDTH = 256


def loss_and_em(student, teacher, prototypes, bias, mask):
    """Soft cross-entropy with its gradient, and an E-step's statistics, in one program."""

    def loss(rows):
        return jnp.mean(soft_cross_entropy(rows, prototypes, bias, teacher, prototypes, bias))

    value, gradient = jax.value_and_grad(loss)(student)
    return value, gradient, accumulate(teacher, prototypes, bias, teacher, mask, second="spherical")


def materialised(student, teacher, prototypes, bias, mask):
    def loss(rows):
        return jnp.mean(twins.soft_cross_entropy(rows, prototypes, bias, teacher, prototypes, bias))

    value, gradient = jax.value_and_grad(loss)(student)
    statistics = twins.moments(teacher, prototypes, bias, teacher, mask.astype(jnp.float32))
    return value, gradient, statistics, twins.lse(teacher, prototypes, bias)


def carp(student, teacher, prototypes, bias, mask):
    views = student.reshape(2, -1, WIDTH), teacher.reshape(2, -1, WIDTH)

    def loss(student, prototypes):
        order = jnp.arange(prototypes.shape[0])
        return sum(block_consistency(student, views[1], (prototypes, bias), (prototypes, bias), mask[::2], order))

    return jax.value_and_grad(loss, (0, 1))(views[0], prototypes)


def joint(student, teacher, prototypes, bias, mask):
    """Every array differentiated."""

    def loss(student, prototypes, bias):
        lse, output = attend(student, prototypes, bias)
        entropy = soft_cross_entropy(student, prototypes, bias, teacher, prototypes, bias)
        return jnp.sum(lse) + jnp.sum(output * teacher) + jnp.sum(entropy)

    return jax.grad(loss, (0, 1, 2))(student, prototypes, bias)


def balanced(student, teacher, prototypes, bias, mask):
    return balanced_potentials(teacher, prototypes, bias, bias, temperature=0.1, iterations=3, mask=mask)


def compiled(function, rows: int, count: int):
    shape = jax.ShapeDtypeStruct
    features = shape((rows, WIDTH), jnp.float32)
    arguments = (features, features, shape((count, WIDTH), jnp.float32), shape((count,), jnp.float32))
    return jax.jit(function).lower(*arguments, shape((rows,), jnp.bool)).compile()


def largest_buffer(program) -> int:
    """Elements of the largest array named anywhere in the compiled program."""
    shapes = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]", program.as_text())
    assert len(shapes) > 10
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


@pytest.mark.parametrize("function", [loss_and_em, carp, joint, balanced], ids=lambda f: f.__name__)
def test_no_buffer_of_rows_times_prototypes(function):
    rows, count = 4096, 16_384
    assert largest_buffer(compiled(function, rows, count)) < rows * count / 8


def test_the_check_sees_a_materialised_table():
    assert largest_buffer(compiled(materialised, 512, 1024)) >= 512 * 1024


def test_memory_target_of_loss_and_em():
    """N = 16,384 rows, K = 262,144, D = 256: under 2 GB, 30x under the materialised twin, flat in N."""
    rows, count = 16_384, 262_144
    ours, doubled, twin = (
        compiled(function, n, count).memory_analysis().temp_size_in_bytes
        for function, n in ((loss_and_em, rows), (loss_and_em, 2 * rows), (materialised, rows))
    )
    table = 4 * count * WIDTH  # the accumulator of the first moments
    assert ours < 2e9
    assert doubled - ours < 0.05 * ours
    assert ours - table < (twin - table) / 30


def test_block_loss_is_flat_in_rows_and_prototypes():
    def temporaries(rows, count):
        def loss(student, teacher, prototypes, bias, mask):
            views, book = (a.reshape(2, -1, WIDTH) for a in (student, teacher)), (prototypes, bias)
            student, teacher = views
            losses = lambda s: sum(block_consistency(s, teacher, book, book, mask[::2], jnp.arange(count)))  # noqa: E731
            return jax.value_and_grad(losses)(student)

        return compiled(loss, rows, count).memory_analysis().temp_size_in_bytes

    small = temporaries(4096, 16_384)
    assert small < 4096 * 16_384 * 4 / 8
    assert temporaries(16_384, 16_384) < 1.2 * small
    # Grows only by the column means, K numbers.
    assert temporaries(4096, 65_536) < small + 4 * 4 * 65_536
