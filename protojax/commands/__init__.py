"""One file a command of the console script `protojax`. Each has HELP (a line), `arguments(parser)` and `run(options)
-> exit status`, and imports what it needs inside `run`, so that `--help` is quick."""
