"""TensorFlow Datasets as records, by random access (ArrayRecord files) and without TensorFlow at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from protojax.config import suggest
from protojax.data import decode
from protojax.data.records import Records, make_records

# Named so in i_naturalist2018/2021, imagenet2012(_subset), cifar10/100, cars196.
LABEL_FEATURES = {"label": "fine", "supercategory": "coarse", "coarse_label": "coarse"}


def open_tfds(
    dataset: str,
    split: str,
    *,
    root: str | Path | None = None,
    canvas: int = 256,
    image_key: str = "image",
    label_keys: Mapping[str, str] | None = None,
    on_corrupt: decode.OnCorrupt = "skip",
    cache: bool = False,
    workers: int | None = None,
    fit: decode.Fit = "crop",
) -> Records:
    """A prepared data set `dataset` (such as 'imagenet2012:5.1.0') from `root`, default ~/tensorflow_datasets.

    canvas, fit: how images are stored, uint8 [canvas,canvas,3]; see `open_image_folder`. image_key: the feature with
    the image. label_keys: our label key -> feature, default {'fine': 'label'} and {'coarse': 'supercategory'} (or
    'coarse_label') for those features that there are. Labels are read once when the set is opened, without decoding
    images.

    Raises ValueError when the set is not prepared in `root` as ArrayRecord, or lacks the split or features.
    """
    import tensorflow_datasets as tfds  # takes half a second, and most runs do not need it

    data_dir = str(root) if root is not None else None
    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(f"TFDS knows no data set {dataset!r}, and none is prepared in {data_dir}") from error
    splits = builder.info.splits
    if not splits:
        raise ValueError(_unprepared(dataset, data_dir))
    if split not in splits and "[" not in split:
        raise ValueError(f"tfds:{dataset} has no split {split!r}; it has: {', '.join(splits)}{suggest(split, splits)}")
    try:
        examples = builder.as_data_source(split=split)
    except (NotImplementedError, AssertionError, FileNotFoundError) as error:
        raise ValueError(f"{_unprepared(dataset, data_dir)} ({error})") from error
    return from_data_source(
        examples,
        builder.info.features,
        name=f"tfds:{dataset}/{split}",
        canvas=canvas,
        image_key=image_key,
        label_keys=label_keys,
        on_corrupt=on_corrupt,
        cache=cache,
        workers=workers,
        fit=fit,
    )


def from_data_source(
    examples: Sequence[Mapping[str, Any]],
    features: Mapping[str, Any],
    *,
    name: str,
    canvas: int,
    image_key: str = "image",
    label_keys: Mapping[str, str] | None = None,
    on_corrupt: decode.OnCorrupt = "skip",
    cache: bool = False,
    workers: int | None = None,
    fit: decode.Fit = "crop",
) -> Records:
    """Records over a TFDS data source (`builder.as_data_source`) with the given features; see :func:`open_tfds`."""
    if label_keys is None:
        label_keys = {ours: feature for feature, ours in LABEL_FEATURES.items() if feature in features}
    missing = [key for key in (image_key, *label_keys.values()) if key not in features]
    if missing:
        raise ValueError(f"{name} has no feature {missing[0]!r}; it has: {', '.join(features)}")
    labels = _labels(examples, features, label_keys)
    classes = {key: tuple(features[f].names) for key, f in label_keys.items() if getattr(features[f], "names", None)}

    def load(row: int) -> np.ndarray | tuple[np.ndarray, tuple[int, int]]:
        array = np.asarray(examples[row][image_key])
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        return decode.fit(image, canvas, canvas) if fit == "crop" else decode.whole(image, canvas)

    reader = decode.ImageReader(
        load,
        lambda row: f"{name}[{row}]",
        len(examples),
        (canvas, canvas),
        on_corrupt=on_corrupt,
        cache=cache,
        workers=workers,
        how=fit,
    )
    shapes = decode.content_shapes(canvas, canvas, fit)
    return make_records(name, len(examples), shapes, reader, labels, classes, reader.problems)


def _labels(
    examples: Sequence[Mapping[str, Any]], features: Mapping[str, Any], label_keys: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Our label key -> int64 [M], from one pass over the serialised examples that parses nothing but the labels."""
    if not label_keys:
        return {}
    import tensorflow_datasets as tfds

    wanted = tfds.features.FeaturesDict({feature: features[feature] for feature in label_keys.values()})
    raw = examples.data_source  # type: ignore[attr-defined]  # the ArrayRecord reader below the decoding one
    columns: dict[str, list[int]] = {key: [] for key in label_keys}
    for start in range(0, len(examples), 1024):
        rows = list(range(start, min(start + 1024, len(examples))))
        # Many at once only from the real reader: TFDS's mocks know single rows.
        many = type(raw).__name__ == "ArrayRecordDataSource"
        for record in raw.__getitems__(rows) if many else [raw[row] for row in rows]:
            # A reader may give examples that are decoded already (TFDS's own mocks do).
            example = record if isinstance(record, Mapping) else wanted.deserialize_example_np(record)
            for key, feature in label_keys.items():
                columns[key].append(int(example[feature]))
    return {key: np.array(values, np.int64) for key, values in columns.items()}


def _unprepared(dataset: str, data_dir: str | None) -> str:
    where = data_dir or "~/tensorflow_datasets"
    return (
        f"tfds:{dataset} is not prepared for random access in {where}; prepare it once, where TensorFlow is installed: "
        f"tfds build {dataset} --file_format=array_record --data_dir={where}"
    )
