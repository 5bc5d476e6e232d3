"""The acceptance table of image-text alignment, P1 to P12, over three seeds: docs/results/alignment.md.

    python -m benchmarks.alignment                          # every row, every seed; begins again where it stopped
    python -m benchmarks.alignment --rows P1 P4 P5 --seeds 0
    python -m benchmarks.alignment --smoke                  # tiny sizes: shows that the script runs
    python -m benchmarks.alignment --emoji FOLDER           # P10 and P11 need the four emoji_*_64.npz

A run is kept below --runs; one that is finished is not made again, one that was stopped is resumed. Records go to
--out/alignment.jsonl, the table to --out/alignment.md. Each run's command stands in its record.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
Summary = Mapping[str, Any]


class Job(NamedTuple):
    """One training run: config file, arm, and overrides."""

    config: str
    arm: str
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        extra = "".join(f"-{k.rsplit('.', 1)[-1]}_{v}" for k, v in self.more)
        return f"{self.config.replace('/', '_')}-{self.arm.replace(',', '-')}{extra}"

    def command(self, seed: int, workdir: Path, root: str | None) -> list[str]:
        out = [sys.executable, "-m", "protojax", "train", f"--config={self.config}:{self.arm}", f"--workdir={workdir}",
               f"--config.seed={seed}"]  # fmt: skip
        out += [f"--config.{k}={v}" for k, v in self.more]
        return [*out, f"--config.data.root={root}"] if root and "cross_style" in self.arm else out


QUICK = "alignment_quickstart"
MAIN, DIRECT = Job(QUICK, "perceiver"), Job(QUICK, "direct")
SHORT = (("method.epochs", 4.0), ("evals.every", 0.25))
BOS = tuple(Job(QUICK, arm, SHORT) for arm in ("bos_perceiver", "bos_direct", "bos_batch64", "bos_direct_batch64"))
SUSPECTS = tuple(
    Job(QUICK, a) for a in ("perceiver", "latent_std_one", "latent_std_width", "attention_pool", "batch64")
)
RATES = tuple(Job(QUICK, arm) for arm in ("lr_low", "lr_middle"))
EMOJI = {arm: Job("alignment_emoji", f"{arm},cross_style,patches") for arm in ("perceiver", "direct", "bos_perceiver")}
TOWER = Job("alignment_emoji", "perceiver,cross_style")
MODES = tuple(
    Job(QUICK, arm, (("method.epochs", 0.0), ("method.steps", 1)))
    for arm in ("prefix_single", "perceiver", "prefix_sum")
)


# ---------------------------------------------------------------------------------------------------- the runs
class Bench:
    """Runs jobs, keeps their results, and remembers what was asked."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out, self.runs = options, Path(options.out), Path(options.runs)
        self.records: list[dict[str, Any]] = []

    def run(self, job: Job, seed: int) -> dict[str, Any] | None:
        """Summary and metrics of a finished run, trained now where it was not; None past the time allowed."""
        if self.options.smoke:
            job = job._replace(arm=f"{job.arm},smoke", more=tuple(m for m in job.more if not m[0].startswith("method")))
        workdir = self.runs / f"{job.name}-{seed}"
        command = job.command(seed, workdir, self.options.emoji)
        if not (workdir / "summary.json").exists():
            if self.options.only_report or time.time() > self.options.until:
                return None
            began = time.time()
            found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if found.returncode:
                print(found.stdout[-2000:], found.stderr[-2000:], file=sys.stderr)
                raise SystemExit(f"{' '.join(command)} failed")
            print(f"{workdir.name}: {time.time() - began:.0f} s", flush=True)
        summary = json.loads((workdir / "summary.json").read_text())
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        shown = " ".join(["protojax", *command[3:]]).replace(str(workdir), f"runs/{workdir.name}")
        return {"summary": summary, "records": lines, "command": shown, "workdir": workdir}

    def add(self, row: str, seed: int, check: str, target: str, seen: Any, ok: bool | None, command: str) -> None:
        record = {"row": row, "seed": seed, "check": check, "target": target, "seen": seen, "ok": ok,
                  "command": command,                  "smoke": self.options.smoke}  # fmt: skip
        self.records.append(record)
        print(json.dumps(record), flush=True)

    def missing(self, row: str, seed: int, check: str, target: str, job: Job) -> None:
        shown = " ".join(["protojax", *job.command(seed, Path("runs") / f"{job.name}-{seed}", None)[3:]])
        self.add(row, seed, check, target, "not run", None, shown)


def final(found: Mapping[str, Any]) -> dict[str, Any]:
    return found["summary"]["alignment"]


def r1(found: Mapping[str, Any]) -> float:
    scores = final(found)["r1"]
    return float(scores[max(scores, key=int)])


def retention(found: Mapping[str, Any], share: int) -> float:
    kept = final(found)["retention"]
    return float(kept.get(str(int(max(kept, key=int)) // share)) or 0.0)


def fired(found: Mapping[str, Any]) -> set[str]:
    return {f["detector"] for f in found["summary"]["findings"] if f["severity"] != "notice"}


def last_epoch(found: Mapping[str, Any]) -> list[dict[str, float]]:
    train = [r for r in found["records"] if r["kind"] == "train"]
    epochs = float(final(found)["epoch"])
    first = train[-1]["step"] * (1 - 1 / max(1.0, epochs))
    return [r["metrics"] for r in train if r["step"] > first] or [train[-1]["metrics"]]


# ---------------------------------------------------------------------------------------------------- the rows
def bos_rows(bench: Bench, seed: int) -> None:
    """P1, P2, P3 on the arms with a constant text side; P3's silence on the default."""
    for job in BOS:
        found = bench.run(job, seed)
        if found is None:
            bench.missing("P1", seed, job.arm, "< 1e-3", job)
            continue
        widths = [k for k in last_epoch(found)[0] if k.startswith("loss/prefix_") and k[12:].isdigit()]
        gaps = [
            abs(np.mean([m[k] - m["loss/chance"] for m in last_epoch(found)]))
            for k in [*widths, "loss/contrastive_full"]
        ]
        level = last_epoch(found)[-1]["loss/chance"]
        size = found["summary"]["config"]["data"]["batch_size"]
        exact = abs(level - math.log(size)) < 1e-5
        bench.add("P1", seed, f"{job.arm}: largest |loss - ln {size}| over the last epoch, every prefix", "< 1e-3",
                  float(max(gaps)), bool(max(gaps) < 1e-3 and exact), found["command"])  # fmt: skip
        report = final(found)
        off = [abs(report[s][d]["recall"][k] / report[s][d]["chance"][k] - 1) for s in ("i2t", "t2i") for d in report[s]
               for k in report[s][d]["recall"]]  # fmt: skip
        bench.add("P2", seed, f"{job.arm}: largest |R@k / chance - 1|, k = 1, 5, 10, both directions", "< 1e-3",
                  float(max(off)), bool(max(off) < 1e-3), found["command"])  # fmt: skip
        ids = fired(found)
        bench.add("P3", seed, f"{job.arm}: what fired", "constant_side, chance_loss", sorted(ids),
                  {"constant_side", "chance_loss"} <= ids, found["command"])  # fmt: skip
    found = bench.run(MAIN, seed)
    if found is None:
        bench.missing("P3", seed, "default: what fired", "nothing", MAIN)
    else:
        bench.add(
            "P3", seed, "default: what fired", "nothing", sorted(fired(found)), not fired(found), found["command"]
        )


def main_rows(bench: Bench, seed: int) -> None:
    """P4, P5, P8 on the default against the direct path."""
    ours, direct = bench.run(MAIN, seed), bench.run(DIRECT, seed)
    if ours is None or direct is None:
        return bench.missing("P4", seed, "perceiver against direct", ">= direct, >= 0.95", MAIN)
    bench.add("P4", seed, "R@1, perceiver and direct", ">= direct, >= 0.95", [r1(ours), r1(direct)],
              r1(ours) >= r1(direct) and r1(ours) >= 0.95, ours["command"])  # fmt: skip
    kept = [retention(ours, 8), retention(ours, 32)]
    bench.add("P5", seed, "retention at 1/8 and 1/32", ">= 0.98, >= 0.90", kept, kept[0] >= 0.98 and kept[1] >= 0.9,
              ours["command"])  # fmt: skip
    evals = [r["metrics"]["alignment"] for r in ours["records"] if r["kind"] == "eval"]
    by_three = next((e for e in evals if e["epoch"] >= 3.0 - 1e-6), evals[-1])
    full = max(by_three["r1"], key=int)
    times = by_three["r1"][full] / by_three["chance"]["1"]
    by_two = next((e for e in evals if e["epoch"] >= 2.0 - 1e-6), evals[-1])
    falling = by_two["loss"]["above_chance"] < evals[0]["loss"]["above_chance"]
    bench.add("P8", seed, "R@1 / chance by epoch 3; loss falling by epoch 2", ">= 30; yes", [times, falling],
              bool(times >= 30 and falling and "milestone" not in fired(ours)), ours["command"])  # fmt: skip
    return None


def prefix_none_row(bench: Bench, seed: int) -> None:
    job = Job(QUICK, "prefix_none")
    found = bench.run(job, seed)
    if found is None:
        return bench.missing("P6", seed, "prefix_none: retention at 1/32", "<= 0.60", job)
    kept = retention(found, 32)
    return bench.add("P6", seed, "prefix_none: retention at 1/32", "<= 0.60", kept, kept <= 0.6, found["command"])


def suspects_row(bench: Bench, seed: int) -> None:
    """P7, and the learning rates beside it: every arm far above chance, the spread of the suspects small."""
    scores, commands = {}, []
    for job in (*SUSPECTS, *RATES):
        found = bench.run(job, seed)
        if found is None:
            return bench.missing("P7", seed, job.arm, "spread <= 0.05", job)
        scores[job.arm] = r1(found)
        commands.append(found["command"])
    spread = max(scores[j.arm] for j in SUSPECTS) - min(scores[j.arm] for j in SUSPECTS)
    chance = final(found)["chance"]["1"]
    ok = spread <= 0.05 and min(scores.values()) >= 30 * chance
    return bench.add("P7", seed, f"R@1 of the published suspects {scores}, spread without the learning rates",
                     "<= 0.05, every arm >= 30x chance", spread, bool(ok), commands[0])  # fmt: skip


def modes_row(bench: Bench, seed: int) -> None:
    """P9: the first step's prefix losses of one initialisation in all three modes."""
    metrics = []
    for job in MODES:
        found = bench.run(job, seed)
        if found is None:
            return bench.missing("P9", seed, job.arm, "1e-5", job)
        metrics.append(next(r for r in found["records"] if r["kind"] == "train")["metrics"])
    names = [n for n in metrics[0] if n.startswith("loss/prefix_") and n[12:].isdigit()]
    gap = max(abs(metrics[0][n] - m[n]) for m in metrics for n in names)
    return bench.add("P9", seed, "largest difference of loss/prefix_<d> between modes", "<= 1e-5", gap, gap <= 1e-5,
                     found["command"])  # fmt: skip


def emoji_rows(bench: Bench, seed: int) -> None:
    """P10 on raw patches, P11 with a tower of ours; cross-style."""
    if not bench.options.emoji:
        return bench.missing("P10", seed, "needs --emoji FOLDER", ">= direct, 30x and 10x chance", EMOJI["perceiver"])
    found = {arm: bench.run(job, seed) for arm, job in EMOJI.items()}
    if any(f is None for f in found.values()):
        bench.missing("P10", seed, "cross-style", ">= direct, 30x and 10x chance", EMOJI["perceiver"])
    else:
        full = max(final(found["perceiver"])["r1"], key=int)
        mine, chance = final(found["perceiver"]), final(found["perceiver"])["chance"]
        values = {arm: [final(f)["r1"][full], final(f)["r10"][full]] for arm, f in found.items()}
        at_chance = abs(values["bos_perceiver"][0] / chance["1"] - 1) < 0.05
        ok = r1(found["perceiver"]) >= r1(found["direct"]) and mine["r1"][full] >= 30 * chance["1"]
        ok = ok and mine["r10"][full] >= 10 * chance["10"] and at_chance
        check = f"R@1, R@10 by arm {values}; chance {chance['1']:.5f}"
        target = ">= direct, 30x, 10x; bos at chance"
        bench.add("P10", seed, check, target, mine["r1"][full], bool(ok), found["perceiver"]["command"])
    tower = bench.run(TOWER, seed)
    if tower is None:
        return bench.missing("P11", seed, "own tower, cross-style R@1", ">= 0.20, goal 0.40", TOWER)
    return bench.add("P11", seed, "own tower, cross-style R@1", ">= 0.20, goal 0.40", r1(tower), r1(tower) >= 0.2,
                     tower["command"])  # fmt: skip


def resume_row(bench: Bench, seed: int) -> None:
    """P12: a run killed in the middle and resumed has the records of one that was not, bit for bit."""
    more = (("method.epochs", 0.0), ("method.steps", 24), ("run.checkpoint_every", 0.25), ("run.log_every", 1))
    job = Job(QUICK, "perceiver", more)
    whole = bench.run(job, seed)
    if whole is None:
        return bench.missing("P12", seed, "killed and resumed", "exact", job)
    workdir = bench.runs / f"{whole['workdir'].name}-killed"
    command = ["" if c is None else c.replace(str(whole["workdir"]), str(workdir)) for c in
               (job if not bench.options.smoke else job._replace(arm="perceiver,smoke", more=more[2:])).command(
                   seed, whole["workdir"], None)]  # fmt: skip
    if not (workdir / "summary.json").exists():
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not any((workdir / "checkpoints").glob("[1-9]*")):
            time.sleep(0.1)
        process.kill()
        process.wait()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    losses = lambda path: {r["step"]: r["metrics"]["loss/total"] for line in (path / "metrics.jsonl").read_text().splitlines()  # noqa: E731, E501
                           if (r := json.loads(line))["kind"] == "train"}  # fmt: skip
    one, other = losses(whole["workdir"]), losses(workdir)
    same = one == other
    return bench.add(
        "P12", seed, f"{len(one)} losses of a killed and resumed run", "exact", same, same, whole["command"]
    )


def speed_row(bench: Bench, seed: int) -> None:
    """The price of six prefixes: step time of mode 'mean' with P = 6 over that with the full width alone, in turns."""
    import jax

    from protojax import parallel, train
    from protojax.config import freeze
    from protojax.experiment import build
    from protojax.step import empty_accumulator
    from tests.toy import config_dict

    calls, batch = [], None
    for widths in ((512, 256, 128, 64, 32, 16), (512,)):
        c = config_dict(QUICK, "perceiver")
        with c.unlocked():
            c.method.alignment.prefix_dims, c.seed = widths, seed
            if bench.options.smoke:
                c.data.source.size, c.data.source.test_size = 256, 32
        config = freeze(c)
        recipe = build(config)
        session = train.make_session(recipe, train.Options(Path("."), config.run, config.system, 1.0, {}))
        batch = parallel.to_device(session.mesh, recipe.sources["train"].batch(0))
        state = train.initial_state(session)
        zeros = jax.jit(lambda r=recipe, s=session, b=batch: empty_accumulator(r, s.shapes, b))()
        calls.append([session.one, state, zeros])
    times: list[list[float]] = [[], []]
    for _ in range(4 if bench.options.smoke else 40):
        for i, call in enumerate(calls):
            began = time.perf_counter()
            call[1], call[2] = call[0](call[1], call[2], batch)
            jax.block_until_ready(call[1])
            times[i].append(time.perf_counter() - began)
    medians = [float(np.median(t[2:])) for t in times]
    ratio = medians[0] / medians[1]
    device = jax.devices()[0].device_kind
    check = f"step time P = 6 over P = 1, B = 128 on {device} ({1e3 * medians[0]:.1f} ms)"
    return bench.add("S1", seed, check, "<= 1.3 "
                     "(accelerator 1.1)", ratio, ratio <= (1.3 if device == "cpu" else 1.1), "python -m "
                     "benchmarks.alignment --rows S1")  # fmt: skip


ROWS: dict[str, Callable[[Bench, int], None]] = {
    "P1": bos_rows, "P2": bos_rows, "P3": bos_rows, "P4": main_rows, "P5": main_rows, "P6": prefix_none_row,
    "P7": suspects_row, "P8": main_rows, "P9": modes_row, "P10": emoji_rows, "P11": emoji_rows, "P12": resume_row,
    "S1": speed_row,
}  # fmt: skip


def write(bench: Bench) -> None:
    """The records, merged with those of earlier calls (the newest of a check counts), and the table."""
    path = bench.out / ("alignment_smoke.jsonl" if bench.options.smoke else "alignment.jsonl")
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    key = lambda r: (r["row"], r["seed"], r["check"].split(":")[0].split("{")[0])  # noqa: E731
    merged = {key(r): r for r in old} | {
        key(r): r for r in bench.records if r["ok"] is not None or key(r) not in map(key, old)
    }
    records = sorted(merged.values(), key=lambda r: (int(r["row"][1:]), r["seed"], r["check"]))
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    lines = ["# Image-text alignment: acceptance table", "",
             "Made by `python -m benchmarks.alignment`; every line names its command.",
             "`ok` is blank where a run was not made.", "",
             "| row | seed | check | target | seen | ok | command |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for r in records:
        ok = "" if r["ok"] is None else "yes" if r["ok"] else "**no**"
        cells = (r["row"], r["seed"], r["check"], r["target"], _cell(r["seen"]), ok, f"`{r['command']}`")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cell(seen: Any) -> str:
    if isinstance(seen, float):
        return f"{seen:.4g}"
    return ", ".join(_cell(s) for s in seen) if isinstance(seen, list) else str(seen)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", default=str(ROOT / "docs" / "results"), help="table and records")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "alignment"), help="the runs themselves")
    parser.add_argument("--emoji", default=None, help="folder with emoji_{noto,twemoji,openmoji,emojitwo}_64.npz")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many minutes")
    parser.add_argument("--only-report", action="store_true", help="table of the runs that there are")
    parser.add_argument("--smoke", action="store_true", help="two steps a run, to see that the script runs")
    options = parser.parse_args(arguments)
    options.until = time.time() + 60 * options.minutes
    bench = Bench(options)
    bench.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for function in dict.fromkeys(ROWS[row] for row in options.rows):
            function(bench, seed)
            write(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
