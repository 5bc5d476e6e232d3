"""The data sets that configs name, through TFDS's own mocks: their features, labels and splits, without their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from protojax import experiment
from protojax.config import freeze
from protojax.data import open_records
from tests.toy import config_dict

EXAMPLES = 24
ROOT = Path(__file__).parent.parent.parent


def write_metadata(root: Path, name: str, splits: tuple[str, ...]) -> None:
    """What `tfds build` leaves beside the records: names and sizes of splits, features."""
    with tfds.testing.mock_data(policy=tfds.testing.MockPolicy.USE_CODE):
        builder = tfds.builder(name)
        folder = root / builder.info.full_name
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=builder.name, filetype_suffix="array_record"
        )
        builder.info.set_splits(
            tfds.core.SplitDict(
                [
                    tfds.core.SplitInfo(name=s, shard_lengths=[EXAMPLES], num_bytes=0, filename_template=template)
                    for s in splits
                ]
            )
        )
        folder.mkdir(parents=True, exist_ok=True)
        builder.info.write_to_directory(folder)


def mocked(root: Path):
    return tfds.testing.mock_data(
        num_examples=EXAMPLES, data_dir=str(root), policy=tfds.testing.MockPolicy.USE_FILES
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "classes", "labels"),
    [
        ("i_naturalist2018", 8142, {"fine", "coarse"}),
        ("imagenet2012", 1000, {"fine"}),
        ("imagenet2012_subset", 1000, {"fine"}),
        ("cifar10", 10, {"fine"}),
        ("cifar100", 100, {"fine", "coarse"}),
        ("cars196", 196, {"fine"}),
    ],
)
def test_named_sets_open_with_their_labels(tmp_path, name, classes, labels):
    write_metadata(tmp_path, name, ("train", "validation"))
    with mocked(tmp_path):
        records = open_records(f"tfds:{name}", "train", root=tmp_path, canvas=8, fit="whole", workers=1)
        with pytest.raises(ValueError, match=r"no split 'valdation'; it has: .*did you mean 'validation'"):
            open_records(f"tfds:{name}", "valdation", root=tmp_path)
        taken = records.take(np.arange(4))
    assert records.size == EXAMPLES
    assert set(records.labels) == labels
    assert len(records.classes["fine"]) == classes
    assert taken["image"].shape == (4, 8, 8, 3)
    assert np.all(taken["extent"].min(1) == 8)


def test_the_inat_recipe_builds_unchanged_on_mocked_data(tmp_path):
    """ResNet-50, 65,536 prototypes, batch 1,024: as published but for `data.root`, and k of k-NN for so few images;
    nothing is compiled."""
    write_metadata(tmp_path, "i_naturalist2018", ("train", "validation"))
    c = config_dict("inat")
    c.data.root, c.evals.knn_k = str(tmp_path), (5,)
    with mocked(tmp_path):
        recipe = experiment.build(freeze(c))
        batch = recipe.sources["train"].batch(0)
    assert batch["image"].shape == (1024, 256, 256, 3)
    assert recipe.sources["train"].spec.counts["fine"].sum() == EXAMPLES


PROGRAM = """
import sys
import tensorflow_datasets as tfds
from protojax.main import main
root, arguments = sys.argv[1], sys.argv[2:]
with tfds.testing.mock_data(num_examples=24, data_dir=root, policy=tfds.testing.MockPolicy.USE_FILES):
    sys.exit(main(arguments))
"""
COMMON = (
    "--config=configs/inat.py:smoke", "--config.run.progress=False", "--config.run.tensorboard=False",
    "--config.system.platform=cpu", "--config.data.batch_size=16",
)  # fmt: skip


def trained(command: list[str], workdir: Path) -> dict:
    environ = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((workdir / "summary.json").read_text())


def test_the_inat_config_trains_on_mocked_tfds_data(tmp_path):
    write_metadata(tmp_path / "tfds", "i_naturalist2018", ("train", "validation"))
    workdir = tmp_path / "run"
    source = "{'name': 'tfds:i_naturalist2018', 'canvas': 32, 'fit': 'whole'}"
    summary = trained(
        ["-c", PROGRAM, str(tmp_path / "tfds"), *COMMON, f"--workdir={workdir}", f"--config.data.source={source}",
         f"--config.data.root={tmp_path / 'tfds'}", "--config.data.test_split=validation"],
        workdir,
    )  # fmt: skip
    assert (summary["steps"], summary["finished"]) == (2, True)


def test_the_inat_config_trains_on_a_folder_laid_out_as_inaturalist(tmp_path):
    """root/train/Aves/3019/x.jpg and root/val/...: species below supercategories, photographs of several aspects."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for species in ("Aves/3019", "Aves/3020", "Plantae/17", "Insecta/200"):
            folder = tmp_path / "inat" / split / species
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (40 + 8 * i, 48, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{i}.jpg")
    workdir = tmp_path / "run"
    source = f"{{'name': 'image_folder', 'canvas': 32, 'fit': 'whole', 'packed': '{tmp_path / 'packed'}'}}"
    command = ["-m", "protojax.main", *COMMON, f"--workdir={workdir}", f"--config.data.source={source}",
               f"--config.data.root={tmp_path / 'inat'}", "--config.data.test_split=val"]  # fmt: skip
    summary = trained(command, workdir)
    assert (summary["steps"], summary["finished"]) == (2, True)
    assert (tmp_path / "packed" / "inat-train.images").stat().st_size == 16 * 32 * 32 * 3
