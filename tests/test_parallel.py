"""Meshes and placement."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from protojax import parallel


@pytest.mark.parametrize(
    ("data", "proto", "shape"), [(-1, 1, (8, 1)), (2, -1, (2, 4)), (4, 2, (4, 2)), (-1, -1, (8, 1))]
)
def test_mesh_shapes(data, proto, shape):
    mesh = parallel.make_mesh(data, proto)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "proto")


def test_mesh_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"got 3 x 2, there are 8 devices"):
        parallel.make_mesh(3, 2)


def test_components_are_stored_once_and_the_rest_is_replicated():
    mesh = parallel.make_mesh(4, 2)
    shapes = {
        "estimator": {
            "components": {"mean": jax.ShapeDtypeStruct((16, 3), np.float32)},
            "inner": {"memory": {"rows": jax.ShapeDtypeStruct((32, 3), np.float32)}},
            "shared": {"center": jax.ShapeDtypeStruct((16,), np.float32)},
        },
        "params": {"components": jax.ShapeDtypeStruct((16, 3), np.float32)},
    }
    specs = jax.tree.map(lambda s: s.spec, parallel.state_shardings(mesh, shapes))
    assert specs["estimator"]["components"]["mean"] == P(("data", "proto"))
    assert specs["estimator"]["inner"]["memory"]["rows"] == P(("data", "proto"))
    assert specs["estimator"]["shared"]["center"] == P()
    assert specs["params"]["components"] == P()


def test_components_that_do_not_divide_are_refused():
    shapes = {"estimator": {"components": {"mean": jax.ShapeDtypeStruct((12, 3), np.float32)}}}
    with pytest.raises(ValueError, match=r"estimator/components/mean has 12 rows.*8 devices; use a multiple of 8"):
        parallel.state_shardings(parallel.make_mesh(), shapes)


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"data.batch_size = 12 does not divide over 8 devices; use a multiple of 8"):
        parallel.check_divisible(parallel.make_mesh(), **{"data.batch_size": 12})


def test_batches_are_split_over_all_devices():
    mesh = parallel.make_mesh(4, 2)
    batch = parallel.to_device(mesh, {"image": np.arange(16).reshape(16, 1)})
    assert len({s.device for s in batch["image"].addressable_shards}) == 8
    assert all(s.data.shape == (2, 1) for s in batch["image"].addressable_shards)
    assert np.array_equal(parallel.to_host(batch)["image"], np.arange(16).reshape(16, 1))
