"""Image-text pairs: images with their captions, the captions' features, and batches of both.

Everything that opens pairs (`pairs_synthetic`, `pairs_npz`, `captions`, `tar_shards`) returns :class:`Pairs`;
`pair_records` turns them into Records, of which `sampler.make_source` makes batches as of any data set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from protojax.data.records import Content, Records, make_records

DUPLICATES = 0.2  # share of repeated captions above which a missing caption_id is worth a warning


class Texts(NamedTuple):
    """Captions of a split, each distinct one once, as a text tower sees them.

    captions: T strings. pooled: pool ('eos', 'mean', 'bos', 'unmasked_mean') -> float32 [T,D_text] of a frozen tower;
    or {} and token ids int32 [T,S] for a tower that is trained. mask bool [T,S]: valid positions of ids or states.
    states(rows) -> float32 [n,S,D_text]: what the frozen tower says at every position, before it is pooled (None: not
    kept). causal: position 0 cannot see the caption. empty: pool -> [D_text], what the tower says of an empty caption.
    fingerprint: of the tower or tokenizer. cut: captions that were cut to the longest length. tokenizer: the JSON of
    the tokenizer that made the ids.
    """

    captions: tuple[str, ...]
    pooled: Mapping[str, np.ndarray]
    causal: bool
    fingerprint: str
    empty: Mapping[str, np.ndarray] = {}
    ids: np.ndarray | None = None
    mask: np.ndarray | None = None
    cut: int = 0
    tokenizer: str | None = None
    states: Callable[[np.ndarray], np.ndarray] | None = None


class Pairs(NamedTuple):
    """One split of M images with their captions.

    shapes, read: image content as in `Records` (`image` uint8 [H,W,3], or `image_tokens` [N,D_image] with `image_mask`
    [N]). caption: for every image the rows of `texts` that describe it (one or more). labels, classes: as in Records.
    factors [M,F]: known shared content of synthetic pairs (None elsewhere).
    """

    name: str
    size: int
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[np.ndarray], tuple[Content, np.ndarray]]
    caption: tuple[np.ndarray, ...]
    texts: Texts
    labels: Mapping[str, np.ndarray] = {}
    classes: Mapping[str, Sequence[str]] = {}
    problems: Callable[[], list[str]] = list
    factors: np.ndarray | None = None


def distinct(captions: Sequence[Sequence[str]], name: str) -> tuple[tuple[str, ...], tuple[np.ndarray, ...]]:
    """(distinct captions in order of appearance, for every image the numbers of its captions). Raises ValueError naming
    images without text and empty captions."""
    bare = [i for i, texts in enumerate(captions) if not len(texts)]
    empty = [i for i, texts in enumerate(captions) if any(not str(t).strip() for t in texts)]
    for what, bad in (("images have no caption", bare), ("images have an empty caption", empty)):
        if bad:
            raise ValueError(f"{name}: {len(bad)} {what}, the first are {bad[:5]}; give them text or leave them out")
    known: dict[str, int] = {}
    rows = [np.asarray([known.setdefault(str(t), len(known)) for t in texts], np.int32) for texts in captions]
    return tuple(known), tuple(rows)


def image_content(images: np.ndarray, name: str) -> tuple[Mapping[str, jax.ShapeDtypeStruct], Callable]:
    """(shapes, read) of images in memory, uint8 [M,H,W,3] or [M,H,W,1]."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{name}: images must be uint8 [M,H,W,3], got {images.dtype} {images.shape}")

    def read(rows: np.ndarray) -> tuple[Content, np.ndarray]:
        batch = images[rows]
        return {"image": np.repeat(batch, 3, axis=3) if batch.shape[-1] == 1 else batch}, np.ones(len(rows), bool)

    return {"image": jax.ShapeDtypeStruct((*images.shape[1:3], 3), np.uint8)}, read


def token_content(
    tokens: np.ndarray, mask: np.ndarray | None, name: str
) -> tuple[Mapping[str, jax.ShapeDtypeStruct], Callable]:
    """(shapes, read) of frozen image tokens [M,N,D_image], with mask [M,N] of valid ones. Raises ValueError for images
    without a valid token: attention over nothing has no value."""
    if tokens.ndim != 3 or not np.issubdtype(tokens.dtype, np.floating):
        raise ValueError(f"{name}: image_tokens must be floating [M,N,D], got {tokens.dtype} {tokens.shape}")
    shapes = {"image_tokens": jax.ShapeDtypeStruct(tokens.shape[1:], np.float32)}
    if mask is not None:
        if mask.shape != tokens.shape[:2]:
            raise ValueError(f"{name}: image_mask must be {tokens.shape[:2]}, got {mask.shape}")
        blank = np.flatnonzero(~mask.any(axis=1))
        if blank.size:
            raise ValueError(f"{name}: {blank.size} images have no valid token, the first are {blank[:5].tolist()}")
        shapes["image_mask"] = jax.ShapeDtypeStruct(mask.shape[1:], np.bool_)

    def read(rows: np.ndarray) -> tuple[Content, np.ndarray]:
        content = {"image_tokens": np.asarray(tokens[rows], np.float32)}
        return content | ({} if mask is None else {"image_mask": mask[rows]}), np.ones(len(rows), bool)

    return shapes, read


def check_pairs(pairs: Pairs) -> Pairs:
    """The pairs, when images and captions are in step. Raises ValueError with both numbers otherwise."""
    if len(pairs.caption) != pairs.size:
        raise ValueError(
            f"{pairs.name}: {pairs.size} images and {len(pairs.caption)} captions: the pairs are out of step"
        )
    if not pairs.size:
        raise ValueError(f"{pairs.name}: the split is empty")
    total = len(pairs.texts.captions)
    for pool, states in pairs.texts.pooled.items():
        if states.shape[0] != total:
            raise ValueError(f"{pairs.name}: {total} captions but {states.shape[0]} text states ({pool!r})")
    return pairs


def check_text_varies(texts: Texts, pool: str, *, sample: int = 64, tolerance: float = 1e-5) -> None:
    """Pools `sample` captions: ValueError when all vectors agree, which no training can mend (the loss stays at
    ln B, retrieval at k/G)."""
    if pool not in texts.pooled:
        return
    states = np.asarray(texts.pooled[pool][:sample], np.float64)
    if len(states) < 2 or np.max(np.abs(states - states[:1])) > tolerance:
        return
    hint = (
        "text_pool='bos' on a causal tower sees only the start token; use 'eos' or 'mean'"
        if pool == "bos"
        else (f"text_pool={pool!r}: look at the text tower and at the captions")
    )
    raise ValueError(
        f"constant_side: text embeddings are identical (all {len(states)} tried agree to {tolerance:g}): {hint}"
    )


def warn_of_false_negatives(name: str, captions: Sequence[str]) -> None:
    """A warning when many captions repeat and nobody says so with ids."""
    share = 1.0 - len(set(captions)) / max(1, len(captions))
    if share > DUPLICATES:
        warnings.warn(
            f"{name}: {share:.0%} of the captions repeat another and caption_id is missing: they are taken "
            "as negatives of each other (false negatives); give caption_id",
            stacklevel=3,
        )


class _Table(NamedTuple):
    """An entry of every caption: shape and dtype of one, and rows -> entries."""

    shape: jax.ShapeDtypeStruct
    read: Callable[[np.ndarray], np.ndarray]


def text_tables(texts: Texts, pool: str) -> dict[str, _Table]:
    """What a batch holds of captions: `text` (states pooled by `pool` [D_text]), `text_states` and `text_mask` (pool
    'states': all positions [S,D_text], [S]), or `text_ids` and `text_mask` [S] where the tower is trained. Raises
    ValueError where states are wanted and were not kept."""

    def of(values: np.ndarray) -> _Table:
        return _Table(jax.ShapeDtypeStruct(values.shape[1:], values.dtype), lambda rows: values[rows])

    if not texts.pooled:
        return {"text_ids": of(np.asarray(texts.ids)), "text_mask": of(np.asarray(texts.mask))}
    if pool != "states":
        return {"text": of(texts.pooled[pool])}
    if texts.states is None:
        raise ValueError(
            f"the texts of tower {texts.fingerprint!r} are kept pooled: shared_resampler reads states at every "
            "position (text_hidden and text_mask in an archive)"
        )
    one = texts.states(np.arange(1))
    states = _Table(jax.ShapeDtypeStruct(one.shape[1:], one.dtype), texts.states)
    return {"text_states": states, "text_mask": of(np.asarray(texts.mask))}


def pair_records(pairs: Pairs, pool: str, *, expanded: bool) -> Records:
    """Records of the pairs: image content, what `text_tables` gives of the captions, `caption_id` and `image_id`.

    expanded=False (training): one example an image; where images have up to C captions the text entries have a leading
    axis C (shorter lists repeat), from which the views draw one. expanded=True (evaluation): one example a caption.
    """
    pairs = check_pairs(pairs)
    counts = np.asarray([len(rows) for rows in pairs.caption], np.int64)
    if expanded:
        image, caption = np.repeat(np.arange(pairs.size), counts), np.concatenate(pairs.caption).astype(np.int32)
        captions = caption[:, None]
    else:
        widest = int(np.max(counts))
        image = np.arange(pairs.size)
        captions = np.stack([np.resize(rows, widest) for rows in pairs.caption]).astype(np.int32)
    several = captions.shape[1] > 1
    tables = text_tables(pairs.texts, pool)
    lead = (captions.shape[1],) if several else ()
    shapes = dict(pairs.shapes)
    shapes |= {k: jax.ShapeDtypeStruct((*lead, *v.shape.shape), v.shape.dtype) for k, v in tables.items()}
    shapes |= {"caption_id": jax.ShapeDtypeStruct(lead, np.int32), "image_id": jax.ShapeDtypeStruct((), np.int32)}

    def read(rows: np.ndarray) -> tuple[Content, np.ndarray]:
        content, good = pairs.read(image[rows])
        own = captions[rows] if several else captions[rows, 0]
        texts = {k: v.read(own.ravel()).reshape(*own.shape, *v.shape.shape) for k, v in tables.items()}
        return {**content, **texts, "caption_id": own, "image_id": image[rows].astype(np.int32)}, good

    labels = {name: np.asarray(values)[image] for name, values in pairs.labels.items()}
    return make_records(pairs.name, len(image), shapes, read, labels, pairs.classes, pairs.problems)
