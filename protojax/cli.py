"""The console script: `protojax train | eval | compare`. Each command imports what it needs and nothing more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from protojax import __version__
from protojax.errors import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the command. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # absl reads its flags itself
        from protojax.main import main as train

        return train(arguments[1:])
    options = _parser().parse_args(arguments)
    return guarded(lambda: options.function(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="protojax", description="Train encoders against prototypes that do not collapse."
    )
    parser.add_argument("--version", action="version", version=f"protojax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train: protojax train --config=quickstart[:arm=joint,smoke] --workdir=runs/x")

    evaluate = commands.add_parser("eval", help="run the evaluations of a finished or stopped run again")
    evaluate.add_argument("workdir", type=Path)
    evaluate.add_argument("--step", type=int, default=None, help="checkpoint to load (default: the newest)")
    evaluate.add_argument("--json", action="store_true", help="print JSON alone")
    evaluate.set_defaults(function=_eval)

    compare = commands.add_parser("compare", help="a table and overlaid plots of several runs")
    compare.add_argument("workdirs", nargs="+", type=Path)
    compare.add_argument("--out", type=Path, default=None, help="HTML file (default: compare.html beside the runs)")
    compare.set_defaults(function=_compare)

    report = commands.add_parser("report", help="write report.html of a run again")
    report.add_argument("workdir", type=Path)
    report.set_defaults(function=_report)
    return parser


def _eval(options: argparse.Namespace) -> int:
    import json

    from protojax import loading, metrics, running

    running.prepare(loading.read_config(options.workdir))
    numbers = metrics.plain(loading.evaluate(options.workdir, options.step))
    print(json.dumps(numbers, indent=None if options.json else 1))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from protojax.reporting.compare import compare

    table, page = compare(options.workdirs, out=options.out)
    print(table)
    print(f"\n{page}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from protojax.report import write_report

    print(write_report(options.workdir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
