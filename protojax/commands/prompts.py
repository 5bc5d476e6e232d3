"""`protojax prompts show WORKDIR --class=NAME`: the images that each sub-prompt of a class claims.

In the terminal as rows of the training split; with --out as a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what each sub-prompt of a class stands for"
SUFFIXES = (".png", ".svg", ".pdf")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("action", choices=("show",))
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--class", dest="name", required=True, help="name of a class")
    parser.add_argument("--out", type=Path, default=None, help="draw it: sheet.png, .svg or .pdf")


def run(options: argparse.Namespace) -> int:
    """Print usage and claimed images, draw them where asked; ValueError names the classes of the run."""
    print(show(options.workdir, options.name, options.out))
    return 0


def show(workdir: Path, name: str, out: Path | None = None) -> str:
    """K lines: usage, what most claimed images are, and the rows of the training split that the sub-prompt claims, with
    responsibilities at the temperature of training. out: the same with the images, usage bars and similarities.

    Raises ValueError for a run without sheets, an unknown class and a file name that is no picture.
    """
    import numpy as np

    from protojax.reporting.prompts_sheets import sheet_of

    if out is not None and (out.suffix not in SUFFIXES or not out.parent.is_dir()):
        raise ValueError(f"--out={out}: expected a name that ends in {', '.join(SUFFIXES)}, in a folder that exists.")
    path = workdir / "report_data.npz"
    if not path.is_file():
        raise ValueError(f"{path} is missing: finish the run, or write it with `protojax report {workdir}`.")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        if "sheet_shown" not in archive.files:
            raise ValueError(f"{workdir} is no run of a mixture of prompts: its report holds no sheets.")
        sheet = sheet_of({key: archive[key] for key in archive.files if key != "sheet_images"}, name)
    lines = [f"class {name}: {len(sheet.usage)} sub-prompts", *([sheet.description] if sheet.description else [])]
    for k, (share, claimed, responsibility) in enumerate(zip(sheet.usage, sheet.rows, sheet.shares, strict=True)):
        cells = ", ".join(f"{r} ({p:.2f})" for r, p in zip(claimed, responsibility, strict=True) if r >= 0)
        lines.append(f"  {k:3d}  usage {share:6.1%}  {sheet.modes[k]:24s}  {cells or 'no image'}")
    if out is not None:
        lines.append(_drawn(workdir, sheet, out))
    return "\n".join(lines)


def _drawn(workdir: Path, sheet: object, out: Path) -> str:
    from protojax import loading
    from protojax.reporting.prompts_sheets import Sheet, draw, tiles
    from protojax.workloads.prompts import open_protocol, pictures_of

    assert isinstance(sheet, Sheet)
    config = loading.read_config(workdir)
    pictures = pictures_of(config, open_protocol(config).cache)
    images = None if pictures is None else tiles(sheet.rows, pictures, 96)
    draw(sheet._replace(images=images), out)
    return f"{out} written" + ("" if images is not None else "; the source has no pictures: tiles hold row numbers")
