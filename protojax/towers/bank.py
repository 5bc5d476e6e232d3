"""Feature caches by pretrained towers: pictures and texts of classes in, the archive of `data.prompts_cache` out."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from protojax.data.prompts_cache import FeatureCache, Features, check_cache, save_cache
from protojax.data.prompts_pictures import Pictures, batches, open_pictures
from protojax.data.prompts_templates import Templates, class_texts, levels_of, open_templates, read_class_fields
from protojax.data.prompts_thumbnails import PATH, SIDE, THUMBNAIL, middle
from protojax.feature_files import check_target
from protojax.towers.model import ImageText, load
from protojax.towers.tokens import write_tokens

NO_TEXT = "none"
LARGEST_DRAWN = 2**30  # bytes of thumbnails, or of names of files, in an archive


class Plan(NamedTuple):
    """What is known before an image is encoded. empty: the cache without its features, with the fingerprint that it
    will have; texts: [C][T], None without templates."""

    towers: ImageText
    pictures: Pictures
    empty: FeatureCache
    templates: Templates | None
    texts: list[tuple[str, ...]] | None


def open_plan(
    weights: str | Path,
    *,
    data: str,
    label: str = "fine",
    splits: Sequence[str] = (),
    test_share: float = 0.0,
    templates: str = "photo",
    classes: str | Path | None = None,
    dtype: str = "float32",
    batch_size: int = 64,
    drop_empty_classes: bool = False,
) -> Plan:
    """The towers in the folder `weights`, pictures and texts, opened and checked.

    data, label, splits, test_share: as `open_pictures`. templates: an installed set or a file; 'none' leaves texts out
    (`base` too). classes: a file of fields of classes. Raises ValueError for bad input of any kind.
    """
    towers = load(weights, dtype=dtype, batch_size=batch_size)
    side = towers.config.vision.image_size
    pictures = open_pictures(data, towers.preprocessing.fit, side, label=label, splits=splits, test_share=test_share)
    if classes is not None:
        pictures = pictures._replace(fields={**pictures.fields, **read_class_fields(classes, pictures.class_names)})
    empty = _hollow(pictures, drop_empty_classes)
    chosen = None if templates == NO_TEXT else open_templates(templates)
    texts = None if chosen is None else class_texts(chosen, pictures.class_names, pictures.fields)
    return Plan(towers, pictures, empty._replace(fingerprint=fingerprint_of(towers, chosen)), chosen, texts)


def fill(plan: Plan) -> tuple[FeatureCache, dict[str, Encoded]]:
    """(the cache, not checked yet; what was encoded, by split): the texts, and one pass over all pictures."""
    base = None if plan.texts is None else base_features(plan.towers, plan.texts)
    encoded = {name: encode(plan.towers, plan.pictures, name) for name in plan.pictures.splits}
    return plan.empty._replace(splits={name: one.features for name, one in encoded.items()}, base=base), encoded


def embed(
    weights: str | Path,
    out: Path,
    *,
    data: str,
    tokens: bool = False,
    overwrite: bool = False,
    drop_empty_classes: bool = False,
    **options: Any,
) -> str:
    """Fill `out` (.npz) with features of `data` by the towers in the folder `weights`; a line that says what is there.

    tokens: the patch tokens of images and states of texts for the alignment workload, instead of a cache. options: of
    `open_plan`. An archive that the same towers, preprocessing and templates made of the same data is left as it is.

    Raises ValueError for bad input of any kind before an image is encoded, and for an archive that something else made
    (both fingerprints) unless `overwrite`.
    """
    _check_out(out)
    plan = open_plan(weights, data=data, drop_empty_classes=drop_empty_classes, **options)
    towers, pictures, texts, fingerprint = plan.towers, plan.pictures, plan.texts, plan.empty.fingerprint
    about = {
        "weights": Path(weights).name, "data": data, "label": pictures.label, "data_digest": _digest(pictures),
        "templates": [] if plan.templates is None else list(plan.templates.lines), "tokens": tokens,
    }  # fmt: skip
    if out.exists() and not overwrite and _already(out, fingerprint, about):
        return f"{out}: made before by the same towers from the same data, left as it is ({fingerprint})"
    described = json.dumps(about, sort_keys=True)
    if tokens:
        return write_tokens(out, towers, pictures, texts, {"fingerprint": fingerprint, "about": described})
    found, encoded = fill(plan)
    whole = found._replace(about=described)
    cache = check_cache(whole, train=_train(whole.splits), drop_empty_classes=drop_empty_classes)
    names = np.asarray(whole.class_names)
    kept = {name: np.isin(names[f.label], cache.class_names) for name, f in whole.splits.items()}
    save_cache(out, cache, drawn=_drawn(pictures, encoded, kept))
    return _line(out, cache) + ("" if texts is None else _cut(towers, texts))


def fingerprint_of(towers: ImageText, templates: Templates | None) -> str:
    """'clip-WEIGHTS-DTYPE/image-PREPROCESSING/text-TOKENIZER-TEMPLATES'; the last part is missing without texts."""
    if templates is None:
        return towers.fingerprint
    return f"{towers.fingerprint}/text-{towers.tokeniser.digest}-{templates.digest}"


def base_features(towers: ImageText, texts: Sequence[Sequence[str]]) -> np.ndarray:
    """base_c = unit(mean_t unit(text_ct)) [C,D] float32 of texts [C][T]. Equal texts are encoded once.

    Raises ValueError where the texts of a class cancel each other."""
    distinct = list(dict.fromkeys(text for own in texts for text in own))
    number = {text: i for i, text in enumerate(distinct)}
    units = towers.encode_texts(distinct).astype(np.float64)
    means = np.stack([units[[number[text] for text in own]].mean(axis=0) for own in texts])
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    worst = int(np.argmin(norms))
    if not norms[worst, 0] > 1e-6:
        raise ValueError(f"the texts of class {worst} cancel each other: {list(texts[worst])[:4]}")
    return (means / norms).astype(np.float32)


class Encoded(NamedTuple):
    """rows [n]: those of the split that could be read; thumbnails: uint8 [n,64,64,3], or None of a large set."""

    features: Features
    rows: np.ndarray
    thumbnails: np.ndarray | None


def encode(towers: ImageText, pictures: Pictures, split: str) -> Encoded:
    """Unit features, labels and, where classes are coarse, modes (the fine classes within them) of a split; pictures
    that cannot be read are named in the log and left out. Raises ValueError when none can be read."""
    records = pictures.splits[split]
    images, kept, small = [], [], []
    for rows, content, good in batches(records, towers.batch_size, split):
        images.append(towers.encode_images(content[good]))
        kept.append(rows[good])
        if _size(pictures) * SIDE * SIDE * 3 <= LARGEST_DRAWN:
            small += [middle(Image.fromarray(pixels)) for pixels in content[good]]
    if not kept:
        raise ValueError(f"{records.name}: none of its {records.size} images can be read: {records.problems()[:1]}")
    rows = np.concatenate(kept)
    labels, modes = records.labels[pictures.label][rows].astype(np.int32), None
    if members := modes_of(pictures):
        pairs = zip(labels.tolist(), records.labels["fine"][rows].tolist(), strict=True)
        modes = np.asarray([members[coarse].index(fine) for coarse, fine in pairs], np.int32)
    return Encoded(Features(np.concatenate(images), labels, modes), rows, np.stack(small) if small else None)


def _drawn(pictures: Pictures, encoded: Mapping[str, Encoded], kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What reports draw: thumbnails of a set that is not large, else the files where they are known."""
    if all(one.thumbnails is not None for one in encoded.values()):
        return {THUMBNAIL: np.concatenate([np.asarray(one.thumbnails)[kept[name]] for name, one in encoded.items()])}
    if set(pictures.files) != set(encoded):
        return {}
    names = [str(pictures.files[name][row].resolve()) for name, one in encoded.items() for row in one.rows[kept[name]]]
    return {PATH: np.asarray(names)} if 4 * len(names) * max(map(len, names)) <= LARGEST_DRAWN else {}


def _size(pictures: Pictures) -> int:
    return sum(records.size for records in pictures.splits.values())


def _train(splits: Iterable[str]) -> str:
    """The split that every class must occur in."""
    return "train" if "train" in splits else next(iter(splits))


def modes_of(pictures: Pictures) -> tuple[tuple[int, ...], ...]:
    """The fine classes within each coarse one, over all splits together; () where labels are not coarse."""
    splits = list(pictures.splits.values())
    if pictures.label != "coarse" or any("fine" not in records.labels for records in splits):
        return ()
    pairs = {pair for r in splits for pair in zip(r.labels["coarse"].tolist(), r.labels["fine"].tolist(), strict=True)}
    members: list[list[int]] = [[] for _ in pictures.class_names]
    for coarse, fine in sorted(pairs):
        members[coarse].append(fine)
    return tuple(map(tuple, members))


# ------------------------------------------------------------------------------------------------ before it begins
def _check_out(out: Path) -> None:
    if out.suffix != ".npz":
        raise ValueError(f"--out={out}: features of pretrained towers are written as .npz; name a file that ends in it")
    check_target(out)


def _hollow(pictures: Pictures, drop_empty_classes: bool) -> FeatureCache:
    """The cache without its features; its classes and labels are checked before minutes are spent on features."""
    fine = next(iter(pictures.splits.values())).classes.get("fine", ())
    empty = FeatureCache(
        pictures.name, {}, None, pictures.class_names, levels_of(pictures.fields),
        descriptions=tuple(pictures.fields.get("description", ())),
        mode_names=tuple(tuple(fine[i] for i in members) for members in modes_of(pictures)),
    )  # fmt: skip
    blank = {
        name: Features(np.ones((records.size, 1), np.float32), records.labels[pictures.label].astype(np.int32))
        for name, records in pictures.splits.items()
    }
    check_cache(empty._replace(splits=blank), train=_train(blank), drop_empty_classes=drop_empty_classes)
    return empty


def _digest(pictures: Pictures) -> str:
    """Of the labels and sizes of the data (not of every pixel)."""
    digest = hashlib.blake2b(repr(pictures.class_names).encode(), digest_size=8)
    for name, records in pictures.splits.items():
        digest.update(f"{name}:{records.size}".encode())
        digest.update(np.ascontiguousarray(records.labels[pictures.label]).tobytes())
    return digest.hexdigest()


def _already(out: Path, fingerprint: str, about: Mapping[str, Any]) -> bool:
    """Whether `out` is what would be made again. Raises ValueError where something else made it."""
    try:
        with np.load(out, allow_pickle=False) as archive:
            made_by, there = (str(archive[k]) if k in archive.files else "" for k in ("fingerprint", "about"))
        known = json.loads(there or "{}")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        made_by, known = "something else", {}
    differs = [key for key in ("label", "data_digest", "templates", "tokens") if known.get(key) != about[key]]
    if made_by == fingerprint and not differs:
        return True
    what = f"{made_by!r}" if made_by != fingerprint else f"the same towers with another {differs[0]}"
    raise ValueError(f"{out} was made by {what}, this command makes {fingerprint!r}: use another name, or --overwrite")


def _cut(towers: ImageText, texts: Sequence[Sequence[str]]) -> str:
    cut = towers.tokeniser([text for own in texts for text in own]).cut
    return f"; {cut} texts were cut to {towers.tokeniser.length} tokens" if cut else ""


def _line(out: Path, cache: FeatureCache) -> str:
    sizes = ", ".join(f"{name} {list(f.image.shape)}" for name, f in cache.splits.items())
    base = "no texts" if cache.base is None else f"base {list(cache.base.shape)}"
    levels = f", levels {', '.join(cache.levels)}" if cache.levels else ""
    hint = "" if "test" in cache.splits else "; no split 'test': set data.test_split, or --test-share=0.2"
    return f"{out}: {sizes}, {len(cache.class_names)} classes, {base}{levels}, {cache.fingerprint}{hint}"
