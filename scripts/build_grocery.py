"""Builds protojax/data/assets/grocery.npz: the Grocery Store photographs, 64x64, re-encoded to fit the package.

    python scripts/build_grocery.py INPUT.npz OUTPUT.npz [--quality 88]

INPUT is the 64x64 archive described in docs/data.md (with its sha256): splits train, val and test as packed JPEG. Train
and val are merged, in that order; photographs are re-encoded as JPEG 4:4:4. Huffman tables are the standard ones: then
all headers are equal and the archive's own compression removes them, which beats optimised tables in every file.
Prints counts, the mean peak signal-to-noise ratio against INPUT, and the sha256 of OUTPUT. The same INPUT gives the
same bytes with the same releases of NumPy, Pillow and zlib, which are printed too.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import platform
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, features

MERGED = {"train": ("train", "val"), "test": ("test",)}
KEPT = ("class_names", "coarse_names", "class_to_coarse", "class_descriptions")
LIMIT_BYTES = 15_000_000


def recode(packed: bytes, quality: int) -> tuple[bytes, float]:
    """One photograph again as JPEG 4:4:4, and its PSNR in dB against what was given."""
    before = np.asarray(Image.open(io.BytesIO(packed)).convert("RGB"))
    file = io.BytesIO()
    Image.fromarray(before).save(file, "JPEG", quality=quality, subsampling="4:4:4", optimize=False)
    after = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    mean_square = float(np.mean((after.astype(np.float64) - before) ** 2))
    return file.getvalue(), 10.0 * np.log10(255.0**2 / max(mean_square, 1e-12))


def build(source: Path, target: Path, quality: int) -> None:
    """Writes `target`; ValueError when it is larger than the package may be."""
    with np.load(source, allow_pickle=False) as archive:
        given = {key: archive[key] for key in archive.files if key != "iconic_images"}
    arrays: dict[str, np.ndarray] = {}
    for split, parts in MERGED.items():
        files, ratios = [], []
        for part in parts:
            data, offsets = given[f"{part}_jpeg"], given[f"{part}_offsets"]
            for start, stop in itertools.pairwise(offsets):
                file, ratio = recode(data[start:stop].tobytes(), quality)
                files.append(file)
                ratios.append(ratio)
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)], dtype=np.int64)
        for kind in ("labels", "coarse_labels"):
            arrays[f"{split}_{kind}"] = np.concatenate([given[f"{part}_{kind}"] for part in parts])
        print(f"{split}: {len(files)} photographs, mean PSNR {np.mean(ratios):.2f} dB, lowest {np.min(ratios):.2f} dB")
    arrays |= {key: given[key] for key in KEPT}
    np.savez_compressed(target, **arrays)  # type: ignore[arg-type]
    written = target.read_bytes()
    print(f"{target}: {len(written)} bytes, sha256 {hashlib.sha256(written).hexdigest()}")
    print(
        f"python {platform.python_version()}, numpy {np.__version__}, pillow {PIL.__version__}, "
        f"libjpeg-turbo {features.version('libjpeg_turbo')}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
    )
    if len(written) > LIMIT_BYTES:
        raise ValueError(f"{target} has {len(written)} bytes, more than the {LIMIT_BYTES} allowed; lower --quality")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--quality", type=int, default=88)
    arguments = parser.parse_args()
    build(arguments.input, arguments.output, arguments.quality)


if __name__ == "__main__":
    main()
