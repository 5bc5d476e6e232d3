"""`protojax doctor WORKDIR`: what is wrong with a run, in plain sentences. Exit status 1 when something is."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

HELP = "say what is wrong with a run, and what to try"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--json", action="store_true", help="print a JSON list of findings alone")


def run(options: argparse.Namespace) -> int:
    """Print the findings in order of consequence; 0 for a healthy run, 1 for another."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the accelerator may be busy with the run that is examined
    from protojax.reporting.doctor import examine, lines

    seen = examine(options.workdir)
    print(json.dumps(list(seen.findings)) if options.json else "\n".join(lines(options.workdir, seen)))
    return int(seen.wrong)
