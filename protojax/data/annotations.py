"""Splits that are lists in a JSON file beside the images (iNaturalist 2017-2019, COCO style)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def read_annotations(
    path: Path, *, with_labels: bool = True
) -> tuple[list[str], dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """(files relative to the image root, labels, class names) of a file with `images`, `annotations`, `categories`.

    images: [{id, file_name}]; annotations: [{image_id, category_id}]; categories: [{id, name, supercategory}]. Class
    numbers follow the sorted category ids, so files of several splits agree as long as they list the same categories.
    'coarse' is the supercategory, when every category has one. Images are in the order of the file.

    Raises ValueError when the file is missing, is not of this form, or lacks the label of an image.
    """
    content = _load(path)
    files = [image["file_name"] for image in content["images"]]
    if not with_labels:
        return files, {}, {}
    categories = sorted(content.get("categories", ()), key=lambda category: category["id"])
    number = {category["id"]: i for i, category in enumerate(categories)}
    category_of = {a["image_id"]: a["category_id"] for a in content.get("annotations", ())}
    unlabelled = [image for image in content["images"] if category_of.get(image["id"]) not in number]
    if unlabelled:
        raise ValueError(
            f"labels missing: {path} gives no category to {len(unlabelled)} of {len(files)} images, such as "
            f"{unlabelled[0]['file_name']!r}; use an annotated split, or labels='none' to train without labels"
        )
    fine = np.array([number[category_of[image["id"]]] for image in content["images"]], np.int64)
    labels, classes = {"fine": fine}, {"fine": tuple(str(c.get("name", c["id"])) for c in categories)}
    if all(category.get("supercategory") for category in categories):
        first = [str(category["supercategory"]) for category in categories]
        classes["coarse"] = tuple(sorted(set(first)))
        labels["coarse"] = np.array([classes["coarse"].index(name) for name in first], np.int64)[fine]
    return files, labels, classes


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"no such annotation file: {path}; `annotations` is relative to data.root, with {{split}} in it"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict) or not content.get("images"):
        raise ValueError(f"{path} lists no images; expected an object with 'images', 'annotations' and 'categories'")
    return content
