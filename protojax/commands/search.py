"""Command `search`: the captions or images of a run's gallery that are nearest to a text or an image."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

HELP = "nearest captions and images of an aligned run to a text or an image file"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", help="workdir of a finished alignment run")
    parser.add_argument("query", help="an image file, or a text")
    parser.add_argument("--width", type=int, default=None, help="a trained prefix width (default: all of it)")
    parser.add_argument("--top", type=int, default=5, help="how many to show")
    parser.add_argument("--split", default=None, help="split that is searched (default: the run's test split)")


def run(options: argparse.Namespace) -> int:
    for line in search(Path(options.workdir), options.query, options.width, options.top, options.split):
        print(line)
    return 0


def search(workdir: Path, query: str, width: int | None = None, top: int = 5, split: str | None = None) -> list[str]:
    """Lines 'cosine, caption' of the gallery's captions and 'cosine, image number, its caption' of its images.

    Raises ValueError for a run of another workload, a width that was not trained, or an empty query."""
    from protojax.data.decode import decode
    from protojax.loading import load, read_config
    from protojax.workloads.alignment_recipe import pairs_of

    config = read_config(workdir)
    if config.method.workload != "alignment":
        raise ValueError(f"{workdir} is a run of {config.method.workload!r}; search needs an alignment run")
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    encode = load(workdir)
    gallery = pairs_of(config, split or config.data.test_split)
    if "image" not in gallery.shapes:
        raise ValueError(f"{gallery.name} holds image tokens, not images: there is nothing to show")
    images = gallery.read(np.arange(gallery.size))[0]["image"]
    captions = list(gallery.texts.captions)
    if Path(query).is_file():
        size = images.shape[1]
        one = encode.encode(np.asarray(decode(query, size, size))[None], width)
    else:
        one = encode.encode_text([query], width)
    out = []
    for what, rows, names in (
        ("captions", encode.encode_texts(gallery.texts, width), captions),
        ("images", encode.encode(images, width), [captions[r[0]] for r in gallery.caption]),
    ):
        scores = (rows @ one[0]).astype(np.float64)
        out.append(f"nearest {what} of {len(rows)} in {gallery.name}:")
        for i in np.argsort(-scores, kind="stable")[:top]:
            number = f"image {i}, " if what == "images" else ""
            out.append(f"  {scores[i]:+.4f}  {number}{names[i]}")
    return out
