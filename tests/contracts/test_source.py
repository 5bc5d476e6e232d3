"""What every source promises: batches are a pure function of the step, and every example has its turn."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protojax.api import Source
from protojax.data.longtail import exponential_longtail
from protojax.data.records import Records, subset
from protojax.data.registry import SPLITS, open_records
from protojax.data.sampler import make_source
from tests.data.test_tfds import TinyStripes

SIDE, COUNT, CLASSES = 6, 13, 3  # 13 is prime: no batch size divides it


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def jpeg(i: int) -> bytes:
    file = io.BytesIO()
    picture(i).save(file, "JPEG")
    return file.getvalue()


def write_npz(path: Path, packed: bool) -> None:
    arrays = {}
    for split, size in (("train", COUNT), ("test", 5)):
        arrays[f"{split}_labels"] = np.arange(size) % CLASSES
        if packed:
            files = [jpeg(i) for i in range(size)]
            arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
            arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        else:
            arrays[f"{split}_images"] = np.stack([np.asarray(picture(i)) for i in range(size)])
    np.savez(path, **arrays)


def write_folder(root: Path, splits: bool) -> None:
    for i in range(COUNT):
        folder = root / ("train" if splits else "") / f"class{i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i:02}.png")


def written(base: Path) -> Path:
    """The files of every data set that reads files, below `base`."""
    write_npz(base / "plain.npz", packed=False)
    write_npz(base / "packed.npz", packed=True)
    write_folder(base / "folder", splits=True)
    write_folder(base / "one_piece", splits=False)
    (base / "folder" / "train" / "class0" / "broken.png").write_bytes(b"not an image")
    TinyStripes(data_dir=str(base / "tfds"), file_format="array_record").download_and_prepare()
    return base


def small_tail(base: Path) -> Records:
    records = open_records("synthetic", "train", size=40, classes=4, side=SIDE)
    return subset(records, exponential_longtail(records.labels["fine"], 5.0, 0))


OPEN = {
    "embedded": lambda base: subset(open_records("embedded", "train"), np.arange(0, 2900, 190)),
    "synthetic": lambda base: open_records("synthetic", "train", size=COUNT, classes=CLASSES, side=SIDE),
    "npz": lambda base: open_records("npz", "train", root=base / "plain.npz"),
    "npz_jpeg": lambda base: open_records("npz", "train", root=base / "packed.npz"),
    "union": lambda base: open_records("npz", "train+test", root=base / "plain.npz"),
    "image_folder": lambda base: open_records("image_folder", "train", root=base / "folder", canvas=SIDE, verify=True),
    "unlabelled": lambda base: open_records(
        "image_folder", "train", root=base / "folder", canvas=SIDE, labels="none", verify=True
    ),
    "damaged": lambda base: open_records("image_folder", "train", root=base / "folder", canvas=SIDE),
    "holdout": lambda base: open_records(
        "image_folder", "train", root=base / "one_piece", canvas=SIDE, holdout_fraction=0.25
    ),
    "longtail": small_tail,
    "tfds": lambda base: open_records("tfds:tiny_stripes", "train", root=base / "tfds", canvas=SIDE),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("sources"))


@pytest.fixture(params=list(OPEN))
def records(request, base) -> Records:
    return OPEN[request.param](base)


def training(records: Records, batch_size: int = 4, **options) -> Source:
    return make_source(records, batch_size=batch_size, seed=3, shuffle=True, remainder="wrap", **options)


def ordered(records: Records, batch_size: int = 4, **options) -> Source:
    return make_source(records, batch_size=batch_size, shuffle=False, remainder="pad", **options)


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_every_kind_of_data_set_is_here():
    kinds = {"npz_jpeg": "npz", "tfds": "tfds:NAME"}
    assert set(SPLITS) <= {kinds.get(name, name) for name in OPEN}


@pytest.mark.parametrize("make", [training, ordered])
def test_batches_are_what_the_spec_says(records, make):
    source = make(records)
    spec, batch = source.spec, source.batch(0)
    assert {"image", "index", "mask"} <= set(batch)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: ((spec.batch_size, *s.shape), s.dtype) for k, s in spec.shapes.items()
    }
    assert (batch["image"].dtype, batch["index"].dtype, batch["mask"].dtype) == (np.uint8, np.int64, np.bool_)
    assert spec.size == records.size > 0
    assert spec.steps_per_epoch == -(-spec.size // spec.batch_size)
    assert set(spec.classes) == set(records.labels) == set(spec.counts)
    for key, names in spec.classes.items():
        assert len(set(names)) == len(names) == len(spec.counts[key])
        assert batch[key].min() >= 0
        assert batch[key].max() < len(names)
        assert spec.counts[key].sum() == spec.size
    assert all(isinstance(v, np.ndarray) for v in batch.values())


@pytest.mark.parametrize("make", [training, ordered])
def test_a_batch_is_a_pure_function_of_the_step(records, make):
    """Another instance, another order, several threads, and arrays that the caller writes to: nothing changes."""
    source, other = make(records), make(records)
    forward = [source.batch(step) for step in range(8)]
    with ThreadPoolExecutor(4) as pool:
        backward = dict(zip(range(7, -1, -1), pool.map(other.batch, range(7, -1, -1)), strict=True))
    for step, batch in enumerate(forward):
        assert_equal(batch, backward[step])
    for values in backward[0].values():
        if values.flags.writeable:
            values[...] = 0
    assert_equal(other.batch(0), forward[0])
    far = 10**7
    assert_equal(source.batch(far), other.batch(far))
    with pytest.raises(ValueError, match="step must be 0 or more, got -1"):
        source.batch(-1)


def test_an_epoch_of_training_has_every_example_once(records):
    source = training(records)
    size, epochs = source.spec.size, 3
    steps = -(-size * epochs // 4)
    batches = [source.batch(step) for step in range(steps)]
    assert all(b["mask"].all() for b in batches)
    stream = np.concatenate([b["index"] for b in batches])[: size * epochs].reshape(epochs, size)
    wanted = np.arange(size)
    if records.problems():  # an example that cannot be read is replaced by the next one
        wanted = np.sort(records.take(wanted)["index"])
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(wanted, (epochs, 1)))
    assert len({tuple(epoch) for epoch in stream}) == epochs


def test_a_pass_of_evaluation_has_every_readable_example_once_in_order(records):
    source = ordered(records)
    batches = [source.batch(step) for step in range(source.spec.steps_per_epoch)]
    index, mask = (np.concatenate([b[k] for b in batches]) for k in ("index", "mask"))
    readable = np.unique(records.take(np.arange(records.size))["index"])
    np.testing.assert_array_equal(index[mask], readable)
    for key, labels in records.labels.items():
        np.testing.assert_array_equal(np.concatenate([b[key] for b in batches])[mask], labels[readable])


def test_processes_share_the_global_batch_without_overlap(records):
    whole = training(records)
    parts = [training(records, process_index=i, process_count=2) for i in range(2)]
    for step in (0, 5):
        slices = [part.batch(step) for part in parts]
        assert all(len(s["index"]) == 2 for s in slices)
        assert_equal({k: np.concatenate([s[k] for s in slices]) for k in slices[0]}, whole.batch(step))
    assert parts[0].spec.batch_size == whole.spec.batch_size


def test_index_names_the_example(records):
    """The example at `index` is the one in the batch: image and labels stay together through shuffling."""
    batch = training(records).batch(2)
    direct = records.take(batch["index"])
    assert_equal({k: v for k, v in batch.items() if k != "mask"}, direct)
