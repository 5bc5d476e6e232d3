"""From a run directory to one HTML page that explains the run, and from several to a comparison.

Neither needs a device, a checkpoint or a network: they read what the trainer wrote (`metrics.jsonl`, `summary.json`,
`config.json`, `report_data.npz`) and say what is missing.
"""

from __future__ import annotations

from pathlib import Path

from protojax.reporting import sections
from protojax.reporting.compare import compare
from protojax.reporting.facts import facts_of
from protojax.reporting.page import page
from protojax.reporting.records import load_run, write_text

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
    facts = facts_of(run)
    document = page(
        f"{facts.name}: {facts.arm}",
        sections.heading(run, facts),
        sections.verdict(run, facts),
        sections.found(facts),
        sections.what_next(run, facts),
        sections.reading_problems(run),
        sections.figures(run, facts),
        sections.samples(run),
        sections.numbers(run, facts),
        sections.configuration(run),
    )
    return write_text(run.path / "report.html", document)
