"""`protojax prompts show WORKDIR --class=NAME`: the images that each sub-prompt of a class claims, in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "what each sub-prompt of a class stands for"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("action", choices=("show",))
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--class", dest="name", required=True, help="name of a class")


def run(options: argparse.Namespace) -> int:
    """Print usage and claimed images; ValueError names the classes that the run has sheets of."""
    print(show(options.workdir, options.name))
    return 0


def show(workdir: Path, name: str) -> str:
    """K lines: usage, and the rows of the training split that the sub-prompt claims, with responsibilities."""
    import numpy as np

    from protojax.config import suggest

    path = workdir / "report_data.npz"
    if not path.is_file():
        raise ValueError(f"{path} is missing: finish the run, or write it with `protojax report {workdir}`.")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        if "sheet_rows" not in archive.files:
            raise ValueError(f"{workdir} is no run of a mixture of prompts: its report holds no sheets.")
        names = [str(n) for n in archive["prompt_class_names"]][: len(archive["sheet_rows"])]
        if name not in names:
            raise ValueError(f"no sheet of class {name!r}{suggest(name, names)}; there are sheets of {names}.")
        c = names.index(name)
        usage, rows, shares = (archive[k][c] for k in ("class_usage", "sheet_rows", "sheet_shares"))
    lines = [f"class {name}: {len(usage)} sub-prompts"]
    for k, (share, claimed, responsibility) in enumerate(zip(usage, rows, shares, strict=True)):
        cells = ", ".join(f"{r} ({p:.2f})" for r, p in zip(claimed, responsibility, strict=True) if r >= 0)
        lines.append(f"  {k:3d}  usage {share:6.1%}  {cells or 'no image'}")
    return "\n".join(lines)
