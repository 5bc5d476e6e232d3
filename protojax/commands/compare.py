"""`protojax compare RUN RUN ...`: several runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "a table and overlaid plots of several runs"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="HTML file (default: compare.html beside the runs)")


def run(options: argparse.Namespace) -> int:
    """Print the table, write the page."""
    from protojax.reporting.compare import compare

    table, page = compare(options.workdirs, out=options.out)
    print(table)
    print(f"\n{page}")
    return 0
