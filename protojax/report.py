"""From a run directory to one HTML page that explains the run, and from several to a comparison.

Neither needs a device, a checkpoint or a network: they read what the trainer wrote (`metrics.jsonl`, `summary.json`,
`config.json`, `report_data.npz`) and say what is missing.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from protojax import experiment
from protojax.reporting.compare import compare
from protojax.reporting.page import Html, page
from protojax.reporting.records import Run, dig, load_run, write_text

__all__ = ["compare", "write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    The page is one file: images and plots are inside, nothing is fetched. It begins with the verdict in plain words
    (did it learn, did the prototypes collapse, which groups suffer, what next) and ends with every number beside its
    control. A run that has not finished, a damaged line or a missing array is said on the page.

    Raises:
      ValueError: the directory does not exist, holds nothing of a run, or cannot be written.
    """
    run = load_run(run_dir)
    title, parts = page_of(run)
    return write_text(run.path / "report.html", page(title, *parts))


def page_of(run: Run) -> tuple[str, tuple[Html, ...]]:
    """(title, sections) as the run's workload draws them: `protojax.reporting.WORKLOAD` has `parts(run)`."""
    workload = dig(run.config, "method", "workload") or dig(run.summary, "workload") or "prototypes"
    known = workload if workload in experiment.WORKLOADS else "prototypes"
    return importlib.import_module(f"protojax.reporting.{known}").parts(run)
