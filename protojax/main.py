"""`python -m protojax.main --config=configs/quickstart.py[:arm=joint,smoke] [--workdir=runs/x] [--config.KEY=VALUE]`"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from protojax import __version__
from protojax.configs_path import load, split_arguments
from protojax.errors import guarded
from protojax.overrides import with_schedules


def main(argv: Sequence[str] | None = None) -> int:
    """Read the flags, train (or dry-run). Returns the exit status: 0, or 2 for a user's error."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(arguments: list[str]) -> int:
    values, rest = _parse(arguments)
    if values.version or values.help:
        print(f"protojax {__version__}" if values.version else f"usage: {__doc__}\n{values.get_help()}")
        return 0
    if rest or "config" not in values:
        raise ValueError(f"got {rest or 'no --config'}; usage: {__doc__}")
    from protojax import running
    from protojax.config import freeze

    config = freeze(values.config)
    workdir = Path(values.workdir or f"runs/{config.name}-{config.arm}")
    if values.dry_run:
        print(running.describe(config))
        return 0
    return running.run_train(config, workdir)


def _parse(arguments: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """(flags, what is left). Raises ValueError for an unknown flag or key, or a value of another type."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "where the run is written (default: runs/NAME-ARM)", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print configuration, shapes and memory; train nothing", flag_values=values)
    flags.DEFINE_bool("version", False, "print the version", flag_values=values)
    flags.DEFINE_bool("help", False, "print this", flag_values=values)
    file, rest = split_arguments(arguments)
    argv = ["protojax train", *rest]
    try:
        if file is not None:
            config = load(file)
            argv = with_schedules(config, argv)
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        return values, values(argv)[1:]
    except (flags.Error, AttributeError, KeyError) as error:
        reason: BaseException = error
        while reason.args and isinstance(reason.args[0], BaseException):  # ml_collections wraps a KeyError
            reason = reason.args[0]
        text = f"the configuration has no key {reason.args[0]}" if isinstance(reason, KeyError) else str(reason)
        raise ValueError(text) from error


if __name__ == "__main__":
    sys.exit(main())
