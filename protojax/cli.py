"""The console script: `protojax COMMAND`. A command is a file of `protojax/commands/`; each imports what it needs and
nothing more."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from protojax import __version__
from protojax.errors import guarded

COMMANDS = ("eval", "embed", "compare", "study", "report", "audit", "doctor", "predict", "teach", "search", "prompts")


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
    for name in COMMANDS:
        module = importlib.import_module(f"protojax.commands.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(command)
        command.set_defaults(function=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
