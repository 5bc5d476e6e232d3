"""A step in micro-batches is the step of the whole batch, for a loss that looks across rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax import accumulation, experiment
from protojax import step as step_lib
from tests.process_worker import linear
from tests.toy import toy_config


def test_split_and_merge_are_inverse_and_keep_every_devices_rows():
    tree = {"views": jnp.arange(2 * 8 * 3).reshape(2, 8, 3), "rows": jnp.arange(8), "scale": jnp.ones(5)}
    axes = accumulation.batch_axes(tree, 8)
    assert axes == {"views": 1, "rows": 0, "scale": -1}
    parts = accumulation.split(tree, axes, 4)
    # Device d of 2 holds rows 4d to 4d+3: every micro-batch has as many of them as of the other's.
    assert parts["rows"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert parts["views"].shape == (4, 2, 2, 3)
    back = accumulation.merge(parts, axes)
    assert all(np.array_equal(back[k], tree[k]) for k in tree)


def test_one_step_in_micro_batches_is_the_step():
    """CARP's loss has the mean probability of the whole batch in it, so no mean over micro-batches could do this."""
    recipe = linear(experiment.build(toy_config(data__batch_size=16)))
    batch = {k: jnp.asarray(v) for k, v in recipe.sources["train"].batch(0).items()}
    batch["mask"] = batch["mask"].at[5].set(False)
    state = jax.jit(lambda b: step_lib.init_state(recipe, b))(batch)

    def stepped(count: int):
        parted = recipe._replace(micro_batches=count)
        return jax.jit(lambda s, b: step_lib.step(parted, s, b)[:2])(state, batch)

    (whole, numbers), (parts, again) = stepped(1), stepped(4)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(parts), strict=True):
        # Sums of 32 rows in another order, through an optimiser that divides by the gradient's own size.
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    for name in ("loss/total", "grad_norm"):
        np.testing.assert_allclose(numbers[name][0] / numbers[name][1], again[name][0] / again[name][1], rtol=1e-5)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match=r"two axes of the batch size 8; use another batch size"):
        accumulation.batch_axes({"x": jnp.zeros((8, 8))}, 8)
    with pytest.raises(ValueError, match=r"micro_batches = 4 does not divide the 2 rows of a device"):
        accumulation.check(4, 16, 8)
    assert accumulation.warning({}) == ""
    assert "batch norm" in accumulation.warning({"mean": jnp.zeros(3)})
