"""Records: one split of a data set with random access, and what can be done to any of them.

Everything that opens data (`embedded`, `npz`, `folder`, `synthetic`, `tfds_source`) returns a :class:`Records`;
`sampler.make_source` turns it into batches. Subsets, unions and hold-outs are Records again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from protojax.data import seeding

Content = dict[str, np.ndarray]


class Records(NamedTuple):
    """One split of M examples.

    name: for messages and reports. size: M. shapes: per-example ShapeDtypeStruct of every key that `take` returns.
    read(rows) -> (content, good): what is stored for those rows (no labels), and which rows could be read [B] bool;
    the content of a bad row is meaningless. labels: label key ('fine', 'coarse') -> int64 [M]. classes: label key ->
    class names in label order. problems() -> one line for every unreadable example met so far.
    """

    name: str
    size: int
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    read: Callable[[np.ndarray], tuple[Content, np.ndarray]]
    labels: Mapping[str, np.ndarray]
    classes: Mapping[str, tuple[str, ...]]
    problems: Callable[[], list[str]]

    def take(self, indices: np.ndarray) -> Content:
        """The examples at `indices` [B]: content (`image` uint8 [B,H,W,3]), labels (int32 [B]) and `index` int64 [B].

        An unreadable example is replaced, image and labels, by the next readable one of the split (cyclically), and
        `index` says which one it is: the same on every process and in every run. Raises IndexError outside [0, M), and
        ValueError when nothing in the split can be read.
        """
        rows = np.array(indices, dtype=np.int64)  # a copy: bad rows are redirected below
        if rows.ndim != 1:
            raise ValueError(f"indices must be one-dimensional, got shape {rows.shape}")
        if rows.size and (np.min(rows) < 0 or np.max(rows) >= self.size):
            raise IndexError(f"{self.name}: indices {np.min(rows)}..{np.max(rows)} are outside 0..{self.size - 1}")
        content, good = self.read(rows)
        for _ in range(self.size):
            bad = np.flatnonzero(~good)
            if not bad.size:
                break
            rows[bad] = (rows[bad] + 1) % self.size
            replacement, readable = self.read(rows[bad])
            for key, values in replacement.items():
                content[key][bad] = values
            good[bad] = readable
        if not good.all():
            raise ValueError(
                f"{self.name}: none of its {self.size} examples can be read; the first problem: {self.problems()[:1]}"
            )
        labels = {key: values[rows].astype(np.int32) for key, values in self.labels.items()}
        return {**content, **labels, "index": rows}


def make_records(
    name: str,
    size: int,
    content: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[np.ndarray], tuple[Content, np.ndarray]],
    labels: Mapping[str, np.ndarray],
    classes: Mapping[str, Sequence[str]] | None = None,
    problems: Callable[[], list[str]] = list,
) -> Records:
    """Checks and assembles :class:`Records`. `classes` may lack a label key: its classes are then named '0', '1', ...

    Raises ValueError for an empty split, labels that are not one integer an example, negative labels, or labels
    without a class name.
    """
    if size <= 0:
        raise ValueError(f"{name}: the split is empty")
    known = dict(classes or {})
    checked: dict[str, np.ndarray] = {}
    names: dict[str, tuple[str, ...]] = {}
    for key, given in labels.items():
        values = np.asarray(given)
        if values.shape != (size,) or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(
                f"{name}: labels {key!r} must be {size} integers, one an example; got {values.dtype} {values.shape}"
            )
        checked[key] = values.astype(np.int64)
        top = int(np.max(values))
        names[key] = tuple(str(c) for c in known.get(key, map(str, range(top + 1))))
        if np.min(values) < 0 or top >= len(names[key]):
            raise ValueError(
                f"{name}: labels {key!r} run from {np.min(values)} to {top}, but must lie in 0..{len(names[key]) - 1} "
                f"({len(names[key])} class names)"
            )
    shapes = dict(content)
    shapes |= {key: jax.ShapeDtypeStruct((), np.int32) for key in checked}
    shapes["index"] = jax.ShapeDtypeStruct((), np.int64)
    return Records(name, int(size), shapes, read, checked, names, problems)


def from_arrays(
    name: str,
    images: np.ndarray,
    labels: Mapping[str, np.ndarray],
    classes: Mapping[str, Sequence[str]] | None = None,
) -> Records:
    """Records over images in memory: uint8 [M,H,W,3], or grey [M,H,W] or [M,H,W,1], which become three equal channels.

    Raises ValueError for another shape or dtype.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise ValueError(f"{name}: images must be uint8 in 0..255, got {images.dtype}; convert them before saving")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"{name}: images must be [M,H,W,3], [M,H,W,1] or [M,H,W], got shape {images.shape}")
    size, height, width, channels = images.shape

    def read(rows: np.ndarray) -> tuple[Content, np.ndarray]:
        batch = images[rows]
        return {"image": np.repeat(batch, 3, axis=3) if channels == 1 else batch}, np.ones(len(rows), bool)

    return make_records(name, size, image_shapes(height, width), read, labels, classes)


def image_shapes(height: int, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Per-example shapes of content that is one colour image."""
    return {"image": jax.ShapeDtypeStruct((height, width, 3), np.uint8)}


def class_counts(records: Records) -> dict[str, np.ndarray]:
    """Examples of each class, label key -> int64 [C]. Of the training split these define head, medium and tail."""
    return {
        key: np.bincount(values, minlength=len(records.classes[key])).astype(np.int64)
        for key, values in records.labels.items()
    }


def by_class(labels: np.ndarray, order: np.ndarray) -> dict[int, np.ndarray]:
    """Class id -> the entries of `order` (indices into `labels`) of that class, in the order given."""
    grouped = order[np.argsort(labels[order], kind="stable")]
    ids, starts = np.unique(labels[grouped], return_index=True)
    return dict(zip(ids.tolist(), np.split(grouped, starts[1:]), strict=True))


def subset(records: Records, indices: np.ndarray, name: str | None = None) -> Records:
    """The examples at `indices`, in that order; labels keep their meaning (classes stay, even those left empty).

    Raises ValueError for an empty list or indices outside the split.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    name = name or f"{records.name}[{chosen.size}]"
    if chosen.ndim != 1 or not chosen.size:
        raise ValueError(f"{name}: a subset needs a non-empty list of indices, got shape {chosen.shape}")
    if np.min(chosen) < 0 or np.max(chosen) >= records.size:
        raise ValueError(f"{name}: indices {np.min(chosen)}..{np.max(chosen)} are outside 0..{records.size - 1}")
    labels = {key: values[chosen] for key, values in records.labels.items()}
    return records._replace(
        name=name, size=int(chosen.size), read=lambda rows: records.read(chosen[rows]), labels=labels
    )


def restrict(records: Records, keep: Mapping[str, np.ndarray], name: str | None = None) -> Records:
    """Only the examples whose labels are all in `keep` (label key -> class ids), relabelled 0, 1, ... in id order.

    Use the same `keep` for every split, so that labels agree. Raises ValueError when nothing is left.
    """
    name = name or records.name
    kept = np.ones(records.size, bool)
    sorted_ids = {key: np.unique(np.asarray(ids, np.int64)) for key, ids in keep.items()}
    for key, ids in sorted_ids.items():
        kept &= np.isin(records.labels[key], ids)
    if not kept.any():
        raise ValueError(f"{name}: no example belongs to the classes that are kept")
    part = subset(records, np.flatnonzero(kept), name)
    labels = {
        k: np.searchsorted(sorted_ids[k], v).astype(np.int64) if k in sorted_ids else v for k, v in part.labels.items()
    }
    classes = dict(records.classes)
    classes |= {key: tuple(records.classes[key][i] for i in ids) for key, ids in sorted_ids.items()}
    return part._replace(labels=labels, classes=classes)


def concatenate(parts: Sequence[Records], name: str | None = None) -> Records:
    """The parts one after another. Raises ValueError when shapes, label keys or classes differ."""
    if not parts:
        raise ValueError("nothing to concatenate: give at least one Records")
    first = parts[0]
    name = name or "+".join(part.name for part in parts)
    for other in parts[1:]:
        if dict(other.shapes) != dict(first.shapes) or dict(other.classes) != dict(first.classes):
            raise ValueError(f"{name}: {other.name} has other image shapes or classes than {first.name}")
    starts = np.cumsum([0] + [part.size for part in parts])

    def read(rows: np.ndarray) -> tuple[Content, np.ndarray]:
        owner = np.searchsorted(starts, rows, side="right") - 1
        content = {
            key: np.empty((len(rows), *shape.shape), shape.dtype)
            for key, shape in first.shapes.items()
            if key not in first.labels and key != "index"
        }
        good = np.zeros(len(rows), bool)
        for i in np.unique(owner):
            here = np.flatnonzero(owner == i)
            values, good[here] = parts[i].read(rows[here] - starts[i])
            for key in content:
                content[key][here] = values[key]
        return content, good

    labels = {key: np.concatenate([part.labels[key] for part in parts]) for key in first.labels}
    return first._replace(
        name=name,
        size=int(starts[-1]),
        read=read,
        labels=labels,
        problems=lambda: [line for part in parts for line in part.problems()],
    )


def holdout(records: Records, fraction: float, seed: int) -> tuple[Records, Records]:
    """(rest, held out): round(fraction * n) of each class's n examples, at least one and never all, are held out.

    For data that come without a test split. Without labels the whole split counts as one class; with several label
    keys 'fine' (else the first) decides. A class with a single example stays whole in the rest. Seeded; the same on
    every machine. Raises ValueError unless 0 < fraction < 1, or when no example can be held out.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"holdout must lie strictly between 0 and 1, got {fraction}")
    key = "fine" if "fine" in records.labels else next(iter(records.labels), None)
    labels = records.labels[key] if key is not None else np.zeros(records.size, np.int64)
    order = seeding.permutation(records.size, seed, seeding.HOLDOUT)
    held = np.zeros(records.size, bool)
    for members in by_class(labels, order).values():
        if len(members) > 1:
            held[members[: min(max(round(fraction * len(members)), 1), len(members) - 1)]] = True
    if not held.any():
        raise ValueError(f"{records.name}: nothing can be held out, every class has a single example")
    return (
        subset(records, np.flatnonzero(~held), f"{records.name}:rest"),
        subset(records, np.flatnonzero(held), f"{records.name}:held-out"),
    )
