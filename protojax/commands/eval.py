"""`protojax eval WORKDIR`: the evaluations of a run again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "run the evaluations of a finished or stopped run again"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--step", type=int, default=None, help="checkpoint to load (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")


def run(options: argparse.Namespace) -> int:
    """Print the metrics as JSON."""
    from protojax import loading, metrics, running

    running.prepare(loading.read_config(options.workdir))
    numbers = metrics.plain(loading.evaluate(options.workdir, options.step))
    print(json.dumps(numbers, indent=None if options.json else 1))
    return 0
