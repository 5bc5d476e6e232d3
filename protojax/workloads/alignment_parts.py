"""Parts of the alignment workload: its settings, its batches and views, its optimiser, its failing arms."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from protojax.api import Array, Batch, Key, PyTree, Source
from protojax.data import sampler, views
from protojax.data.pairs import Pairs, check_text_varies, pair_records
from protojax.data.records import Records
from protojax.models.text import check_text_pool, check_token_ids
from protojax.schedules import make_schedule
from protojax.workloads.images import IMAGENET_MEAN, IMAGENET_STD

TEXT_ENTRIES = ("text", "text_states", "text_ids", "text_mask", "caption_id")
IMAGE_FEATURES = ("auto", "tokens", "patches", "conv")
POSITION_WIDTH = 16


def aligner(
    *,
    image_path: str = "perceiver",
    num_latents: int = 16,
    latent_width: int = 128,
    depth: int = 2,
    heads: int = 4,
    latent_pool: str = "mean",
    latent_init_std: float = 0.02,
    latent_self_attention: bool = False,
    shared_norm: bool = False,
    shared_resampler: bool = False,
    drop_class_token: bool = True,
    direct_pool: str = "simple",
    order: str = "project_then_pool",
    pool_dropout: float = 0.1,
    width: int = 512,
    prefix_dims: tuple[int, ...] = (512, 256, 128, 64, 32, 16),
    prefix_mode: str = "mean",
    prefix_weights: tuple[float, ...] = (),
    contrastive_weight: float = 0.25,
    prefix_weight: float = 1.0,
    temperature: float = 0.07,
    temperature_mode: str = "fixed",
    loss: str = "contrastive",
    negative_groups: int = 1,
    text_pool: str = "eos",
    text_dropout: float = 0.0,
    image_features: str = "auto",
    image_size: int = 32,
    patch_size: int = 4,
    tower_widths: tuple[int, ...] = (32, 64, 128),
    tower_depths: tuple[int, ...] = (0, 1, 1),
    crop_scale: tuple[float, ...] = (0.7, 1.0),
    jitter: tuple[float, ...] = (0.2, 0.2, 0.2, 0.05),
    blur_probability: float = 0.0,
    grey_probability: float = 0.0,
    flip: float = 0.0,
    text_width: int = 128,
    text_depth: int = 2,
    text_heads: int = 4,
    text_causal: bool = True,
    failing_arm: bool = False,
    constant_image: bool = False,
    shuffled_pairs: bool = False,
) -> dict[str, Any]:
    """The keys of `config.method.alignment` and their defaults; what they mean is in docs/alignment.md."""
    return dict(locals())


HEAD_KEYS = (
    "image_path", "num_latents", "latent_width", "depth", "heads", "latent_pool", "latent_init_std",
    "latent_self_attention", "shared_norm", "shared_resampler", "drop_class_token", "direct_pool", "order",
    "pool_dropout",
)  # fmt: skip
LOSS_KEYS = (
    "width", "prefix_dims", "prefix_mode", "prefix_weights", "contrastive_weight", "prefix_weight", "temperature",
    "temperature_mode", "loss", "negative_groups",
)  # fmt: skip


class Sides(NamedTuple):
    """How a batch becomes the encoder's inputs. train(key, batch), plain(batch) -> inputs. sizes, options: of
    `make_aligner`."""

    train: Callable[[Key, Batch], PyTree]
    plain: Callable[[Batch], PyTree]
    sizes: dict[str, int]
    options: dict[str, Any]


# ---------------------------------------------------------------------------------------------------- sources
def text_pool(settings: Mapping[str, Any]) -> str:
    """How captions reach the encoder: pooled by 'eos', 'mean', ..., or 'states', every position of a frozen tower."""
    return "states" if settings["shared_resampler"] else str(settings["text_pool"])


def check_text(pairs: Pairs, settings: Mapping[str, Any]) -> None:
    """Before training: the pool must exist and must tell captions apart, token ids must be the vocabulary's. Captions
    that were cut are counted in a warning."""
    pool = check_text_pool(settings["text_pool"], pairs.texts.causal, failing_arm=settings["failing_arm"])
    texts = pairs.texts
    if texts.cut:
        warnings.warn(
            f"{pairs.name}: {texts.cut} of {len(texts.captions)} captions were cut to the longest length (their end "
            "token is kept): raise data.source.longest",
            stacklevel=3,
        )
    if settings["shared_resampler"] and pool not in ("eos", "mean"):
        raise ValueError(
            f"shared_resampler reads every position of the text: text_pool={pool!r} has no meaning with it"
        )
    if not texts.pooled:
        assert texts.ids is not None
        assert texts.mask is not None
        check_token_ids(texts.ids, texts.mask, vocabulary_of(pairs))
        return
    if pool not in texts.pooled:
        hint = "; 'eos' needs text_eos beside text_hidden, or text_eos_state" if pool == "eos" else ""
        raise ValueError(f"{pairs.name} has no text states pooled by {pool!r}; it has {sorted(texts.pooled)}{hint}")
    if not settings["failing_arm"]:
        check_text_varies(texts, pool)


def check_same_tower(made: str, given: str, what: str) -> None:
    """Raises ValueError with both fingerprints when texts of one tower meet heads or texts of another."""
    if made != given:
        raise ValueError(f"{what} come from two towers or pools: {made!r} and {given!r}")


def check_batch(pairs: Pairs, batch_size: int) -> None:
    """Batches that hold nothing to contrast: one pair, or one caption."""
    if batch_size < 2 or pairs.size < 2:
        raise ValueError(
            f"batches of {min(batch_size, pairs.size)} pair have no negatives: the loss is 0 by definition; "
            "set config.data.batch_size to at least 2"
        )
    if len({int(row) for rows in pairs.caption for row in rows}) < 2:
        raise ValueError(f"{pairs.name} has one distinct caption: the contrastive loss is 0 by definition")


def training_source(pairs: Pairs, settings: Mapping[str, Any], batch_size: int, seed: int) -> Source:
    """Shuffled whole batches of the training pairs; what is left of an epoch is dropped."""
    if settings["shuffled_pairs"]:  # the honest chance level: no image belongs to its caption
        order = np.random.default_rng(seed).permutation(pairs.size)
        pairs = pairs._replace(caption=tuple(pairs.caption[i] for i in order))
    records = pair_records(pairs, text_pool(settings), expanded=False)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return sampler.make_source(
        records, batch_size=batch_size, seed=seed, shuffle=True, remainder="drop", counts=no_counts(records), **process
    )


def ordered_source(records: Records, batch_size: int) -> Source:
    """One ordered pass, padded and masked."""
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return sampler.make_source(
        records, batch_size=batch_size, shuffle=False, remainder="pad", counts=no_counts(records), **process
    )


def no_counts(records: Records) -> dict[str, Any] | None:
    return None


# ------------------------------------------------------------------------------------------------------ views
def make_sides(pairs: Pairs, settings: Mapping[str, Any], dtype: Any) -> Sides:
    """Inputs of the encoder from batches of these pairs."""
    image_train, image_plain, sizes, options = _image_side(pairs, settings, dtype)
    empty = pairs.texts.empty.get(settings["text_pool"])
    if pairs.texts.pooled:
        sizes["text"] = next(iter(pairs.texts.pooled.values())).shape[1]
    else:
        sizes["vocabulary"] = vocabulary_of(pairs)
        assert pairs.texts.ids is not None
        options["text_tower"] = {
            "width": settings["text_width"], "depth": settings["text_depth"], "heads": settings["text_heads"],
            "max_length": pairs.texts.ids.shape[1], "causal": settings["text_causal"], "pool": settings["text_pool"],
            "failing_arm": settings["failing_arm"],
        }  # fmt: skip
    rate = float(settings["text_dropout"])
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"config.method.alignment.text_dropout must lie in [0, 1), got {rate}")
    if rate and empty is None and pairs.texts.pooled:
        empty = np.zeros((sizes["text"],), np.float32)

    def train(key: Key, batch: Batch) -> PyTree:
        keys = jax.random.split(key, 3)
        inputs = image_train(keys[0], batch) | drawn_caption(keys[1], batch)
        if rate:
            inputs = empty_some(keys[2], inputs, rate, empty)
        return inputs

    def plain(batch: Batch) -> PyTree:
        return image_plain(batch) | {k: batch[k] for k in TEXT_ENTRIES if k in batch}

    return Sides(train, plain, sizes, options)


def vocabulary_of(pairs: Pairs) -> int:
    """Size of the vocabulary, which the fingerprint of token ids ends with ('bpe-8000')."""
    return int(pairs.texts.fingerprint.rsplit("-", 1)[-1])


def drawn_caption(key: Key, batch: Batch) -> dict[str, Array]:
    """One caption an image; `caption_id` goes with it."""
    names = [k for k in TEXT_ENTRIES if k in batch]
    if batch["caption_id"].ndim == 1:
        return {k: batch[k] for k in names}
    size, several = batch["caption_id"].shape
    pick = jax.random.randint(key, (size,), 0, several)
    take = lambda a: jnp.take_along_axis(a, pick.reshape((size,) + (1,) * (a.ndim - 1)), axis=1)[:, 0]  # noqa: E731
    return {k: take(batch[k]) for k in names}


def empty_some(key: Key, inputs: dict[str, Array], rate: float, empty: np.ndarray | None) -> dict[str, Array]:
    """Captions replaced by the empty one with probability `rate`; these are no negatives of each other (one id).

    Pooled text: `empty` [D_text]. Token ids: start and end token alone. States of all positions: the start token's
    alone, which of a causal tower cannot know the caption."""
    drop = jax.random.bernoulli(key, rate, inputs["caption_id"].shape)
    out = dict(inputs)
    if "text" in inputs:
        out["text"] = jnp.where(drop[:, None], jnp.asarray(empty)[None, :], inputs["text"])
    else:
        mask, place = inputs["text_mask"], jnp.arange(inputs["text_mask"].shape[1])
        out["text_mask"] = jnp.where(drop[:, None], (place < (2 if "text_ids" in inputs else 1))[None, :], mask)
    if "text_ids" in inputs:
        ids, last = inputs["text_ids"], jnp.sum(mask.astype(jnp.int32), axis=1) - 1
        end = jnp.take_along_axis(ids, last[:, None], axis=1)
        out["text_ids"] = jnp.where(drop[:, None] & (place == 1)[None, :], end, ids)
    return out | {"caption_id": jnp.where(drop, jnp.int32(2**30), inputs["caption_id"])}


def _image_side(pairs: Pairs, settings: Mapping[str, Any], dtype: Any) -> Any:
    """(train, plain, sizes, options) of the image tokens: given, patches of pixels, or a convolutional tower of
    ours."""
    kind = settings["image_features"]
    if kind not in IMAGE_FEATURES:
        raise ValueError(f"image_features must be one of {', '.join(map(repr, IMAGE_FEATURES))}; got {kind!r}")
    given = "image_tokens" in pairs.shapes
    kind = ("tokens" if given else "patches") if kind == "auto" else kind
    if given != (kind == "tokens"):
        raise ValueError(f"image_features={kind!r}, but {pairs.name} holds {'image tokens' if given else 'images'}")
    options: dict[str, Any] = {"has_class_token": given}
    if given:
        constant = settings["constant_image"]

        def tokens(batch: Batch) -> dict[str, Array]:
            values = batch["image_tokens"]
            values = jnp.broadcast_to(values[:1, :1], values.shape) if constant else values
            return {"image_tokens": values} | ({"image_mask": batch["image_mask"]} if "image_mask" in batch else {})

        size = pairs.shapes["image_tokens"].shape[-1]
        return (lambda key, batch: tokens(batch)), tokens, {"image": size}, options
    side = settings["image_size"]
    augment = views.ViewSpec(
        side, 1, (settings["crop_scale"][0], settings["crop_scale"][1]), flip=settings["flip"],
        jitter=tuple(settings["jitter"]), grey_probability=settings["grey_probability"],
        blur_probability=settings["blur_probability"], blur_sigma=(0.1, max(0.2, 2 * side / 224)),
    )  # fmt: skip
    make = views.make_views(augment, None, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=dtype, matmul_dtype=dtype)
    plain = lambda batch: views.plain_view(batch, side, IMAGENET_MEAN, IMAGENET_STD, dtype=dtype)["global"][0]  # noqa: E731
    if kind == "conv":
        stages = len(settings["tower_widths"])
        options["tower"] = {
            "widths": tuple(settings["tower_widths"]), "depths": tuple(settings["tower_depths"]),
            "strides": (2,) * stages,
        }  # fmt: skip
        count = math.ceil(side / 2**stages) ** 2
        sizes = {"positions": count}
        return (lambda key, batch: {"image": make(key, batch)["global"][0]}), (
            lambda batch: {"image": plain(batch)}), sizes, options  # fmt: skip
    patch = settings["patch_size"]
    if side % patch:
        raise ValueError(f"image_size {side} is no multiple of patch_size {patch}")
    codes = position_codes(side // patch)
    cut = lambda image: {"image_tokens": patches(image, patch, codes)}  # noqa: E731
    sizes = {"image": 3 * patch**2 + POSITION_WIDTH}
    # Raw patches are frozen tokens: no augmentation, so that they could be cached.
    return (lambda key, batch: cut(plain(batch))), (lambda batch: cut(plain(batch))), sizes, options


def patches(images: Array, size: int, codes: np.ndarray) -> Array:
    """Frozen tokens of images [B,S,S,3]: pixel patches, row by row, with fixed position codes: [B,(S/size)^2, 3 size^2
    + 16]."""
    batch, side = images.shape[:2]
    grid = side // size
    cut = images.reshape(batch, grid, size, grid, size, 3).transpose(0, 1, 3, 2, 4, 5)
    flat = cut.reshape(batch, grid * grid, 3 * size * size)
    position = jnp.broadcast_to(jnp.asarray(codes, flat.dtype)[None], (batch, *codes.shape))
    return jnp.concatenate([flat, position], axis=-1)


def position_codes(grid: int) -> np.ndarray:
    """Sines and cosines of row and column at four frequencies, [grid^2,16] float32."""
    at = (np.arange(grid) + 0.5) / grid
    waves = [f(np.pi * 2**k * at) for k in range(POSITION_WIDTH // 4 // 1 // 1) for f in (np.sin, np.cos)]
    one = np.stack(waves[: POSITION_WIDTH // 2], axis=1)
    both = [np.repeat(one[:, None], grid, axis=1), np.repeat(one[None], grid, axis=0)]
    return np.concatenate(both, axis=2).reshape(grid * grid, POSITION_WIDTH).astype(np.float32)


# -------------------------------------------------------------------------------------------------- optimiser
def adamw(
    *,
    total_steps: int,
    peak_lr: float = 2e-3,
    end_lr: float = 0.0,
    warmup_fraction: float = 0.1,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float | None = 1.0,
    planned_fraction: float = 1.0,
    clamped: bool = True,
    frozen: tuple[str, ...] = (),
) -> tuple[optax.GradientTransformation, Callable[[Array], Array]]:
    """AdamW with decay on kernels alone (not on norms, biases, latents, positions, queries), warm-up over
    `warmup_fraction` and cosine to `end_lr` at `planned_fraction` of the run, 0 after it. clamped=False is a failing
    arm: the cosine rises again after the planned end. frozen: patterns of parameter paths that do not move.

    Returns (transformation, learning-rate schedule). Raises ValueError for a fraction outside (0, 1]."""
    if not 0.0 < planned_fraction <= 1.0:
        raise ValueError(f"config.method.optim.planned_fraction must lie in (0, 1], got {planned_fraction}")
    planned = max(1, round(planned_fraction * total_steps))
    spec = {"kind": "cosine", "start": peak_lr, "end": end_lr, "warmup": warmup_fraction}
    clamped_rate = make_schedule(spec, planned, "learning rate")

    def rising(step: Array) -> Array:
        share = jnp.asarray(step, jnp.float32) / planned
        after = peak_lr * (1.0 + jnp.cos(jnp.pi * (share - warmup_fraction) / (1.0 - warmup_fraction))) / 2.0
        return jnp.where(share > 1.0, after, clamped_rate(step))

    rate = clamped_rate if clamped else rising
    chain = [optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)]
    if clip_norm:
        chain.insert(0, optax.clip_by_global_norm(clip_norm))
    if frozen:
        chain.append(optax.masked(optax.set_to_zero(), lambda tree: _matching(tree, frozen)))
    return optax.chain(*chain), rate


UNDECAYED = re.compile(r"(latents|positions|tokens|norm_scale|norm_bias|/bias|scale|query|score)$")


def decayed(tree: PyTree) -> PyTree:
    """True for kernels: at least two axes, and no latent, position, token embedding or norm."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.ndim >= 2 and not UNDECAYED.search(jax.tree_util.keystr(path, simple=True, separator="/"))
        ),
        tree,
    )


def _matching(tree: PyTree, patterns: tuple[str, ...]) -> PyTree:
    named = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, leaf: any(re.search(p, named(path)) for p in patterns), tree)
