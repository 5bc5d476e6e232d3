"""Which patches a student does not see: blocks, as many of them in every image."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from protojax.api import Array, Key

ASPECT = (0.3, 1.0 / 0.3)  # of a block, as in BEiT


def masked_count(grid: tuple[int, int], ratio: float) -> int:
    """Patches that are hidden of a grid (rows, columns): ratio of them, one at least, and never all."""
    total = grid[0] * grid[1]
    return min(max(1, round(ratio * total)), total - 1)


def block_positions(key: Key, views: int, images: int, grid: tuple[int, int], ratio: float, blocks: int) -> Array:
    """int32 [views, images, n], ascending: positions (row by row) of the n = `masked_count` patches that are hidden.

    Blockwise masking (Bao et al. 2022, BEiT; iBOT) with a number that is the same in every image, so that shapes are
    static: `blocks` rectangles, each of n / blocks patches on average, aspect ratio log-uniform in ASPECT, anywhere in
    the grid (cut off at its edge). Their patches are hidden first, in random order, then others until there are n.
    Deterministic in the key.
    """
    rows, columns = grid
    count = masked_count(grid, ratio)
    area = count / blocks

    def one(key: Key) -> Array:
        key_shape, key_place, key_order = jax.random.split(key, 3)
        low, high = (jnp.log(a) for a in ASPECT)
        aspect = jnp.exp(jax.random.uniform(key_shape, (blocks,), minval=low, maxval=high))
        height, width = (
            jnp.clip(jnp.round(side), 1, limit)
            for side, limit in ((jnp.sqrt(area * aspect), rows), (jnp.sqrt(area / aspect), columns))
        )
        place = jax.random.uniform(key_place, (2, blocks))
        top, left = jnp.floor(place[0] * (rows - height + 1)), jnp.floor(place[1] * (columns - width + 1))
        r, c = (axis.reshape(-1)[:, None].astype(height.dtype) for axis in jnp.mgrid[:rows, :columns])
        down, right = (r - top[None, :], c - left[None, :])
        inside = ((down >= 0) & (down < height[None, :]) & (right >= 0) & (right < width[None, :])).any(1)
        order = jax.random.uniform(key_order, (rows * columns,)) + jnp.where(inside, 0.0, 1.0)
        return jnp.sort(jnp.argsort(order)[:count]).astype(jnp.int32)

    keys = jax.random.split(key, (views, images))
    return jax.vmap(jax.vmap(one))(keys)
