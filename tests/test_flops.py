"""Operations counted from the traced program: the formulas, loops, and the compiler's own count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import flops, parallel
from protojax.gauges import Gauges


def test_products_loops_and_branches():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
    assert flops.count(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5 * 6

    def loop(x):
        return jax.lax.scan(lambda c, _: (c @ jnp.eye(4), None), x, None, length=7)[0]

    assert flops.count(loop, jnp.zeros((2, 4))) == 7 * 2 * 2 * 4 * 4

    def branch(p, x):
        return jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert flops.count(branch, True, jnp.zeros((4, 4))) == 2 * 2 * 64


def test_training_a_small_net_costs_what_the_compiler_says():
    """Convolution, its two gradients, and a product: the compiler also counts element-wise operations."""

    def loss(params, images):
        x = jax.lax.conv_general_dilated(
            images, params["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.square(x.reshape(len(x), -1) @ params["dense"]))

    params = {"kernel": jnp.ones((3, 3, 8, 16)), "dense": jnp.ones((8 * 8 * 16, 64))}
    images = jnp.ones((4, 16, 16, 8))
    ours = flops.count(jax.grad(loss), params, images)
    theirs = jax.jit(jax.grad(loss)).lower(params, images).compile().cost_analysis()["flops"]
    # At the edges the kernel hangs over the image: the compiler leaves those products out, the formula does not.
    assert ours == pytest.approx(theirs, rel=0.12)


def test_gauges_say_the_share_of_the_peak_only_where_it_is_known(tmp_path, monkeypatch):
    assert flops.peak(type("D", (), {"device_kind": "NVIDIA H200"})()) == 989e12
    gauge = Gauges(tmp_path, 8, lambda: 4e12)
    assert "mfu" not in gauge.read(100.0)
    monkeypatch.setattr(flops, "peak", lambda device: 1e13)
    many = Gauges(tmp_path, 8, lambda: 4e12)
    assert many.read(16.0)["mfu"] == pytest.approx(4e12 * 2 / (1e13 * jax.device_count()))


def test_fsdp_splits_large_encoder_arrays_wherever_they_occur():
    mesh = parallel.make_mesh()
    net = {"encoder": {"kernel": jax.ShapeDtypeStruct((3, 128, 256), np.float32),
                       "bias": jax.ShapeDtypeStruct((256,), np.float32),
                       "odd": jax.ShapeDtypeStruct((129, 131), np.float32)},
           "head": {"prototypes": jax.ShapeDtypeStruct((512, 64), np.float32)}}  # fmt: skip
    shapes = {"params": net, "teacher": {"params": net}, "opt": ({"mu": net},), "stats": net["encoder"]}
    split = jax.tree.map(lambda s: s.spec, parallel.state_shardings(mesh, shapes, fsdp=True))
    whole = jax.tree.map(lambda s: s.spec, parallel.state_shardings(mesh, shapes))
    none, last = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(None, None, parallel.ALL)
    for tree in (split["params"], split["teacher"]["params"], split["opt"][0]["mu"]):
        assert tree["encoder"] == {"kernel": last, "bias": none, "odd": none}
        assert tree["head"]["prototypes"] == none
    assert split["stats"]["kernel"] == none
    assert set(jax.tree.leaves(whole, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))) == {none}
