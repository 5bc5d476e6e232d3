"""`protojax study STUDY`: arms x seeds, resumable, with the tables and plots of a results page."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "run arms x seeds of a study file and write its tables"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("study", help="a study file or an installed one (configs/studies), as NAME[:ARGUMENT]")
    parser.add_argument("--workdir", type=Path, default=None, help="where the runs are (default: below runs/studies)")
    parser.add_argument("--data", type=Path, default=None, help="the folder of the archives that its configs name")
    parser.add_argument("--out", type=Path, default=None, help="results page (default: NAME.md in the workdir)")
    parser.add_argument("--only", default="", help="labels of trials, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--smoke", action="store_true", help="the study's smallest version: does it all run?")
    parser.add_argument("--tables", action="store_true", help="train nothing, write the tables of what is there")


def run(options: argparse.Namespace) -> int:
    """Train what is missing, write the page, print where."""
    from protojax import study as study_lib
    from protojax import study_page

    if options.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {options.jobs}.")
    study = study_lib.load(options.study, options.smoke)
    root = options.workdir or Path("runs/studies") / ((study.runs or study.name) + ("-smoke" if options.smoke else ""))
    out = options.out or root / f"{study.name}.md"
    command = f"protojax study {options.study}" + (" --smoke" if options.smoke else "")
    command += "" if options.data is None else " --data=DIR"
    records, ended = out.with_suffix(".jsonl"), options.tables
    try:
        if not options.tables:
            only = tuple(label.strip() for label in options.only.split(",") if label.strip())
            ended = study_lib.run(study, root, only=only, jobs=options.jobs, data=options.data, records=records)
    finally:  # also when a run failed: what the others found is on the page
        if ended or study_page.results(study, root, records):
            for path in study_page.write(study, root, out, command):
                print(path)
    return 0
