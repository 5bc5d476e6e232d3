"""`python -m protojax.main --config=configs/quickstart.py[:arm=joint,smoke] [--workdir=runs/x] [--config.key=value]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from protojax import __version__
from protojax.cli import guarded
from protojax.configs_path import resolve_arguments

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE[:ARM,...] or the name of one", flag_values=_FLAGS)
flags.DEFINE_string("workdir", None, "where the run is written (default: runs/NAME-ARM)", flag_values=_FLAGS)
flags.DEFINE_bool("dry_run", False, "print shapes, sizes and the resolved configuration; train nothing",
                  flag_values=_FLAGS)  # fmt: skip
flags.DEFINE_bool("version", False, "print the version", flag_values=_FLAGS)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the flags, train (or dry-run). Returns the exit status: 0, or 2 for a user's error."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(arguments: list[str]) -> int:
    _FLAGS.unparse_flags()
    try:
        rest = _FLAGS(["protojax train", *resolve_arguments(arguments)])
    except flags.Error as error:
        raise ValueError(f"{error}\nUsage: {__doc__}") from None
    if _FLAGS.version:
        print(f"protojax {__version__}")
        return 0
    if len(rest) > 1 or _FLAGS.config is None:
        raise ValueError(f"got {rest[1:] or 'no --config'}; usage: {__doc__}")
    from protojax import running
    from protojax.config import freeze

    config = freeze(_FLAGS.config)
    workdir = Path(_FLAGS.workdir or f"runs/{config.name}-{config.arm}")
    if _FLAGS.dry_run:
        print(running.describe(config))
        return 0
    return running.run_train(config, workdir)


if __name__ == "__main__":
    sys.exit(main())
