"""docs/results/prompts.md from the records of `benchmarks.prompts`: rows A1 to A13, each held or not, none guessed;
failure signatures; methods side by side; every arm."""

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
        _best(rows, "A6", preset, -0.5)
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
    for preset in ("fashion", "grocery", "grocery_fine"):
        _real(rows, preset)
    _memory(rows)
    return rows.lines


def _real(rows: Rows, preset: str) -> None:
    """A13, and the same on the photographs (whose fine classes have no modes): unit pixels, without a modality gap."""
    name = "A13" if preset == "fashion" else "real"
    if preset != "grocery_fine":
        rows.check(name, preset, "default", "purity / spherical k-means", ">= 0.95",
                   lambda r: at("e_step", "purity")(r) / at("baselines", "k_means", "purity")(r),
                   lambda v: v >= 0.95)  # fmt: skip
    _best(rows, name, preset, -1.0)
    probe = lambda r: max(at("baselines", b, "top1")(r) for b in ("zero_shot", "linear_probe", "linear_probe_adam"))  # noqa: E731
    rows.check(name, preset, "default", "top-1 minus the best of zero-shot and linear probes, points", ">= -1",
               lambda r: 100 * (TOP1(r) - probe(r)), lambda v: v >= -1)  # fmt: skip


def _best(rows: Rows, name: str, preset: str, least: float) -> None:
    """Points of top-1 above the arm that is best by its mean, start by start."""
    others = {arm: rows.of(preset, arm) for arm in ARMS if arm != "default"}
    means = {arm: sum(map(TOP1, found)) / len(found) for arm, found in others.items() if found}
    best = max(means, key=lambda arm: means[arm], default="")
    what = f"default, `{preset}`: points above {best}, the best of {len(means)} other arms by its mean"
    rows.line(name, what, f">= {least:g}", rows.gap(preset, "default", best), lambda v: v >= least)


def _memory(rows: Rows) -> None:
    """Section 11: sizes of the compiled step."""
    found = [r["final"] for r in rows.of("memory", "")]
    size = "C = 10,000, K = 32, D = 512, GiB: "
    extra, whole, step = ([f[k] for f in found if k in f] for k in ("extra_gib", "whole_gib", "step_temporaries_gib"))
    rows.line("memory", size + "loss and gradient, temporaries beside the gradient", "<= 0.15", extra,
              lambda v: v <= 0.15)  # fmt: skip
    rows.line("memory", size + "the whole step with state and 330,000 float32 features", "< 8", whole, lambda v: v < 8)
    rows.line("memory", size + "of which temporaries (gradient 0.61, Adam's update 0.61: no gate)", "< 1.5", step,
              lambda v: v < 1.5)  # fmt: skip


# Which arm must make which detector speak by the end of training.
SIGNATURES = {
    "winner_take_all": "original_k8", "identical_prompts": "zero_init", "nothing_learned": "random_control",
    "dead_term": "entropy_stopped", "inert_term": "original_k8", "diverse_unused": "diversity_20",
    "train_infer_gap": "sinkhorn_only", "near_empty_class": "many_prompts",
}  # fmt: skip


def signatures(rows: Rows) -> list[str]:
    """Each failure signature on its arm: in how many starts it speaks at the end, at which steps first; and on the
    default, on every preset, whether it ever spoke."""
    defaults = [r for r in rows.records if r["arm"] == "default"]
    sets = ", ".join(dict.fromkeys(f"`{r['preset']}`" for r in defaults))
    out = [f"| signature | arm, `small` | speaks at the end | first at step | ever on the default ({sets}) |",
           "|---|---|---|---|---|"]  # fmt: skip
    for name, arm in SIGNATURES.items():
        found = rows.of("small", arm)
        if not found:
            out.append(f"| `{name}` | {arm} | not run | | |")
            continue
        spoke = [r["findings"][name] for r in found if name in r["findings"]]
        last, steps = sum(f["at_end"] for f in spoke), sorted({f["first"] for f in spoke})
        false = sum(name in r["findings"] for r in defaults)
        note = " **no**" if false else ""
        held = "" if last == len(found) else " **no**"
        when = f"{', '.join(map(str, steps))} of {found[0]['steps']}"
        out.append(f"| `{name}` | {arm} | {last} of {len(found)}{held} | {when} | {false} of {len(defaults)}{note} |")
    return out


NUMBERS = ("top1", "balanced", "many", "medium", "few", "margin", "ece")


def methods(rows: Rows, preset: str) -> list[str]:
    """Every method on the same features of one preset: means over starts."""
    named = [("mixture, K sub-prompts", "default"), ("published recipe", "original"), ("K = 1", "single_prompt")]
    found = [(title, [r["final"]["accuracy"] | {"purity": r["final"]["e_step"].get("purity")}
                      for r in rows.of(preset, arm)]) for title, arm in named]  # fmt: skip
    base = [r["final"]["baselines"] for r in rows.of(preset, "default")]
    found += [(name.replace("_", " "), [b[name] for b in base]) for name in (base[0] if base else ())]
    levels = list(found[0][1][0].get("levels", {})) if found[0][1] else []
    heads = [*NUMBERS, *(f"level {name}" for name in levels if name != "leaf"), "purity"]
    out = [f"| `{preset}` | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for title, seen in found:
        if seen:
            flat = [s | {f"level {k}": v for k, v in s.get("levels", {}).items()} for s in seen]
            out.append(f"| {title} | {' | '.join(_mean([f.get(name) for f in flat]) for name in heads)} |")
    return out


def _mean(values: list[float | None]) -> str:
    there = [v for v in values if v is not None]
    return f"{sum(there) / len(there):.3f}" if there else ""


def write(records: list[Record], path: Path) -> None:
    """The page: acceptance, signatures, methods side by side, then every arm with its command and what the doctor
    said."""
    rows = Rows(records)
    out = ["# Mixture of prompts: acceptance", "",
           "Written by `python -m benchmarks.prompts`; a row without records says so.", "",
           "| # | check | target | seen | held |", "|---|---|---|---|---|", *acceptance(rows), "",
           "## Failure signatures", "", *signatures(rows), ""]  # fmt: skip
    plans = [g for preset in ("small", "hard") for g in rows.gap(preset, "uniform_plan", "default")]
    if plans:
        out += ["Uniform plan (responsibilities replaced by 1/K in training): "
                f"{min(plans):+.2f} to {max(plans):+.2f} points of top-1 against the default.", ""]  # fmt: skip
    out += ["## Methods on the same features", "",
            "Means over starts; margin of softmax(100 cos), ECE after one temperature (15 bins of equal mass).",
            ""]  # fmt: skip
    for preset in dict.fromkeys(r["preset"] for r in records if r["arm"] == "default"):
        out += [*methods(rows, preset), ""]
    out += ["## Every arm", "",
            "| preset, arm | starts | used | effective | purity | top-1 | doctor at the end (first step) "
            "| command (seed 0) |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for preset, arm in dict.fromkeys((r["preset"], r["arm"]) for r in records if r["preset"] != "memory"):
        out.append(_arm(rows.of(preset, arm)))
    path.write_text("\n".join(out) + "\n")


def _arm(found: list[Record]) -> str:
    mean = lambda read: sum(read(r) for r in found) / len(found)  # noqa: E731
    said: dict[str, list[int]] = {}
    for record in found:
        for name, finding in record["findings"].items():
            if finding["at_end"] and finding["severity"] != "notice":
                said.setdefault(name, []).append(finding["first"])
    names = ", ".join(f"{name} ({min(at)})" + ("" if len(at) == len(found) else f" in {len(at)} of {len(found)}")
                      for name, at in sorted(said.items()))  # fmt: skip
    purity = f"{mean(at('e_step', 'purity')):.2f}" if "purity" in found[0]["final"]["e_step"] else ""
    first = found[0]
    return (f"| {first['preset']}, {first['arm']} | {len(found)} | {mean(USED):.2f} | "
            f"{mean(at('e_step', 'effective')):.2f} | {purity} | {100 * mean(TOP1):.2f} | {names} | "
            f"`{first['command']}` |")  # fmt: skip
