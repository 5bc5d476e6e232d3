"""TFDS by random access, on a data set that the test prepares itself: no TensorFlow, no download."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from protojax.data import open_records


class TinyStripes(tfds.core.GeneratorBasedBuilder):
    """Nine images of one colour, sizes 8x10 to 16x10."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = Path(__file__).parent
    url_infos: ClassVar[dict] = {}  # nothing to download; the default looks for files beside the installed package

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["one", "two", "three"]),
                "kind": tfds.features.ClassLabel(num_classes=2),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(9), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (10, 8 + i), (10 * (i % 3), 100 * (i % 2), i)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 3, "kind": i % 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    TinyStripes(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


def test_images_and_labels_stay_together_without_tensorflow(data_dir):
    options = {"root": data_dir, "canvas": 8, "workers": 2, "label_keys": {"fine": "label", "coarse": "kind"}}
    train, test = (open_records("tfds:tiny_stripes", split, **options) for split in ("train", "test"))
    assert (train.size, test.size) == (9, 3)
    assert train.classes == {"fine": ("one", "two", "three"), "coarse": ("0", "1")}
    taken = train.take(np.arange(9))
    assert taken["image"].shape == (9, 8, 8, 3)
    np.testing.assert_array_equal(taken["image"][:, 0, 0, 0], 10 * taken["fine"])
    np.testing.assert_array_equal(taken["image"][:, 0, 0, 1], 100 * taken["coarse"])
    np.testing.assert_array_equal(np.sort(taken["image"][:, 0, 0, 2]), np.arange(9))
    assert "tensorflow" not in sys.modules


def test_tfds_errors(data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"tfds:tiny_stripes has no split 'val'; it has: .*train"):
        open_records("tfds:tiny_stripes", "val", root=data_dir)
    with pytest.raises(ValueError, match=r"has no feature 'picture'; it has: .*image"):
        open_records("tfds:tiny_stripes", "train", root=data_dir, image_key="picture")
    with pytest.raises(ValueError, match=r"not prepared for random access.*tfds build tiny_stripes --file_format=arr"):
        open_records("tfds:tiny_stripes", "train", root=tmp_path)
    with pytest.raises(ValueError, match="TFDS knows no data set 'no_such_set'"):
        open_records("tfds:no_such_set", "train", root=tmp_path)
    with pytest.raises(ValueError, match="unknown data set 'tfds:'"):
        open_records("tfds:", "train")
