"""Sets with label distributions, by name: a synthetic city, tables of a user, and images with distances to classes.

Each opener gives {'train', 'val', 'test'} of `tables.Table`; `sources` makes batches of them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from protojax.api import Source
from protojax.data import sampler, tables
from protojax.data.city import synthetic_city
from protojax.data.npz import _open_archive
from protojax.data.records import make_records
from protojax.data.registry import open_records
from protojax.data.tables import Preparation, Table

SPLIT_NAMES = ("train", "val", "test")


# ------------------------------------------------------------------------------------------------- a user's table
def read_columns(path: str | Path) -> dict[str, np.ndarray]:
    """Columns of a CSV (with a header) or Parquet file: float64 where every cell is a number or empty, else text.

    Raises ValueError for a missing, empty or ragged file, or Parquet without pyarrow.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"no such file: {path}; data.root must be the path of a .csv, .parquet or .npz file.")
    if path.suffix in (".parquet", ".pq"):
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError("reading Parquet needs pyarrow: pip install pyarrow, or save the table as CSV.") from None
        table = parquet.read_table(path).to_pydict()
        return {name: _typed(["" if v is None else str(v) for v in values]) for name, values in table.items()}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        raise ValueError(f"{path}: expected a header and at least one row, got {len(rows)} lines.")
    header = [name.strip() for name in rows[0]]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: the header names {twice} more than once.")
    ragged = [i + 2 for i, row in enumerate(rows[1:]) if len(row) != len(header)]
    if ragged:
        raise ValueError(f"{path}: line {ragged[0]} does not have {len(header)} cells as the header does.")
    return {name: _typed([row[i].strip() for row in rows[1:]]) for i, name in enumerate(header)}


def read_features(path: str | Path) -> dict[str, np.ndarray]:
    """Columns to predict from: of a CSV or Parquet file, or `features [N,F]` (and `columns [F]`) of an .npz archive."""
    if Path(path).suffix != ".npz":
        return read_columns(path)
    with _open_archive(path) as archive:
        if "features" not in archive.files:
            raise ValueError(f"{path} lacks the array 'features' [N,F]; it has {archive.files}.")
        features = archive["features"]
        names = archive["columns"].tolist() if "columns" in archive.files else range(features.shape[1])
    return tables.numeric([n if isinstance(n, str) else f"x{n}" for n in names], features)


def _typed(cells: list[str]) -> np.ndarray:
    try:
        return np.asarray([float(c) if c.lower() not in ("", "na", "null", "none") else np.nan for c in cells])
    except ValueError:
        return np.asarray(cells, dtype=str)


def table(
    *,
    root: str | Path,
    target_prefix: str = "target_",
    distance_prefix: str = "distance_",
    features: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    group: str = "group",
    split: str = "group",
    split_column: str = "split",
    val_fraction: float = 0.1,
    test_fraction: float = 0.3,
    split_seed: int = 0,
    distance_scale: float | None = None,
    missing_distance: float = 2400.0,
) -> dict[str, Table]:
    """A CSV, Parquet or .npz file (`features [N,F]`, `targets [N,C]`, optional `group`, `split`) as splits.

    Columns `target_NAME` are the distribution; or, with distance_scale, columns `distance_NAME`. features: names
    (empty: every other column but group, split and `ignore`). Where the file has a column `split` ('train', 'val',
    'test') it decides; else `split` does: 'group' (no group on both sides; rows without a group column are split at
    random) or 'random'.

    Raises ValueError for missing columns, targets as `tables.check_targets`, or a group that would be in two splits.
    """
    name = Path(root).stem
    columns = _npz_columns(root, target_prefix) if Path(root).suffix == ".npz" else read_columns(root)
    columns = dict(columns)
    targets, categories = _targets(columns, name, target_prefix, distance_prefix, distance_scale, missing_distance)
    unknown = [n for n in (*features, *ignore) if n not in columns]
    if unknown:
        raise ValueError(f"{name}: no columns {unknown}; the file has {sorted(columns)}.")
    given = columns.pop(split_column, None)
    groups_of = columns.pop(group, None)
    for key in [k for k in columns if k.startswith((target_prefix, distance_prefix)) or k in ignore]:
        del columns[key]
    chosen = {n: columns[n] for n in features} if features else columns
    if not chosen:
        raise ValueError(f"{name}: no feature column is left beside targets, group and split.")
    grouped = groups_of is not None
    labels, ids = np.unique(np.zeros(len(targets)) if groups_of is None else groups_of.astype(str), return_inverse=True)
    whole = Table(name, chosen, targets, categories, ids.astype(np.int64), tuple(str(v) for v in labels))
    if given is not None:
        parts = {s: np.flatnonzero(given.astype(str) == s) for s in SPLIT_NAMES}
        other = sorted(set(given.astype(str).tolist()) - set(SPLIT_NAMES))
        if other:
            raise ValueError(f"{name}: column {split_column!r} holds {other[:4]}, expected {list(SPLIT_NAMES)}.")
        found = {s: whole.take(rows, f"{name}/{s}") for s, rows in parts.items()}
    else:
        by = split if grouped else "random"
        found = tables.split_table(whole, by=by, val=val_fraction, test=test_fraction, seed=split_seed)
    tables.check_filled(found)
    if grouped and split == "group":
        tables.check_groups(found)
    return found


def _npz_columns(root: str | Path, prefix: str) -> dict[str, np.ndarray]:
    with _open_archive(root) as archive:
        missing = [k for k in ("features", "targets") if k not in archive.files]
        if missing:
            raise ValueError(
                f"{root} lacks the arrays {missing}; it has {archive.files}. Save features [N,F], targets [N,C]."
            )
        arrays = {k: archive[k] for k in archive.files}
    features, targets = arrays["features"], arrays["targets"]
    targets = tables.check_targets(targets, Path(root).stem)
    if features.ndim != 2 or len(features) != len(targets):
        raise ValueError(f"{root}: expected features [N,F] with N = {len(targets)}, got shape {features.shape}.")
    names = [str(c) for c in arrays["columns"]] if "columns" in arrays else [f"x{i}" for i in range(features.shape[1])]
    kinds = [str(c) for c in arrays.get("categories", np.arange(targets.shape[1]).astype(str))]
    out = {**tables.numeric(names, features), **tables.numeric([prefix + c for c in kinds], targets)}
    return out | {k: arrays[k] for k in ("group", "split") if k in arrays}


def _targets(
    columns: Mapping[str, np.ndarray], name: str, prefix: str, distances: str, scale: float | None, missing: float
) -> tuple[np.ndarray, tuple[str, ...]]:
    wanted = prefix if scale is None else distances
    found = [c for c in columns if c.startswith(wanted)]
    if len(found) < 2:
        hint = (
            " Distances need data.distance_scale."
            if scale is None and any(c.startswith(distances) for c in columns)
            else ""
        )
        raise ValueError(
            f"{name}: expected at least 2 columns that begin with {wanted!r}, got {found}.{hint} The file has "
            f"{sorted(columns)[:12]}."
        )
    text = [c for c in found if columns[c].dtype.kind not in "fiub"]
    if text:
        raise ValueError(f"{name}: the columns {text} hold text, expected numbers.")
    matrix = np.stack([columns[c] for c in found], axis=1)
    categories = tuple(c.removeprefix(wanted) for c in found)
    if scale is not None:
        matrix = tables.from_distances(matrix, scale, missing)
    return tables.check_targets(matrix, name), categories


# ------------------------------------------------------------------------------------------------------- images
def class_distances(
    *, root: str | Path, reference: int = 6000, train: int = 4000, val: int = 2000, test: int = 2000,
    scale: float = 1.0, pooled: int = 7, scaling: str = "badly", pixels: bool = False,
) -> dict[str, Table]:  # fmt: skip
    """Nearest-class distances of images in an .npz archive (`docs/data.md`), a real counterpart of the city.

    The first `reference` training images are the services; of the images after them and of the first `test` test images
    d_j = Euclidean distance in pixels of [0,1] to the nearest reference of class j, target softmax(-d / scale). Input:
    the image averaged to pooled x pooled cells; scaling 'badly' adds two columns around 1e4 and 2e4, constant in
    each of 4 groups and shifted by 1.3 and 0.8 on the test split. pixels: keep the images too, for an image backbone.
    """
    first, last = open_records("npz", "train", root=root), open_records("npz", "test", root=root)
    need = reference + train + val
    if first.size < need or last.size < test:
        raise ValueError(
            f"{first.name}: {need} training and {test} test images are needed; it has {first.size}, {last.size}."
        )
    label = "fine"
    grey = lambda images: images.astype(np.float64).mean(axis=-1) / 255.0  # noqa: E731
    raw = {"train": first.take(np.arange(reference, reference + train))["image"],
           "val": first.take(np.arange(reference + train, need))["image"],
           "test": last.take(np.arange(test))["image"]}  # fmt: skip
    known = grey(first.take(np.arange(reference))["image"]).reshape(reference, -1)
    classes, labels = first.classes[label], first.labels[label][:reference]
    rng, out = np.random.default_rng(7), {}
    for split in SPLIT_NAMES:
        images = grey(raw[split])
        flat = images.reshape(len(images), -1)
        square = (flat**2).sum(1)[:, None] + (known**2).sum(1)[None, :] - 2 * flat @ known.T
        d = np.sqrt(np.maximum(square, 0))
        d = np.stack([d[:, labels == j].min(axis=1) for j in range(len(classes))], axis=1)
        side = images.shape[1] // pooled
        cells = (
            images[:, : side * pooled, : side * pooled].reshape(len(images), pooled, side, pooled, side).mean((2, 4))
        )
        columns = tables.numeric([f"cell_{i:02d}" for i in range(pooled * pooled)], cells.reshape(len(images), -1))
        group = rng.integers(0, 4, len(images))
        if scaling == "badly":
            shift = (1.3, 0.8) if split == "test" else (1.0, 1.0)
            columns["density"] = 1e4 * shift[0] * (0.8 + 0.15 * group)
            columns["income"] = 2e4 * shift[1] * (1.2 - 0.12 * group)
        out[split] = Table(
            f"{first.name}/{split}",
            columns,
            tables.from_distances(d, scale, np.inf),
            tuple(classes),
            group,
            tuple(f"group {i}" for i in range(4)),
            images=raw[split] if pixels else None,
        )
    return out


def sibling_images(
    *, data_set: str = "embedded", root: str | None = None, on_class: float = 0.5, val_fraction: float = 0.2
) -> dict[str, Table]:
    """Images with a hierarchy ('fine' and 'coarse' labels): target `on_class` on the class, the rest spread evenly over
    its coarse siblings (all of it on a class without any). The training split is divided into train and val."""
    first, last = (open_records(data_set, s, root=root) for s in ("train", "test"))
    count = len(first.classes["fine"])
    parent = np.full(count, -1)
    for records in (first, last):
        parent[records.labels["fine"]] = records.labels["coarse"]
    same = (parent[:, None] == parent[None, :]) & ~np.eye(count, dtype=bool) & (parent >= 0)[:, None]
    siblings = same / np.maximum(same.sum(axis=1, keepdims=True), 1)
    rows = np.where(same.any(axis=1)[:, None], on_class * np.eye(count) + (1 - on_class) * siblings, np.eye(count))
    order = np.random.default_rng(0).permutation(first.size)
    cut = round(first.size * (1 - val_fraction))
    parts = {"train": (first, order[:cut]), "val": (first, order[cut:]), "test": (last, np.arange(last.size))}
    return {
        split: Table(f"{records.name}/{split}", {}, rows[records.labels["fine"][index]], tuple(records.classes["fine"]),
                     records.labels["coarse"][index], tuple(records.classes["coarse"]),
                     images=records.take(index)["image"])
        for split, (records, index) in parts.items()
    }  # fmt: skip


def images(*, root: str | Path) -> dict[str, Table]:
    """Images with soft labels in one .npz archive: `images [N,H,W,3]` uint8, `targets [N,C]`, `split [N]`, and optional
    `categories [C]`, `group [N]`."""
    with _open_archive(root) as archive:
        arrays = {k: archive[k] for k in archive.files}
    missing = [k for k in ("images", "targets", "split") if k not in arrays]
    if missing:
        raise ValueError(f"{root} lacks the arrays {missing}; it has {sorted(arrays)}.")
    targets, pictures = tables.check_targets(arrays["targets"], Path(root).stem), arrays["images"]
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or len(pictures) != len(targets):
        raise ValueError(
            f"{root}: expected images uint8 [{len(targets)},H,W,3], got {pictures.dtype} {pictures.shape}."
        )
    names = tuple(str(c) for c in arrays.get("categories", np.arange(targets.shape[1])))
    labels, ids = np.unique(arrays.get("group", np.zeros(len(targets), np.int64)).astype(str), return_inverse=True)
    whole = Table(Path(root).stem, {}, targets, names, ids.astype(np.int64), tuple(labels.tolist()), images=pictures)
    where = arrays["split"].astype(str)
    found = {s: whole.take(np.flatnonzero(where == s), f"{whole.name}/{s}") for s in SPLIT_NAMES}
    tables.check_filled(found)
    return found


SOURCES: dict[str, Callable[..., dict[str, Table]]] = {
    "synthetic_city": synthetic_city,
    "table": table,
    "class_distances": class_distances,
    "sibling_images": sibling_images,
    "images": images,
}


# ------------------------------------------------------------------------------------------------------ batches
def prepared(split: Table, preparation: Preparation | None) -> dict[str, np.ndarray]:
    """Per-sample arrays of a batch: 'features' [N,F], 'targets' [N,C], and neighbours or images where there are any."""
    out: dict[str, np.ndarray] = {"targets": split.targets.astype(np.float32)}
    if preparation is not None:
        out["features"] = tables.apply_preparation(preparation, split.columns, split.name)
    if split.graph:
        assert preparation is not None
        around = split.graph["neighbours"]
        flat = tables.numeric(list(split.columns), around.reshape(-1, around.shape[-1]))
        inputs = tables.apply_preparation(preparation, flat, f"{split.name}, neighbours")
        out["neighbours"] = inputs.reshape(*around.shape[:2], -1)
        out["edges"] = split.graph["edges"].astype(np.float32)
        out["neighbour_mask"] = split.graph["neighbour_mask"]
    if split.images is not None:
        out["image"] = split.images
    return out


def sources(
    splits: Mapping[str, Table], preparation: Preparation | None, *, batch_size: int, eval_batch_size: int, seed: int
) -> dict[str, Source]:
    """'train' (shuffled), and ordered passes 'bank' (the training split), 'val' and 'test'."""
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def records(split: Table) -> Any:
        arrays = prepared(split, preparation)
        shapes = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in arrays.items()}

        def read(rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
            return {k: v[rows] for k, v in arrays.items()}, np.ones(len(rows), bool)

        return make_records(split.name, split.size, shapes, read, {"group": split.group}, {"group": split.groups})

    found = {name: records(split) for name, split in splits.items()}
    ordered = {
        "bank" if name == "train" else name: sampler.make_source(
            r, batch_size=eval_batch_size, shuffle=False, remainder="pad", **process
        )
        for name, r in found.items()
    }
    train = sampler.make_source(
        found["train"], batch_size=batch_size, seed=seed, shuffle=True, remainder="wrap", **process
    )
    return {"train": train, **ordered}
