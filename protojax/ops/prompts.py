"""Array maths of sub-prompts: C classes of K unit prompts each, prompts_ck = unit(base_c + offsets_ck).

Letters: B images, C classes, K sub-prompts a class, D width. No array of B x C x K elements is ever made: classes are
scored in chunks, forward and backward, and the prompts themselves exist one chunk at a time.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from protojax.ops.unit import unit

Array = jax.Array
Key = jax.Array

POOLS = ("max", "lse")
CHUNK_ELEMENTS = 2**21  # prompts held at once: 8 MiB in float32, with its temporaries far below the offsets themselves
USAGE_FLOOR = 1e-8


def prompts_of(base: Array, offsets: Array) -> Array:
    """unit(base [..., D] + offsets [..., K, D]): unit prompts [..., K, D]."""
    return unit(base[..., None, :].astype(offsets.dtype) + offsets)


# ------------------------------------------------------------------------------------------------ own class
@jax.custom_vjp
def own_rows(offsets: Array, labels: Array) -> tuple[Array, Array]:
    """(offsets [C,K,D] itself, offsets of each image's class [B,K,D]).

    The point is the gradient: the rows' cotangents are added into the one of the whole array where it stands, so that
    a term which reads B classes touches B classes and no second array of C x K x D is made. Use the returned offsets
    for everything else that reads them.
    """
    return offsets, offsets[labels]


def _own_forward(offsets, labels):
    return (offsets, offsets[labels]), labels


def _own_backward(labels, cotangents):
    whole, rows = cotangents
    return whole.at[labels].add(rows), None


own_rows.defvjp(_own_forward, _own_backward)


# ---------------------------------------------------------------------------------------------- class scores
def class_scores(images: Array, base: Array, offsets: Array, *, scale: float = 1.0, pool: str = "max",
                 chunk: int | None = None) -> Array:  # fmt: skip
    """Score of each class, scale * max_k <x_b, prompts_ck> [B,C], classes in chunks.

    images [B,D] and base [C,D] are frozen: a gradient reaches `offsets` [C,K,D] alone, recomputed chunk by chunk.
    pool: 'max', or 'lse' = ln mean_k exp(scale <x, p>): a mean, so that K does not change the scale.
    chunk: classes at once; None: as many as keep 2^21 elements of prompts.

    Raises ValueError for another pool and for shapes that do not fit.
    """
    if pool not in POOLS:
        raise ValueError(f"class_scores, pool: expected one of {list(POOLS)}, got {pool!r}.")
    if offsets.ndim != 3 or base.shape != (offsets.shape[0], offsets.shape[2]) or images.shape[-1] != base.shape[-1]:
        raise ValueError(
            f"class_scores: expected images [B,D], base [C,D], offsets [C,K,D], got {images.shape}, {base.shape}, "
            f"{offsets.shape}."
        )
    classes, count, width = offsets.shape
    size = chunk or max(1, CHUNK_ELEMENTS // (count * width))
    return _class_scores(images, base, offsets, float(scale), pool, min(int(size), classes))


def _pooled(images: Array, base: Array, offsets: Array, scale: float, pool: str) -> Array:
    """Scores [B,c] of the classes of one chunk."""
    similarity = scale * jnp.einsum("bd,ckd->bck", images.astype(offsets.dtype), prompts_of(base, offsets),
                                    preferred_element_type=offsets.dtype)  # fmt: skip
    if pool == "max":
        return jnp.max(similarity, axis=2)
    return jax.nn.logsumexp(similarity, axis=2) - math.log(similarity.shape[2])


def _starts(classes: int, chunk: int) -> tuple[int, int]:
    """(number of chunks, first class of the last chunk): the last one overlaps its neighbour where C / chunk is no
    whole number, because padding would copy the offsets."""
    return -(-classes // chunk), classes - chunk


def _slice(base: Array, offsets: Array, i: Array, chunk: int) -> tuple[Array, Array, Array]:
    start = jnp.minimum(i * chunk, _starts(offsets.shape[0], chunk)[1])
    return (
        lax.dynamic_slice_in_dim(base, start, chunk, 0),
        lax.dynamic_slice_in_dim(offsets, start, chunk, 0),
        start,
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _class_scores(images, base, offsets, scale, pool, chunk):
    classes = offsets.shape[0]
    chunks, _ = _starts(classes, chunk)
    if chunks == 1:
        return _pooled(images, base, offsets, scale, pool)

    def body(i: Array, scores: Array) -> Array:
        base_c, offsets_c, start = _slice(base, offsets, i, chunk)
        return lax.dynamic_update_slice_in_dim(scores, _pooled(images, base_c, offsets_c, scale, pool), start, 1)

    return lax.fori_loop(0, chunks, body, jnp.zeros((images.shape[0], classes), offsets.dtype))


def _scores_forward(images, base, offsets, scale, pool, chunk):
    return _class_scores(images, base, offsets, scale, pool, chunk), (images, base, offsets)


def _scores_backward(scale, pool, chunk, residuals, cotangent):
    images, base, offsets = residuals
    classes = offsets.shape[0]
    chunks, _ = _starts(classes, chunk)

    def body(i: Array, gradient: Array) -> Array:
        base_c, offsets_c, start = _slice(base, offsets, i, chunk)
        bar = lax.dynamic_slice_in_dim(cotangent, start, chunk, 1)
        _, pull = jax.vjp(lambda o: _pooled(images, base_c, o, scale, pool), offsets_c)
        # Where the last chunk overlaps, its classes get the same value again: written, not added.
        return lax.dynamic_update_slice_in_dim(gradient, pull(bar)[0], start, 0)

    if chunks == 1:
        _, pull = jax.vjp(lambda o: _pooled(images, base, o, scale, pool), offsets)
        gradient = pull(cotangent)[0]
    else:
        gradient = lax.fori_loop(0, chunks, body, jnp.zeros_like(offsets))
    return jnp.zeros_like(images), jnp.zeros_like(base), gradient


_class_scores.defvjp(_scores_forward, _scores_backward)


# ---------------------------------------------------------------------------------------------------- E-step
def e_step_logits(images: Array, centre: Array, prompts: Array, usage: Array, *, sharpness: Array | float,
                  price: float = 0.0, prior: Array | None = None) -> Array:  # fmt: skip
    """sharpness <x_b - centre_b, prompts_bk> - price ln((usage_bk + 1e-8) / prior_bk) [B,K].

    images, centre [B,D]; prompts [B,K,D] and usage, prior [B,K] those of the image's class; sharpness = scale / tau.
    prior None: uniform, 1/K."""
    logits = sharpness * jnp.einsum("bd,bkd->bk", images - centre, prompts)
    if price == 0.0:
        return logits
    expected = 1.0 / prompts.shape[1] if prior is None else prior
    return logits - price * jnp.log((usage + USAGE_FLOOR) / expected)


def entropy(shares: Array, axis: int = -1) -> Array:
    """-sum p ln p in nats, 0 ln 0 = 0, with a finite gradient at 0."""
    safe = jnp.where(shares > 0, shares, jnp.ones((), shares.dtype))
    return -jnp.sum(shares * jnp.log(safe), axis=axis)


# ------------------------------------------------------------------------------------------------- beginnings
OFFSET_INITS = ("normal", "orthogonal", "zero", "plus_plus")


def normal_offsets(key: Key, shape: tuple[int, int, int], std: float) -> Array:
    """N(0, std^2): prompts of one class then have cosine 1 / (1 + D std^2)."""
    return std * jax.random.normal(key, shape, jnp.result_type(float))


def orthogonal_offsets(key: Key, shape: tuple[int, int, int], std: float) -> Array:
    """K orthogonal rows in each class, of norm std sqrt(D). (A library's initialiser would flatten the last two axes
    and make classes orthogonal instead.) Raises ValueError for K > D."""
    classes, count, width = shape
    if count > width:
        raise ValueError(f"orthogonal offsets: at most D = {width} rows of a class are orthogonal, got K = {count}.")

    def one(key: Key) -> Array:
        basis, triangle = jnp.linalg.qr(jax.random.normal(key, (width, count), jnp.result_type(float)))
        return (basis * jnp.sign(jnp.diagonal(triangle))[None, :]).T

    return std * width**0.5 * lax.map(one, jax.random.split(key, classes))


def plus_plus_offsets(key: Key, images: Array, labels: Array, class_mean: Array, count: int, std: float) -> Array:
    """Offsets [C,K,D] that point at images of their class far apart from one another, of norm std sqrt(D).

    Rows are unit centred features unit(x - class_mean_y) of images of the class: the first uniform, each further one
    with probability proportional to min over those chosen of (1 - cos)^2 (k-means++ on directions). A class with fewer
    than K distinct images gets random directions for the rest. K passes over the images, all classes at once.
    """
    classes, width = class_mean.shape
    dtype = jnp.result_type(float)
    rows = unit((images - class_mean[labels]).astype(dtype))

    def draw(key: Key, weight: Array) -> tuple[Array, Array]:
        """(chosen row of each class [C], whether it had any with weight): argmax of ln w + Gumbel noise."""
        noise = jax.random.gumbel(key, weight.shape, dtype)
        scores = jnp.where(weight > 0, jnp.log(jnp.maximum(weight, jnp.finfo(dtype).tiny)) + noise, -jnp.inf)
        best = jax.ops.segment_max(scores, labels, classes)
        winner = (scores == best[labels]) & (weight > 0)
        index = jnp.where(winner, jnp.arange(len(labels)), len(labels))
        first = jax.ops.segment_min(index, labels, classes)
        found = first < len(labels)
        return jnp.where(found, first, 0), found

    def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        offsets, weight = carry
        key_draw, key_spare = jax.random.split(jax.random.fold_in(key, k))
        chosen, found = draw(key_draw, weight)
        spare = unit(jax.random.normal(key_spare, (classes, width), dtype))
        centre = jnp.where(found[:, None], rows[chosen], spare)
        distance = (1.0 - jnp.sum(rows * centre[labels], axis=1)) ** 2
        # A row that is chosen, and its copies, are out for good: rounding must not keep them in.
        distance = jnp.where(distance < 1e-10, jnp.zeros_like(distance), distance)
        return lax.dynamic_update_slice_in_dim(offsets, centre[:, None], k, 1), jnp.minimum(weight, distance)

    start = (jnp.zeros((classes, count, width), dtype), jnp.ones((len(labels),), dtype))
    # The first pass sees equal weights; 4 is the largest (1 - cos)^2, so that min() later takes the distance.
    offsets, _ = lax.fori_loop(0, count, body, (start[0], 4.0 * start[1]))
    return std * width**0.5 * offsets
