"""The acceptance table of mixtures of prompts: arms x presets x seeds, through the loop's own step.

    python -m benchmarks.prompts                       # whatever is missing, most important first; resumable
    python -m benchmarks.prompts --jobs small:default  # one job
    python -m benchmarks.prompts --jobs memory         # 10,000 classes of 32: read from the compiled step
    python -m benchmarks.prompts --smoke --out /tmp/p.jsonl   # a few steps a job: does the script run?
    python -m benchmarks.prompts --table               # docs/results/prompts.md from what is there

Each job is an arm on a preset. Its seeds run side by side: `protojax.step.step`, the loop's own, under `vmap`. Every
record holds the command that runs the same seed alone, `protojax train --config=prompts_synthetic:ARM,PRESET
--config.seed=S`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.prompts_memory import memory_record
from protojax import configs_path, experiment
from protojax import step as step_lib
from protojax.api import Probe, Recipe
from protojax.config import freeze
from protojax.workloads.prompts_arms import ARMS, REMEDIES

RESULTS = Path("docs/results/prompts.jsonl")
STAGES = 4  # evaluations after the one at step 0: detectors of terms want three records
REAL = ("fashion", "grocery", "grocery_fine")
REAL_SEEDS = 3

MAIN = ["memory", "small:default", "small:original_k8", *(f"small:{a}" for a in REMEDIES), "hard:default",
        "hard:original", "hard:single_prompt", "standard:default", "matched:default",
        *(f"{r}:{a}" for r in REAL for a in ("default", "original", "single_prompt")),
        *(f"small:{a}" for a in ("entropy_stopped", "zero_init", "random_control", "sinkhorn_only", "many_prompts")),
        "small:initialised_control", "standard:random_control", "standard:initialised_control", "wide:default",
        "wide:original_k32"]  # fmt: skip
REST = [f"small:{arm}" for arm in ARMS if arm not in ("original", "original_k32") and f"small:{arm}" not in MAIN]
VARIANTS = ("published_temperatures", "cls_temperature_0.07", "soft_assignment", "hard_from_start", "tau_end_0.05",
            "lse", "centre_price", "uniform_plan", "online_em", "sinkhorn")  # fmt: skip
HARD = [f"hard:{arm}" for arm in VARIANTS]
HARD += [f"wide:{arm}" for arm in ("soft_assignment", "online_em")]
HARD += [f"fashion:{arm}" for arm in ("class_mean_default", "class_mean")]


def recipe_of(job: str, seed: int, smoke: bool) -> tuple[Recipe, str]:
    """The recipe of one seed of a job and the command that runs it."""
    preset, arm = job.split(":")
    changes = {}
    if arm == "class_mean_default":  # without the gap
        arm, changes = "default", {"data.source.base": "class_mean"}
    name = "prompts_synthetic"
    if preset in REAL:
        name = "prompts_fashion" if preset == "fashion" else "prompts_quickstart"
    argument = {"fashion": arm, "grocery": arm, "grocery_fine": f"{arm},fine"}.get(preset, f"{arm},{preset}")
    if preset == "fashion":
        changes["data.root"] = str(_FILES["fashion"])
    cfg = configs_path.load(f"{name}:{argument}" + (",smoke" if smoke else ""))
    cfg.update_from_flattened_dict({"seed": seed, **changes})
    flags = "".join(f" --config.{k}={Path(v).name}" for k, v in changes.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return experiment.build(freeze(cfg)), f"protojax train --config={name}:{argument} --config.seed={seed}{flags}"


_FILES: dict[str, Path] = {}  # what the command line says, see `main`


def run_job(job: str, seeds: list[int], smoke: bool) -> list[dict[str, Any]]:
    """One record a seed."""
    began = time.perf_counter()
    made = [recipe_of(job, seed, smoke) for seed in seeds]
    recipes = [recipe for recipe, _ in made]
    first = recipes[0]
    constants = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(x) for x in a]), *[r.constants for r in recipes])
    starts = [
        jax.jit(lambda b, c, r=r: step_lib.init_state(r, step_lib.join(b, c)))(r.sources["train"].batch(0), r.constants)
        for r in recipes
    ]
    state = jax.tree.map(lambda *a: jnp.stack(a), *starts)

    def one(state: Any, batch: Any, constant: Any) -> Any:
        return step_lib.step(first, state, step_lib.join(batch, constant))[0]

    def many(state: Any, batches: Any, constant: Any) -> Any:
        body = jax.vmap(one, in_axes=(0, 0, 0))
        return jax.lax.scan(lambda s, b: (body(s, b, constant), None), state, batches)[0]

    terms = jax.jit(jax.vmap(lambda s, b, c: step_lib.term_gradients(first, s, step_lib.join(b, c))))
    advance = jax.jit(many)
    histories: list[list[dict[str, Any]]] = [[] for _ in seeds]
    total, at = first.total_steps, 0
    stages = sorted({round(total * i / STAGES) for i in range(1, STAGES + 1)} - {0})
    for stop in [0, *stages]:
        if stop > at:
            state = advance(state, _batches(recipes, at, stop), constants)
            at = stop
        here = jax.tree.map(np.asarray, terms(state, _batches(recipes, at, at + 1, one=True), constants))
        for i, recipe in enumerate(recipes):
            own = jax.tree.map(lambda a, i=i: a[i], state)
            gradients = {k: float(v[i]) for k, v in here.items()}
            gradients["grad_norm"] = float(np.sqrt(sum(v**2 for k, v in gradients.items() if k.startswith("grad"))))
            histories[i] += [
                {"kind": "train", "step": at, "metrics": gradients},
                {"kind": "eval", "step": at, "metrics": evaluate(recipe, own)},
            ]
    took = time.perf_counter() - began
    return [
        _record(job, seed, command, recipe, history, took / len(seeds))
        for seed, (recipe, command), history in zip(seeds, made, histories, strict=True)
    ]


def _batches(recipes: list[Recipe], start: int, stop: int, one: bool = False) -> dict[str, np.ndarray]:
    """Batches of all seeds, [steps, seeds, B] (or [seeds, B])."""
    keys = recipes[0].sources["train"].batch(0).keys()
    steps = [[recipe.sources["train"].batch(s) for recipe in recipes] for s in range(start, stop)]
    stacked = {k: np.stack([np.stack([b[k] for b in row]) for row in steps]) for k in keys}
    return {k: v[0] for k, v in stacked.items()} if one else stacked


def evaluate(recipe: Recipe, state: Any) -> dict[str, Any]:
    """The recipe's evaluations of one seed's state."""
    assert recipe.estimator is not None
    book, _ = recipe.estimator.codebooks(state.estimator, state.params["head"]["prototypes"])
    specs = {k: s.spec for k, s in recipe.sources.items()}
    probe = Probe(
        int(state.step),
        lambda split: None,
        specs,
        jax.tree.map(np.asarray, book),
        jax.tree.map(np.asarray, recipe.describe(state.estimator)),
        {},
    )  # type: ignore[arg-type, return-value]
    numbers: dict[str, Any] = {}
    for evaluation in recipe.evaluations:
        numbers |= evaluation.run(probe, jax.random.key(0))
    return numbers


def _record(job: str, seed: int, command: str, recipe: Recipe, history: list[dict[str, Any]], seconds: float) -> dict[
    str, Any]:  # fmt: skip
    preset, arm = job.split(":")
    found: dict[str, dict[str, Any]] = {}
    for end in range(2, len(history) + 1, 2):
        for finding in recipe.diagnose(history[:end]):
            known = found.setdefault(finding["detector"], {"first": history[end - 1]["step"]})
            known |= {"severity": finding["severity"], "evidence": finding["evidence"]}
    for finding in found.values():
        finding["at_end"] = not finding["evidence"].startswith("Gone")
    evals = [(r["step"], r["metrics"]["prompts"]) for r in history if r["kind"] == "eval"]
    curve = [[step, e["e_step"]["usage_perplexity"], e["e_step"]["effective"], e["accuracy"]["top1"]]
             for step, e in evals]  # fmt: skip
    return {
        "preset": preset, "arm": arm, "seed": seed, "command": command, "steps": recipe.total_steps,
        "seconds": round(seconds, 1), "final": evals[-1][1], "initial": evals[0][1], "findings": found,
        "gradients": history[-2]["metrics"], "curve": curve, "jax": jax.__version__,
    }  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """Records so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--jobs", nargs="*", default=[*MAIN, *REST, *HARD], help="PRESET:ARM, in this order")
    options.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    options.add_argument("--out", type=Path, default=RESULTS)
    options.add_argument("--fashion", type=Path, help="fashion_mnist_28.npz, for the jobs 'fashion:...'")
    options.add_argument("--smoke", action="store_true")
    options.add_argument("--table", action="store_true", help="only write the table again")
    given = options.parse_args()
    if given.fashion:
        _FILES["fashion"] = given.fashion
    if not given.table:
        _run_missing(given)
    from benchmarks.prompts_table import write

    write(read(given.out), given.out.with_suffix(".md"))


def _run_missing(given: argparse.Namespace) -> None:
    done = {(r["preset"], r["arm"], r["seed"]) for r in read(given.out)}
    for job in given.jobs:
        preset, _, arm = job.partition(":")
        seeds = [0] if job == "memory" else given.seeds[:REAL_SEEDS] if preset in REAL else given.seeds
        seeds = [s for s in seeds if (preset, arm, s) not in done]
        if not seeds or (preset == "fashion" and not given.fashion):
            continue
        records = [memory_record()] if job == "memory" else run_job(job, seeds, given.smoke)
        with given.out.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
        if job == "memory":
            print(job, f"{records[0]['final']['extra_gib']:.3f} GiB beside the gradient", flush=True)
            continue
        last = [r["final"] for r in records]
        print(job, f"usage {np.mean([f['e_step']['usage_perplexity'] for f in last]):.2f}",
              f"top-1 {100 * np.mean([f['accuracy']['top1'] for f in last]):.2f}",
              f"{records[0]['seconds']} s a seed", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
