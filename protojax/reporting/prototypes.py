"""The page of a run of prototypical self-supervision."""

from __future__ import annotations

from protojax.reporting import sections
from protojax.reporting.facts import facts_of
from protojax.reporting.page import Html
from protojax.reporting.records import Run


def parts(run: Run) -> tuple[str, tuple[Html, ...]]:
    """(title, sections in reading order)."""
    facts = facts_of(run)
    return f"{facts.name}: {facts.arm}", (
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
