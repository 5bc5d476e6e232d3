"""`protojax report WORKDIR`: the page of a run again."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write report.html of a run again"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("workdir", type=Path)


def run(options: argparse.Namespace) -> int:
    """Write the page, print where it is."""
    from protojax.report import write_report

    print(write_report(options.workdir))
    return 0
