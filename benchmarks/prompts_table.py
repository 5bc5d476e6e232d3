"""docs/results/prompts.md from the records of `benchmarks.prompts`: rows A1 to A13, each held or not, none guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from protojax.workloads.prompts_arms import ARMS, REMEDIES

Record = dict[str, Any]
Read = Callable[[Record], float]


def at(*path: str) -> Read:
    """Reader of a number in `final`."""

    def read(record: Record) -> float:
        value: Any = record["final"]
        for name in path:
            value = value[name]
        return float(value)

    return read


USED, TOP1 = at("e_step", "usage_perplexity"), at("accuracy", "top1")


class Rows:
    """Records by preset and arm."""

    def __init__(self, records: list[Record]):
        self.records = records
        self.lines: list[str] = []

    def of(self, preset: str, arm: str) -> list[Record]:
        return sorted((r for r in self.records if (r["preset"], r["arm"]) == (preset, arm)), key=lambda r: r["seed"])

    def line(self, name: str, what: str, target: str, seen: list[float], held: Callable[[float], bool]) -> None:
        """One row: every start must pass; without records it says so."""
        if not seen:
            self.lines.append(f"| {name} | {what} | {target} | not run | |")
            return
        short = f"{min(seen):.3g} to {max(seen):.3g} ({len(seen)} starts)"
        self.lines.append(f"| {name} | {what} | {target} | {short} | {'yes' if all(map(held, seen)) else '**no**'} |")

    def check(self, name: str, preset: str, arm: str, what: str, target: str, read: Read, held: Callable[[float], bool],
              ) -> None:  # fmt: skip
        seen = [read(r) for r in self.of(preset, arm)]
        self.line(name, f"{arm}, `{preset}`: {what}", target, seen, held)

    def gap(self, preset: str, arm: str, other: str) -> list[float]:
        """Points of top-1 by which `arm` is above `other`, start by start."""
        seen = {r["seed"]: TOP1(r) for r in self.of(preset, other)}
        return [100 * (TOP1(r) - seen[r["seed"]]) for r in self.of(preset, arm) if r["seed"] in seen]


def acceptance(rows: Rows) -> list[str]:
    """The lines of the table."""
    for preset in ("small", "standard", "matched"):
        rows.check("A1", preset, "default", "usage perplexity", ">= 7.2", USED, lambda v: v >= 7.2)
    rows.check("A2", "wide", "default", "usage perplexity", ">= 28.8", USED, lambda v: v >= 28.8)
    for preset in ("small", "standard", "matched", "wide"):
        rows.check("A3", preset, "default", "dead prompts", "0", at("e_step", "dead"), lambda v: v == 0)
        need = lambda r: at("e_step", "effective")(r) / at("effective_needed")(r)  # noqa: E731
        rows.check("A3", preset, "default", "effective / (0.9 exp H(mode))", ">= 1", need, lambda v: v >= 1)
    twins = at("geometry", "centred_duplicates")
    rows.check("A3", "matched", "default", "centred duplicates", "<= 0.05", twins, lambda v: v <= 0.05)
    for preset in ("small", "standard", "matched", "wide"):
        for kind in ("e_step", "inference"):
            rows.check("A4", preset, "default", f"purity, {kind}", ">= 0.95", at(kind, "purity"), lambda v: v >= 0.95)
        share = lambda r: at("inference", "usage_perplexity_hard")(r) / r["final"]["count"]  # noqa: E731
        rows.check("A5", preset, "default", "inference usage / K", ">= 0.8", share, lambda v: v >= 0.8)
    for preset in ("small", "hard"):
        gaps = [rows.gap(preset, "default", arm) for arm in ARMS if arm != "default"]
        best = [min(gap) for gap in gaps if gap]
        what = f"default, `{preset}`: points above the best of {len(best)} other arms"
        rows.line("A6", what, ">= -0.5", [min(best)] if best else [], lambda v: v >= -0.5)
    rows.line("A7", "`hard`: default minus original, points", ">= 5", rows.gap("hard", "default", "original"),
              lambda v: v >= 5)  # fmt: skip
    rows.line("A7", "`hard`: default minus K = 1, points", ">= 15", rows.gap("hard", "default", "single_prompt"),
              lambda v: v >= 15)  # fmt: skip
    rows.check("A8", "small", "original_k8", "usage perplexity", "<= 2.5", USED, lambda v: v <= 2.5)
    rows.check("A8", "small", "original_k8", "max usage", ">= 0.65", at("e_step", "max_usage"), lambda v: v >= 0.65)
    rows.check("A8", "small", "original_k8", "purity", "<= 0.65", at("e_step", "purity"), lambda v: v <= 0.65)
    rows.check("A9", "wide", "original_k32", "usage perplexity", "<= 4", USED, lambda v: v <= 4)
    for arm in REMEDIES:
        rows.check("A10", "small", arm, "effective prompts", "< 4", at("e_step", "effective"), lambda v: v < 4)
    start = lambda r: abs(r["initial"]["geometry"]["cos_mean"] - r["initial"]["geometry"]["initial_cosine"])  # noqa: E731
    rows.check("A11", "small", "original_k8", "initial prompt cos minus its value by arithmetic", "<= 0.002", start,
               lambda v: v <= 0.002)  # fmt: skip
    gradient = lambda r: float(r["gradients"]["grad_norm/entropy"])  # noqa: E731
    rows.check("A12", "small", "entropy_stopped", "entropy's gradient", "0", gradient, lambda v: v == 0)
    rows.check("A12", "small", "entropy_live", "entropy's gradient", "> 0", gradient, lambda v: v > 0)
    rows.check("A13", "fashion", "default", "purity / spherical k-means", ">= 0.95",
               lambda r: at("e_step", "purity")(r) / at("kmeans_purity")(r), lambda v: v >= 0.95)  # fmt: skip
    others = [g for arm in ("original", "single_prompt") for g in rows.gap("fashion", "default", arm)]
    rows.line("A13", "fashion: points above the other arms", ">= -1", others, lambda v: v >= -1)
    return rows.lines


def write(records: list[Record], path: Path) -> None:
    """The page: acceptance, then every arm with its command and what the doctor said first."""
    rows = Rows(records)
    out = ["# Mixture of prompts: acceptance", "",
           "Written by `python -m benchmarks.prompts`; a row without records says so.", "",
           "| # | check | target | seen | held |", "|---|---|---|---|---|", *acceptance(rows), "", "## Every arm", "",
           "| preset, arm | starts | used | effective | purity | top-1 | doctor (first step) | command (seed 0) |",
           "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for preset, arm in dict.fromkeys((r["preset"], r["arm"]) for r in records):
        found = rows.of(preset, arm)
        mean = lambda read, found=found: sum(read(r) for r in found) / len(found)  # noqa: E731
        names = {f"{k} ({v['first']})" for r in found for k, v in r["findings"].items() if v["severity"] != "notice"}
        purity = f"{mean(at('e_step', 'purity')):.2f}" if "purity" in found[0]["final"]["e_step"] else ""
        out.append(
            f"| {preset}, {arm} | {len(found)} | {mean(USED):.2f} | {mean(at('e_step', 'effective')):.2f} | {purity} | "
            f"{100 * mean(TOP1):.2f} | {', '.join(sorted(names))} | `{found[0]['command']}` |"
        )
    path.write_text("\n".join(out) + "\n")
