"""Images a second that the loader gives: image files, a packed copy and memory, against a plain Pillow loop.

python -m benchmarks.input
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import common
from protojax.data import make_source, open_records
from protojax.data.records import from_arrays


def write_photographs(root: Path, count: int, side: int) -> None:
    """Smooth JPEG files of several aspects, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = root / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((side + 16 * (i % 8), side), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.jpg", quality=90)


def main() -> None:
    options = common.parser(__doc__).parse_args()
    report = common.Report("input", options)
    count, side, canvas, batch = (2048, 500, 256, 256) if options.full else (256, 500, 256, 64)
    if options.tiny:
        count, side, canvas, batch = 16, 64, 32, 8
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / "photos", count, side)
        files = sorted((root / "photos").rglob("*.jpg"))
        threads = os.cpu_count() or 1
        given = {"root": root / "photos", "canvas": canvas, "fit": "whole"}
        opened = {
            "files, one thread": open_records("image_folder", "train", **given, workers=1),
            f"files, {threads} threads": open_records("image_folder", "train", **given, workers=threads),
            "packed copy": open_records("image_folder", "train", **given, packed=root / "packed"),
            "memory": from_arrays("memory", np.zeros((count, canvas, canvas, 3), np.uint8), {}),
        }

        def plain(step: int) -> np.ndarray:
            chosen = [files[(step * batch + i) % count] for i in range(batch)]
            out = []
            for path in chosen:
                with Image.open(path) as image:
                    out.append(np.asarray(image.convert("RGB").resize((canvas, canvas), Image.Resampling.BICUBIC)))
            return np.stack(out)

        steps = [(i,) for i in range(max(1, count // batch))]
        contenders = [
            common.Contender(name, make_source(found, batch_size=batch, shuffle=True).batch, steps, lambda _: None)
            for name, found in opened.items()
        ]
        contenders.append(common.Contender("plain Pillow loop, one thread", plain, steps, lambda _: None))
        report.compare("batch", contenders, images=batch, side=side, canvas=canvas, cores=threads)
        for row in [r for r in report.records if r["case"] == "batch"]:
            report.add(case="rate", what=row["what"], images_per_second=batch / row["ms"] * 1e3)
    report.table()


if __name__ == "__main__":
    main()
