"""The engine over 1, 2, 4 and 8 devices: the same numbers as one, and no more bytes than it says."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from protojax import parallel_engine
from protojax.ops.block import block_consistency
from protojax.ops.lse import lse, soft_cross_entropy
from protojax.ops.moments import accumulate
from protojax.ops.transport import balanced_potentials
from protojax.parallel import ALL, make_mesh

N, K, D, BLOCK = 64, 48, 6, 12
SHAPES = [(1, 1), (2, 1), (2, 2), (4, 2)]


def mesh_of(data: int, proto: int):
    return make_mesh(data, proto, jax.devices()[: data * proto])


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


def everything(student, teacher, prototypes, bias, mask, order):
    """Loss, gradients, statistics, block losses and potentials in one program."""

    def losses(student, prototypes, bias):
        entropy = jnp.mean(soft_cross_entropy(student, prototypes, bias, teacher, prototypes, bias))
        views = student.reshape(2, -1, D), teacher.reshape(2, -1, D)
        blocks = block_consistency(*views, (prototypes, bias), (prototypes, bias), mask[: N // 2], order, block=BLOCK)
        return entropy + jnp.mean(lse(student, prototypes, bias)) + blocks[0] + 3.0 * blocks[1], (entropy, blocks)

    value, gradients = jax.value_and_grad(losses, (0, 1, 2), has_aux=True)(student, prototypes, bias)
    moments, normaliser = accumulate(teacher, prototypes, bias, teacher**2, mask, second="diag")
    prior = jnp.full((K,), -math.log(K))
    potentials = balanced_potentials(teacher, prototypes, prior, jnp.zeros(K), temperature=0.5, iterations=4, mask=mask)
    return value, gradients, moments, normaliser, potentials


@pytest.mark.parametrize(("data", "proto"), SHAPES)
@pytest.mark.usefixtures("x64")
def test_equals_one_device(data, proto):
    mesh = mesh_of(data, proto)
    student, teacher, prototypes, bias = arrays((N, D), (N, D), (K, D), (K,))
    mask, order = jnp.arange(N) % 5 != 0, jnp.asarray(np.random.default_rng(1).permutation(K))
    expected = jax.jit(everything)(student, teacher, prototypes, bias, mask, order)

    def split(*arguments):
        with parallel_engine.engaged(mesh):
            return everything(*arguments)

    rows, components = NamedSharding(mesh, P(ALL)), NamedSharding(mesh, P(ALL))
    placed = [jax.device_put(a, rows) for a in (student, teacher)]
    placed += [jax.device_put(a, components) for a in (prototypes, bias)]
    found = jax.jit(split)(*placed, jax.device_put(mask, rows), order)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-11, atol=1e-12)
    if mesh.size > 1:  # the EM state is stored once
        statistics = found[2]
        assert all(leaf.addressable_shards[0].data.shape[0] == K // mesh.size for leaf in statistics)


COLLECTIVE = re.compile(
    r"= (?P<shapes>\(?[^=]*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
WIDTHS = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def collectives(program) -> dict[str, int]:
    """Bytes of the results of each kind of collective, per device, read from the compiled program."""
    found: dict[str, int] = {}
    for match in COLLECTIVE.finditer(program.as_text()):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match["shapes"]):
            size = math.prod(int(n) for n in sizes.split(",") if n) * WIDTHS[dtype]
            found[match["kind"]] = found.get(match["kind"], 0) + size
    return found


def compiled(mesh, function, *placed):
    """`function` split over `mesh`; placed = (shape, dtype, spec) of each argument."""

    def split(*arguments):
        with parallel_engine.engaged(mesh):
            return function(*arguments)

    arguments = [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in placed]
    return jax.jit(split).lower(*arguments).compile()


ROWS, COUNT, WIDTH = 1024, 4096, 64
FEATURES = ((ROWS, WIDTH), jnp.float32, P(ALL))
BOOK = ((COUNT, WIDTH), jnp.float32, P(ALL))
BIAS = ((COUNT,), jnp.float32, P(ALL))
MASK = ((ROWS,), jnp.bool, P(ALL))


@pytest.mark.parametrize(("data", "proto"), SHAPES[1:])
def test_e_step_sends_what_the_budget_says(data, proto):
    """K D 2 + K 4 bytes of prototypes (bfloat16) and bias, N D 4 + 2 N 4 of rows: no sum is ever all-reduced."""

    def e_step(features, prototypes, bias, mask):
        return accumulate(features, prototypes, bias, features, mask, second="spherical", matmul_dtype=jnp.bfloat16)

    program = compiled(mesh_of(data, proto), e_step, FEATURES, BOOK, BIAS, MASK)
    found = collectives(program)
    # The prototypes are cast before they are gathered.
    assert re.search(rf"\[{COUNT},{WIDTH}\]\S* all-gather\(%\w*convert", program.as_text())
    budget = COUNT * WIDTH * 2 + COUNT * 4 + ROWS * WIDTH * 4 + 2 * ROWS * 4
    assert set(found) == {"all-gather"}
    # XLA's CPU backend widens bfloat16 collectives to float32: the second bound is the same budget at that width.
    assert found["all-gather"] <= budget + COUNT * WIDTH * 2
    assert found["all-gather"] < 2 * COUNT * WIDTH * 4 + ROWS * WIDTH * 4


@pytest.mark.parametrize(("data", "proto"), [(4, 2)])
def test_block_losses_send_column_sums_and_no_probability(data, proto):
    """Decoupled: K + 1 numbers are summed over the devices; prototypes are gathered once a pass, rows never move."""

    def losses(student, teacher, prototypes, bias, mask, order):
        book = (prototypes, bias)
        return jax.value_and_grad(lambda s: sum(block_consistency(s, teacher, book, book, mask, order)))(student)

    views = ((2, ROWS // 2, WIDTH), jnp.float32, P(None, ALL))
    order = ((COUNT,), jnp.int32, P())
    mask = ((ROWS // 2,), jnp.bool, P(ALL))
    whole = [(shape, dtype, P()) for shape, dtype, _ in (BOOK, BIAS)]
    found = collectives(compiled(mesh_of(data, proto), losses, views, views, *whole, mask, order))
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"] <= COUNT * 4 + 64


def test_an_iteration_of_sinkhorn_combines_one_number_a_prototype():
    def potentials(features, prototypes, bias, mask):
        prior = jnp.full((COUNT,), -math.log(COUNT), jnp.float32)
        return balanced_potentials(features, prototypes, prior, bias, temperature=0.1, iterations=3, mask=mask)

    whole = [(shape, dtype, P()) for shape, dtype, _ in (BOOK, BIAS)]
    found = collectives(compiled(mesh_of(4, 2), potentials, FEATURES, *whole, MASK))
    # The loop's body is there once: a maximum and a sum of K numbers (and the number of rows, once).
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"] <= 2 * COUNT * 4 + 64


def test_losses_of_rows_move_no_rows():
    def losses(student, teacher, prototypes, bias):
        def loss(rows):
            return jnp.mean(soft_cross_entropy(rows, prototypes, bias, teacher, prototypes, bias))

        return jax.value_and_grad(loss)(student)

    whole = [(shape, dtype, P()) for shape, dtype, _ in (BOOK, BIAS)]
    found = collectives(compiled(mesh_of(4, 2), losses, FEATURES, FEATURES, *whole))
    assert found == {"all-reduce": 4}


@pytest.mark.parametrize(
    ("rows", "count", "message"),
    [(60, 48, "number of rows = 60 does not divide over 8 devices"), (64, 44, "number of prototypes = 44 does not")],
)
def test_sizes_that_do_not_divide_are_refused(rows, count, message):
    features, prototypes = jnp.ones((rows, D), jnp.float32), jnp.ones((count, D), jnp.float32)
    accumulate_over = parallel_engine.sharded_accumulate(mesh_of(4, 2))
    with pytest.raises(ValueError, match=f"{message}.*use a multiple of 8"):
        jax.eval_shape(accumulate_over, features, prototypes, prototypes[:, 0], features, jnp.ones(rows, bool))


def test_engine_ends_with_its_context():
    mesh = mesh_of(2, 1)
    features = jnp.ones((3, D), jnp.float32)
    with parallel_engine.engaged(mesh), pytest.raises(ValueError, match="does not divide"):
        lse(features, features, features[:, 0])
    assert lse(features, features, features[:, 0]).shape == (3,)
