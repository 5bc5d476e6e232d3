"""The acceptance table of image-text alignment, P1 to P12, over three seeds: docs/results/alignment.md.

    python -m benchmarks.alignment                          # every row, every seed; begins again where it stopped
    python -m benchmarks.alignment --rows P1 P4 P5 --seeds 0
    python -m benchmarks.alignment --smoke                  # tiny sizes: shows that the script runs
    python -m benchmarks.alignment --data FOLDER            # the rows that read files of yours

P10, P11 and D1 read emoji_{noto,twemoji,openmoji,emojitwo}_64.npz of FOLDER, D3 dcss_tiles_32.npz, D5 nlvr_50x200.npz.

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
from typing import Any

import numpy as np

from benchmarks.alignment_runs import ROOT, Bench, Job, at_full, final, fired, last_epoch, r1, retention, write

QUICK = "alignment_quickstart"
MAIN, DIRECT = Job(QUICK, "perceiver"), Job(QUICK, "direct")
SHORT = (("method.epochs", 4.0), ("evals.every", 0.25))
BOS = tuple(Job(QUICK, arm, SHORT) for arm in ("bos_perceiver", "bos_direct", "bos_batch64", "bos_direct_batch64"))
SUSPECTS = tuple(
    Job(QUICK, a) for a in ("perceiver", "latent_std_one", "latent_std_width", "attention_pool", "batch64")
)
RATES = tuple(Job(QUICK, arm) for arm in ("lr_low", "lr_middle"))
EMOJI = {
    arm: Job("alignment_emoji", f"{arm},cross_style,patches", data="")
    for arm in ("perceiver", "direct", "bos_perceiver")
}
TOWER = Job("alignment_emoji", "perceiver,cross_style", (("method.epochs", 80.0),), data="")
UNSEEN = {what: Job("alignment_emoji", f"perceiver{flag}") for what, flag in (("with", ""), ("without", ",no_flags"))}
TILES = Job("alignment_pictures", "perceiver,tiles", data="dcss_tiles_32.npz")
GROCERY = Job("alignment_pictures", "perceiver,grocery")
NLVR = Job("alignment_pictures", "perceiver,nlvr", data="nlvr_50x200.npz")
SHARED = Job(QUICK, "shared_resampler")
MODES = tuple(
    Job(QUICK, arm, (("method.epochs", 0.0), ("method.steps", 1)))
    for arm in ("prefix_single", "perceiver", "prefix_sum")
)


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


def prefix_none_rows(bench: Bench, seed: int) -> None:
    """P6 at the rate of the trial whose 43 % the target goes back to, A3 at that of the other arms."""
    for row, arm, target in (("P6", "prefix_none_lr_middle", "<= 0.60"), ("A3", "prefix_none", "reported")):
        job = Job(QUICK, arm)
        found = bench.run(job, seed)
        if found is None:
            bench.missing(row, seed, f"{arm}: retention at 1/32", target, job)
            continue
        kept = retention(found, 32)
        ok = kept <= 0.6 if row == "P6" else None
        bench.add(row, seed, f"{arm}: retention at 1/32", target, kept, ok, found["command"])


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
    own = job._replace(arm="perceiver,smoke", more=more[2:]) if bench.options.smoke else job
    command = own.command(seed, workdir, None)
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

    from protojax import parallel
    from protojax import session as session_lib
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
        session = session_lib.make_session(recipe, session_lib.Options(Path("."), config.run, config.system, 1.0, {}))
        batch = parallel.to_device(session.mesh, recipe.sources["train"].batch(0))
        state = session_lib.initial_state(session)
        zeros = jax.jit(lambda s=session: empty_accumulator(s.numbers))()
        calls.append([session.one, state, zeros, session.constants])
    times: list[list[float]] = [[], []]
    for _ in range(4 if bench.options.smoke else 40):
        for i, call in enumerate(calls):
            began = time.perf_counter()
            call[1], call[2] = call[0](call[1], call[2], batch, call[3])
            jax.block_until_ready(call[1])
            times[i].append(time.perf_counter() - began)
    medians = [float(np.median(t[2:])) for t in times]
    ratio = medians[0] / medians[1]
    device = jax.devices()[0].device_kind
    check = f"step time P = 6 over P = 1, B = 128 on {device} ({1e3 * medians[0]:.1f} ms)"
    return bench.add("S1", seed, check, "<= 1.3 "
                     "(accelerator 1.1)", ratio, ratio <= (1.3 if device == "cpu" else 1.1), "python -m "
                     "benchmarks.alignment --rows S1")  # fmt: skip


# ------------------------------------------------------------------------------- data sets, an encoder of ours
def retrieval(found: Mapping[str, Any], ks: Sequence[int] = (1, 10)) -> list[tuple[str, float, float]]:
    """(name, seen, chance) of R@k, mean of both directions, at full width."""
    report = final(found)
    return [(f"R@{k}, both directions", at_full(report[f"r{k}"]), report["chance"][str(k)]) for k in ks]


def figures(bench: Bench, seed: int, row: str, what: str, job: Job, of: Callable[..., list]) -> None:
    """A row without a target: each figure of `of(run)` with its chance."""
    found = bench.run(job, seed)
    if found is None:
        return bench.missing(row, seed, what, "reported", job)
    for name, seen, chance in of(found):
        bench.add(row, seed, f"{what}, {name}", "reported", seen, None, found["command"], chance)
    return None


def cross_style_row(bench: Bench, seed: int) -> None:
    figures(bench, seed, "D1", "emoji, known concepts in an unseen style", TOWER, retrieval)


def raw_pixels_row(bench: Bench, seed: int) -> None:
    """The control of D1, which trains nothing and is the same for every seed."""
    if bench.options.data and not bench.options.smoke:
        seen, chance = raw_pixels(Path(bench.options.data))
        check = "control of D1 without training: concept of the most correlated image of the other styles, 32 px"
        command = "python -m benchmarks.alignment --rows D6 --seeds 0 --data DATA"
        bench.add("D6", seed, check, "reported", seen, None, command, chance)


def raw_pixels(folder: Path, side: int = 32) -> tuple[float, float]:
    """(share of EmojiTwo's images whose most correlated image of the other styles has their concept, the share for an
    image at random)."""
    pixels, concepts = {}, {}
    for style in ("noto", "twemoji", "openmoji", "emojitwo"):
        with np.load(folder / f"emoji_{style}_64.npz") as found:
            images = found["images"].astype(np.float32)
            concepts[style] = found["concept"]
        factor = images.shape[1] // side
        small = images.reshape(len(images), side, factor, side, factor, 3).mean((2, 4)).reshape(len(images), -1)
        small -= small.mean(1, keepdims=True)
        pixels[style] = small / np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)
    queries, asked = pixels.pop("emojitwo"), concepts.pop("emojitwo")
    bank, known = np.concatenate([*pixels.values()]), np.concatenate([*concepts.values()])
    queries, asked = queries[np.isin(asked, known)], asked[np.isin(asked, known)]
    right = known[np.argmax(queries @ bank.T, axis=1)] == asked
    return float(right.mean()), float(np.mean([np.mean(known == concept) for concept in asked]))


def unseen_row(bench: Bench, seed: int) -> None:
    for what, job in UNSEEN.items():
        figures(bench, seed, "D2", f"emoji, unseen captions, {what} flags", job, retrieval)


def tiles_row(bench: Bench, seed: int) -> None:
    figures(bench, seed, "D3", "game tiles, unseen names", TILES, retrieval)


def grocery_row(bench: Bench, seed: int) -> None:
    def of(found: Mapping[str, Any]) -> list[tuple[str, float, float]]:
        report = final(found)
        kinds = (("zero_shot", "description"), ("zero_shot_names", "name"))
        return [
            (f"class by its {kind}", at_full(report[key]["accuracy"]), report[key]["chance"]) for key, kind in kinds
        ]

    figures(bench, seed, "D4", "grocery photographs", GROCERY, of)


def nlvr_row(bench: Bench, seed: int) -> None:
    def of(found: Mapping[str, Any]) -> list[tuple[str, float, float]]:
        own = final(found)["matching"]
        error = f"AUC (standard error of chance {own['auc_error']:.3f})"
        rows = [("accuracy against the majority", own["accuracy"], own["majority"]), (error, own["auc"], 0.5)]
        return [(name, at_full(scores), chance) for name, scores, chance in rows] + retrieval(found, (10,))

    figures(bench, seed, "D5", "NLVR, sentence true or false of an image", NLVR, of)


def factors_row(bench: Bench, seed: int) -> None:
    figures(
        bench, seed, "A1", "known factors, linear regression from image embeddings", MAIN,
        lambda found: [("R^2", final(found)["factors"]["r2"], 0.0)],
    )  # fmt: skip


def shared_row(bench: Bench, seed: int) -> None:
    figures(bench, seed, "A2", "one resampler for image and text", SHARED, lambda found: retrieval(found, (1,)))


ROWS: dict[str, Callable[[Bench, int], None]] = {
    "P1": bos_rows, "P2": bos_rows, "P3": bos_rows, "P4": main_rows, "P5": main_rows, "P6": prefix_none_rows,
    "P7": suspects_row, "P8": main_rows, "P9": modes_row, "P10": emoji_rows, "P11": emoji_rows, "P12": resume_row,
    "D1": cross_style_row, "D2": unseen_row, "D3": tiles_row, "D4": grocery_row, "D5": nlvr_row,
    "D6": raw_pixels_row,
    "A1": factors_row, "A2": shared_row, "A3": prefix_none_rows, "S1": speed_row,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", default=str(ROOT / "docs" / "results"), help="table and records")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "alignment"), help="the runs themselves")
    parser.add_argument("--data", default=None, help="folder with emoji_*_64.npz, dcss_tiles_32.npz, nlvr_50x200.npz")
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
