"""Image-text alignment: symmetric contrastive (or sigmoid) loss over the global batch, with nested prefixes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from protojax.api import Array, EstimatorSpec, Key, Metrics, Objective, PyTree
from protojax.objectives import common
from protojax.ops.contrastive import ContrastiveLosses, check_widths, nested_contrastive, nested_sigmoid

PREFIX_MODES = ("mean", "sum", "single", "none")
LARGEST_SHARPNESS = 100.0  # CLIP clips its learned scale there


def prefix_dims_of(width: int, prefix_dims: Sequence[int]) -> tuple[int, ...]:
    """Prefix widths in descending order, D first. An unsorted list is sorted with a warning.

    Raises ValueError for a width repeated, below 2 or above D, and for a list without D."""
    given = tuple(int(d) for d in prefix_dims)
    ascending = check_widths(given, width)
    if width not in given:
        raise ValueError(f"prefix_dims must hold the full width D = {width}, got {list(given)}: add it")
    ordered = ascending[::-1]
    if given != ordered:
        warnings.warn(f"prefix_dims {list(given)} were sorted to {list(ordered)}", stacklevel=3)
    return ordered


def image_text(
    *,
    width: int = 512,
    prefix_dims: Sequence[int] = (512, 256, 128, 64, 32, 16),
    prefix_mode: str = "mean",
    prefix_weights: Sequence[float] = (),
    contrastive_weight: float = 0.25,
    prefix_weight: float = 1.0,
    temperature: float = 0.07,
    temperature_mode: str = "fixed",
    loss: str = "contrastive",
    negative_groups: int = 1,
    matmul_dtype: Any = None,
) -> Objective:
    """total = contrastive_weight nce_D + prefix_weight M, with nce_d as in `ops.contrastive` and, over the set of
    prefix widths (which holds D), M = sum_d w_d nce_d / sum_d w_d ('mean'), sum_d w_d nce_d ('sum'), nce_d of one width
    drawn uniformly each step ('single') or 0 ('none').

    prefix_weights: w_d in the order of the descending widths (default: all 1; 'single' takes none).
    temperature_mode: 'learned': ln(1/T) is a parameter started at `temperature`, 1/T clipped to at most 100.
    loss: 'contrastive', or 'sigmoid' (SigLIP: logits carry a learned bias, started at -10).
    negative_groups: the batch is cut into so many groups of neighbours, and pairs meet only inside theirs (1: the
    global batch is everybody's negatives).

    inputs: student image and text [B,D] or [1,B,D] (any length: prefixes are renormalised here), mask [B], key, and
    batch['caption_id'] [B] where the data names equal captions (student['caption_id'] where views drew one of
    several). Metrics, all with the same meaning in every mode: contrastive_full, prefix_<d> for every d,
    prefix_objective (the optimised M), chance (what constant embeddings get of a contrastive loss, whatever the width),
    chance_prefix_objective and chance_total (the same of M and of the total), above_chance = contrastive_full - chance,
    temperature; 'single' adds sampled_dim.

    Raises ValueError for prefix widths, weights, modes and temperatures out of range.
    """
    dims = prefix_dims_of(width, prefix_dims)
    weights = _checked_weights(prefix_weights, dims, prefix_mode)
    _check(prefix_mode, temperature, temperature_mode, loss, negative_groups)
    learned, sigmoid = temperature_mode == "learned", loss == "sigmoid"

    def init(key: Key, spec: EstimatorSpec) -> PyTree:
        params: dict[str, Array] = {}
        if learned:
            params["log_sharpness"] = jnp.asarray(-math.log(temperature), jnp.float32)
        if sigmoid:
            params["bias"] = jnp.asarray(-10.0, jnp.float32)
        return params

    def losses_of(params: PyTree, inputs: Mapping[str, Any], sharpness: Array | float) -> ContrastiveLosses:
        image, text = (_rows(inputs["student"][side], side) for side in ("image", "text"))
        ids, mask = inputs["student"].get("caption_id", inputs["batch"].get("caption_id")), inputs["mask"]
        ids = jnp.arange(mask.shape[0], dtype=jnp.int32) if ids is None else ids
        options: dict[str, Any] = {"widths": dims, "sharpness": sharpness}
        options |= {"bias": params["bias"]} if sigmoid else {"matmul_dtype": matmul_dtype}

        def one(image: Array, text: Array, ids: Array, mask: Array) -> ContrastiveLosses:
            function = nested_sigmoid if sigmoid else nested_contrastive
            return function(image, text, caption_id=ids, mask=mask, **options)

        if negative_groups == 1:
            return one(image, text, ids, mask)
        parts = jax.vmap(one)(*(_split(a, negative_groups) for a in (image, text, ids, mask)))
        count = jnp.sum(parts.pairs)
        share = parts.pairs / jnp.maximum(count, 1.0)
        return ContrastiveLosses(share @ parts.losses, jnp.sum(share * parts.chance), count)

    def objective(params: PyTree, inputs: Mapping[str, Any]) -> tuple[Array, Metrics]:
        sharpness: Array | float = 1.0 / temperature
        if learned:
            sharpness = jnp.minimum(jnp.exp(params["log_sharpness"]), LARGEST_SHARPNESS)
        found = losses_of(params, inputs, sharpness)
        by_width = dict(zip(reversed(dims), found.losses, strict=True))
        full, ordered = by_width[width], jnp.stack([by_width[d] for d in dims])
        more: dict[str, Array] = {}
        if prefix_mode == "single":
            drawn = jax.random.randint(inputs["key"], (), 0, len(dims))
            part, share = ordered[drawn], 1.0
            more["sampled_dim"] = jnp.asarray(dims, jnp.float32)[drawn]
        else:
            part, share = jnp.sum(ordered * jnp.asarray(weights, ordered.dtype)), sum(weights)
        total = contrastive_weight * full + prefix_weight * part
        values = {"loss": total, "contrastive_full": full, "prefix_objective": part, "chance": found.chance}
        values |= {f"prefix_{d}": value for d, value in by_width.items()}
        values["above_chance"] = full - found.chance
        values["chance_prefix_objective"] = share * found.chance
        values["chance_total"] = (contrastive_weight + prefix_weight * share) * found.chance
        count = found.pairs.astype(total.dtype)
        metrics = {name: (value.astype(total.dtype) * count, count) for name, value in values.items()}
        more["temperature"] = 1.0 / jnp.asarray(sharpness, total.dtype)
        return total, metrics | {name: common.once(value, inputs["mask"]) for name, value in more.items()}

    return Objective(frozenset({"student/image", "student/text", "mask", "batch", "key"}), init, objective)


def start_loss(width: int, temperature: float, chance: float) -> float:
    """Expected first loss of random unit embeddings: chance + 1 / (2 D T^2), half the variance of a logit."""
    return chance + 1.0 / (2.0 * width * temperature**2)


def _rows(embedding: Array, side: str) -> Array:
    """[1,B,D] or [B,D] -> [B,D]."""
    if embedding.ndim == 3 and embedding.shape[0] == 1:
        return embedding[0]
    if embedding.ndim != 2:
        raise ValueError(f"image_text: expected {side} embeddings [B,D] or [1,B,D], got {embedding.shape}")
    return embedding


def _split(array: Array, groups: int) -> Array:
    if array.shape[0] % groups or array.shape[0] // groups < 2:
        raise ValueError(
            f"image_text: negative_groups = {groups} must divide the batch into groups of at least 2, got a batch of "
            f"{array.shape[0]}"
        )
    return array.reshape(groups, array.shape[0] // groups, *array.shape[1:])


def _checked_weights(given: Sequence[float], dims: tuple[int, ...], mode: str) -> tuple[float, ...]:
    if mode not in PREFIX_MODES:
        raise ValueError(f"prefix_mode must be one of {', '.join(map(repr, PREFIX_MODES))}; got {mode!r}")
    if mode == "none":
        return (0.0,) * len(dims)
    weights = tuple(float(w) for w in given) or (1.0,) * len(dims)
    if len(weights) != len(dims) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"prefix_weights must be {len(dims)} numbers >= 0, one a width of {list(dims)}, not all 0; got "
            f"{list(given)}"
        )
    if given and mode == "single":
        raise ValueError("prefix_weights have no meaning with prefix_mode 'single', which draws widths uniformly")
    return tuple(w / sum(weights) for w in weights) if mode == "mean" else weights


def _check(mode: str, temperature: float, temperature_mode: str, loss: str, groups: int) -> None:
    common.positive("image_text, temperature", temperature)
    if 1.0 / temperature > LARGEST_SHARPNESS:
        raise ValueError(f"image_text: temperature must be at least {1 / LARGEST_SHARPNESS}, got {temperature}")
    if temperature_mode not in ("fixed", "learned"):
        raise ValueError(f"temperature_mode must be 'fixed' or 'learned', got {temperature_mode!r}")
    if loss not in ("contrastive", "sigmoid"):
        raise ValueError(f"loss must be 'contrastive' or 'sigmoid', got {loss!r}")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"negative_groups must be an integer of at least 1, got {groups!r}")
