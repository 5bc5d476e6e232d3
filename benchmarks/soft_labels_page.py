"""docs/results/soft_labels.md from the records of `benchmarks.soft_labels`: the acceptance table, then every arm."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from protojax.ops import simplex
from protojax.workloads import soft_label_arms

PAGE = Path("docs/results/soft_labels.md")
QUICK, FASHION = "soft_labels_quickstart", "soft_labels_fashion"
Records = Sequence[Mapping[str, Any]]
HEALTHY_ARGUMENTS = ("default,iid", "default,district", "default,iid,well_scaled", "default,district,well_scaled",
                     "default,iid,large", "default,district,large")  # fmt: skip


def write(records: Records) -> Path:
    """Write the page and return its path."""
    table: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        table.setdefault((record["config"], record["argument"]), []).append(record)
    parts = [HEAD, _machine(records), _acceptance(table), _healthy(table), _arms(table), _remedies(table)]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n\n".join(p for p in parts if p) + "\n")
    return PAGE


HEAD = """# Soft labels: measured

Written by `python -m benchmarks.soft_labels --root fashion_mnist_28.npz`; every record with its command is in
[soft_labels.jsonl](soft_labels.jsonl). Each cell is the range over the starts, worst and best; `-` means that the
arm has not been run. KL in nats on the test split; constant: the mean target of the training split."""


def _machine(records: Records) -> str:
    if not records:
        return "Nothing has been measured yet."
    versions, device = records[0]["versions"], records[0]["device"]
    seeds = sorted({r["seed"] for r in records})
    return f"Seeds {seeds}; {device}; " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."


# --------------------------------------------------------------------------------------------------- acceptance
def _values(found: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], float]) -> list[float]:
    return [float(read(r)) for r in found]


def _test(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record["soft_labels"]["test"]


def _range(values: Sequence[float], digits: int = 3) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def _fired(record: Mapping[str, Any]) -> dict[str, int]:
    """Detector -> the step of its onset, whatever became of it later."""
    return {f["detector"]: f["step"] for f in record["findings"]}


def _acceptance(table: Mapping[tuple[str, str], Records]) -> str:
    rows = ["## Acceptance", "| # | check | target | measured | holds | arm (command with `:`, seeds 0 to 4) |",
            "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip

    def line(number: str, what: str, target: str, arms: Sequence[tuple[str, str]], judge: Any) -> None:
        for key in arms:
            found = table.get(key)
            name = f"`{key[0]}:{key[1]}`"
            if not found:
                rows.append(f"| {number} | {what} | {target} | - | not run | {name} |")
                continue
            measured, holds = judge(found)
            rows.append(f"| {number} | {what} | {target} | {measured} | {'yes' if holds else '**no**'} | {name} |")

    both = [(QUICK, "default,iid"), (QUICK, "default,district")]
    line(
        "S1",
        "KL / constant",
        "<= 0.40",
        both,
        _at_most(lambda r: _test(r)["kl"] / _test(r)["baselines"]["constant"], 0.40),
    )
    line("S2", "gap closed", ">= 0.80", both, _at_least(lambda r: _test(r)["gap_closed"], 0.80))
    large = [(QUICK, "default,iid,large"), (QUICK, "default,district,large")]
    line("S3", "gap closed, 8,000 samples", ">= 0.92", large, _at_least(lambda r: _test(r)["gap_closed"], 0.92))
    seven = [(QUICK, "default,seven")]
    line(
        "S4",
        "KL / oracle constant",
        "<= 0.80",
        seven,
        _at_most(lambda r: _test(r)["kl"] / _test(r)["baselines"]["oracle_constant"], 0.80),
    )
    line("S5", "ECE, leading category", "<= 0.03", both, _at_most(lambda r: _test(r)["ece"], 0.03, 4))
    line("S5", "ECE, class-wise", "<= 0.015", both, _at_most(lambda r: _test(r)["ece_classwise"], 0.015, 4))
    line("S6", "correlation of entropies", ">= 0.8", both, _at_least(lambda r: _test(r)["entropy"]["correlation"], 0.8))
    line("S6", "mean H(p) - mean H(t)", "within 0.15", both, _within(_entropy_gap, 0.15))
    line("S7", "argmaxes", "all 8", both, _at_least(lambda r: _test(r)["distinct"]["argmax"], 8, 0))
    line("S7", "largest spread", ">= 0.05", both, _at_least(lambda r: _test(r)["spread"]["largest"], 0.05))
    line("S7", "rows above 0.999 beyond the targets'", "<= 0.01", both,
         _at_most(lambda r: _test(r)["one_hot_share"] - _test(r)["target_one_hot_share"], 0.01))  # fmt: skip
    rows += _scaling(table)
    fashion = [(FASHION, "default"), (FASHION, "default,well_scaled")]
    line("S9", "Fashion, KL", "<= 0.10", fashion, _at_most(lambda r: _test(r)["kl"], 0.10))
    line("S9", "Fashion, ECE", "<= 0.03", fashion, _at_most(lambda r: _test(r)["ece"], 0.03, 4))
    raw = [(QUICK, "original_first,seven"), (QUICK, "original_fixed,seven")]
    line("S10", "one_hot and exploding_logits by epoch 1", "yes", raw, _by_epoch_one)
    line("S10", "least validation KL / constant, all evaluations", "> 10", raw, _at_least(_least_ratio, 10, 1))
    norm = [(QUICK, "original_logitnorm,seven")]
    line("S11", "constant and uniform_by_construction fire", "yes", norm, _fires("constant", "uniform_by_construction"))
    line(
        "S11",
        "KL / constant",
        "0.6 to 1.4",
        norm,
        _between(lambda r: _test(r)["kl"] / _test(r)["baselines"]["constant"], 0.6, 1.4),
    )
    tiny = [(QUICK, "tiny_scale,iid")]
    line("S12", "uniform_by_construction at step 0", "yes", tiny, _at_step_zero)
    line(
        "S12",
        "ln C - mean H(p)",
        "<= 0.01",
        tiny,
        _at_most(lambda r: 2.0794415 - _test(r)["entropy"]["prediction"]["mean"], 0.01, 4),
    )
    rows += _no_remedy(table)
    rows.append(f"| S14 | p_max(1) and H_min(1), C = 8, against a numerical search | 1e-6 | "
                f"{simplex.largest_probability(8, 1.0):.3f}, "
                f"{simplex.least_entropy(8, 1.0):.3f} | yes (a test) | `tests/ops/test_simplex.py` |")  # fmt: skip
    return "\n".join(rows)


def _at_most(read: Any, limit: float, digits: int = 3) -> Any:
    return lambda found: (_range(v := _values(found, read), digits), max(v) <= limit and len(v) >= 5)


def _at_least(read: Any, limit: float, digits: int = 3) -> Any:
    return lambda found: (_range(v := _values(found, read), digits), min(v) >= limit and len(v) >= 5)


def _between(read: Any, low: float, high: float) -> Any:
    return lambda found: (_range(v := _values(found, read)), low <= min(v) and max(v) <= high)


def _within(read: Any, limit: float) -> Any:
    return lambda found: (_range(v := _values(found, read)), max(map(abs, v)) <= limit)


def _entropy_gap(record: Mapping[str, Any]) -> float:
    entropy = _test(record)["entropy"]
    return entropy["prediction"]["mean"] - entropy["target"]["mean"]


def _least_ratio(record: Mapping[str, Any]) -> float:
    constant = record["soft_labels"]["val"]["baselines"]["constant"]
    return min(value for _, value in record["val_kl"]) / constant


def _by_epoch_one(found: Records) -> tuple[str, bool]:
    onset = [max(_fired(r).get(n, 10**9) for n in ("one_hot", "exploding_logits")) for r in found]
    ok = all(step <= r["epoch"] + 1 for step, r in zip(onset, found, strict=True))
    return f"steps {onset} (epoch {found[0]['epoch']})", ok


def _fires(*names: str) -> Any:
    def judge(found: Records) -> tuple[str, bool]:
        onset = [{n: _fired(r).get(n) for n in names} for r in found]
        said = "; ".join(f"{n} at {sorted({str(o[n]) for o in onset})}" for n in names)
        return said, all(o[n] is not None for o in onset for n in names)

    return judge


def _at_step_zero(found: Records) -> tuple[str, bool]:
    onset = [_fired(r).get("uniform_by_construction") for r in found]
    return f"steps {onset}", all(step == 0 for step in onset)


def _scaling(table: Mapping[tuple[str, str], Records]) -> list[str]:
    rows = []
    for config, bad, well in ((QUICK, "default,iid", "default,iid,well_scaled"),
                              (QUICK, "default,district", "default,district,well_scaled"),
                              (FASHION, "default", "default,well_scaled")):  # fmt: skip
        a, b = table.get((config, bad)), table.get((config, well))
        name = f"`{config}:{bad}` and `:{well}`"
        if not a or not b:
            rows.append(f"| S8 | KL, badly minus well scaled | within 0.01 | - | not run | {name} |")
            continue
        gaps = [_test(x)["kl"] - _test(y)["kl"] for x, y in zip(a, b, strict=True)]
        holds = "yes" if max(map(abs, gaps)) <= 0.01 else "**no**"
        rows.append(f"| S8 | KL, badly minus well scaled | within 0.01 | {_range(gaps, 4)} | {holds} | {name} |")
    return rows


def _no_remedy(table: Mapping[tuple[str, str], Records]) -> list[str]:
    rows = []
    for preset in ("iid", "district"):
        base = table.get((QUICK, f"default,{preset}"))
        found = {
            a: table[(QUICK, f"{a},{preset}")] for a in soft_label_arms.REMEDIES if (QUICK, f"{a},{preset}") in table
        }
        if not base or not found:
            rows.append(f"| S13 | a remedy improves KL by more than 0.002 ({preset}) | none | - | not run | remedies |")
            continue
        mean = statistics.fmean(_test(r)["kl"] for r in base)
        change = {a: statistics.fmean(_test(r)["kl"] for r in f) - mean for a, f in found.items()}
        best = min(change, key=lambda a: change[a])
        state = "yes" if change[best] >= -0.002 else "**no**"
        state += "" if len(found) == len(soft_label_arms.REMEDIES) else f" of {len(found)} run"
        rows.append(f"| S13 | a remedy improves KL by more than 0.002 ({preset}) | none | best {best} "
                    f"{change[best]:+.4f} | {state} | "
                    "table below |")  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------------- others
def _healthy(table: Mapping[tuple[str, str], Records]) -> str:
    rows = [
        "## Healthy runs raise nothing",
        "",
        "| arm | starts | findings (errors and warnings) |",
        "| --- | --- | --- |",
    ]
    for key, found in table.items():
        if (key[0] == QUICK and key[1] in HEALTHY_ARGUMENTS) or key[0] == FASHION:
            fired = sorted({f["detector"] for r in found for f in r["findings"] if f["severity"] != "notice"})
            rows.append(f"| `{key[0]}:{key[1]}` | {len(found)} | {', '.join(fired) or 'none'} |")
    return "\n".join(rows)


def _cells(found: Records) -> str:
    t = [_test(r) for r in found]
    mean = lambda f: statistics.fmean(f(x) for x in t)  # noqa: E731
    sd = statistics.stdev([x["kl"] for x in t]) if len(t) > 1 else 0.0
    active = statistics.fmean(1.0 if max(a or 0.0 for a in r["active"]) > 0 else 0.0 for r in found)
    return (f"{mean(lambda x: x['kl']):.4f} ± {sd:.4f} | {mean(lambda x: x['skill']):.3f} | "
            f"{mean(lambda x: x['ece']):.4f} | "
            f"{mean(lambda x: x['entropy']['prediction']['mean']):.3f} | "
            f"{mean(lambda x: x['spread']['largest']):.3f} | "
            f"{mean(lambda x: x['distinct']['argmax']):.1f} | {mean(lambda x: x['top1']):.3f} | "
            f"{active:.0%}")  # fmt: skip


COLUMNS = "KL | skill | ECE | mean H(p) | spread | argmaxes | top-1 | rows below min_entropy seen"


def _arms(table: Mapping[tuple[str, str], Records]) -> str:
    rows = ["## Every arm", "", f"| arm | {COLUMNS} | findings, most starts first |", "| --- | " + "--- | " * 9]
    for key, found in table.items():
        arm = key[1].split(",")[0]
        if arm in soft_label_arms.REMEDIES:
            continue
        fired = [f["detector"] for r in found for f in r["findings"] if f["severity"] != "notice"]
        listed = ", ".join(
            f"{n} ({fired.count(n)}/{len(found)})" for n in sorted(set(fired), key=lambda n: -fired.count(n))
        )
        rows.append(f"| `{key[0].removeprefix('soft_labels_')}:{key[1]}` | {_cells(found)} | {listed or 'none'} |")
    return "\n".join(rows)


def _remedies(table: Mapping[tuple[str, str], Records]) -> str:
    rows = [
        "## Every published remedy, one at a time, on the default",
        "",
        f"| remedy | split | change of KL | {COLUMNS} | clipped steps |",
        "| --- | --- | --- | " + "--- | " * 9,
    ]
    for preset in ("iid", "district"):
        base = table.get((QUICK, f"default,{preset}"))
        for arm in ("default", *soft_label_arms.REMEDIES, *soft_label_arms.LATER):
            found = table.get((QUICK, f"{arm},{preset}"))
            if not found or not base:
                continue
            change = statistics.fmean(_test(r)["kl"] for r in found) - statistics.fmean(_test(r)["kl"] for r in base)
            clipped = [r["train"].get("clipped") for r in found]
            share = "no clipping" if clipped[0] is None else f"{statistics.fmean(clipped):.0%}"
            rows.append(f"| {arm} | {preset} | {change:+.4f} | {_cells(found)} | {share} |")
    note = "A remedy was active where rows fell below its min_entropy (entropy penalties) or steps were clipped "
    note += "(clipping); "
    note += "smoothing, temperature, decay and weights always act. 'clipped steps' is of the last part of the run."
    return "\n".join([*rows, "", note])
