"""The acceptance table of soft labels: every arm over five starts, one program for all starts of an arm.

    python -m benchmarks.soft_labels --root fashion_mnist_28.npz        # resumes: finished arms are not run again
    python -m benchmarks.soft_labels --only default,tiny_scale
    python -m benchmarks.soft_labels --tables                           # write the page from what is there

The step is the trainer's own (`protojax.step.step`), under `vmap` over the seeds of a run and scanned on the device; a
test holds that it equals `protojax train` with the same seed. Writes docs/results/soft_labels.jsonl and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from protojax import configs_path, metrics, summary
from protojax import step as step_lib
from protojax.api import FeatureBank, Probe
from protojax.config import Config, freeze
from protojax.data import soft_labels as data_lib
from protojax.evals import detectors
from protojax.train import boundaries
from protojax.workloads import soft_label_arms, soft_labels

OUT = Path("docs/results/soft_labels.jsonl")
SEEDS = (0, 1, 2, 3, 4)
PRESETS = ("iid", "district", "seven")


class Row(NamedTuple):
    """One line of the table: a config file with its argument."""

    config: str
    argument: str

    @property
    def name(self) -> str:
        return f"{self.config}:{self.argument}"

    def command(self, seed: int) -> str:
        root = " --config.data.root=fashion_mnist_28.npz" if "fashion" in self.config else ""
        return f"protojax train --config={self.name} --config.seed={seed}{root}"


def rows() -> list[Row]:
    """In order of importance."""
    quick = "soft_labels_quickstart"
    out = [Row(quick, f"default,{p}") for p in PRESETS]
    out += [Row(quick, f"{a},seven") for a in ("original_first", "original_fixed", "original_logitnorm")]
    out += [
        Row(quick, "tiny_scale,iid"),
        Row(quick, "default,iid,well_scaled"),
        Row(quick, "default,district,well_scaled"),
    ]
    out += [Row("soft_labels_fashion", a) for a in ("default", "default,well_scaled")]
    out += [Row(quick, "default,iid,large"), Row(quick, "default,district,large")]
    out += [Row(quick, f"{a},iid") for a in soft_label_arms.REMEDIES]
    out += [
        Row(quick, f"{a},seven")
        for a in ("original_T10", "original_s2", "raw_inputs", "raw_final_norm", "group_columns_keep")
    ]
    out += [Row(quick, f"{a},iid") for a in ("entropy_too_high", "dead_penalty")]
    out += [Row(quick, f"{a},district") for a in soft_label_arms.REMEDIES]
    return out + [Row(quick, f"{a},iid") for a in soft_label_arms.LATER if a != "group_columns_keep"]


# ---------------------------------------------------------------------------------------------------- training
def train_seeds(config: Config, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """One record a seed: {'seed', 'records' as in metrics.jsonl, 'final', 'findings', 'seconds'}."""
    began = time.perf_counter()
    splits = soft_labels.open_splits(config)
    preparation = soft_labels.prepare(config, splits)
    recipe = soft_labels.assemble(config, splits, preparation)
    total = recipe.total_steps
    data = {k: jnp.asarray(v) for k, v in data_lib.prepared(splits["train"], preparation).items()}
    held = {
        s: {k: jnp.asarray(v) for k, v in data_lib.prepared(splits[s], preparation).items()} for s in ("val", "test")
    }
    order = jnp.asarray(np.stack([_order(config, splits, preparation, seed, total) for seed in seeds]))
    numbers = jnp.asarray(seeds, jnp.int32)

    def batch_of(rows: jax.Array) -> dict[str, jax.Array]:
        return {**{k: v[rows] for k, v in data.items()}, "mask": jnp.ones(rows.shape, bool), "index": rows}

    def begin(seed: jax.Array, rows: jax.Array) -> Any:
        return step_lib.init_state(recipe._replace(seed=seed), batch_of(rows))

    def chunk(seed: jax.Array, state: Any, sums: Any, rows: jax.Array, first: jax.Array, last: jax.Array) -> Any:
        own = recipe._replace(seed=seed)

        def body(i: jax.Array, carry: Any) -> Any:
            state, sums = carry
            state, found, _ = step_lib.step(own, state, batch_of(rows[i]))
            return state, metrics.add(sums, found)

        return jax.lax.fori_loop(first, last, body, (state, sums))

    def logits(state: Any) -> dict[str, jax.Array]:
        variables = {"params": state.params["encoder"], "stats": state.stats}
        return {
            s: recipe.encoder.apply(variables, soft_labels.inputs_of(b), False, None)[0]["logits"]
            for s, b in held.items()
        }

    state = jax.jit(jax.vmap(begin))(numbers, order[:, 0])
    shapes = jax.eval_shape(lambda s: jax.tree.map(lambda x: x[0], s), state)
    example = jax.eval_shape(batch_of, order[0, 0])
    empty = jax.tree.map(
        lambda x: jnp.zeros((len(seeds), *x.shape), x.dtype), step_lib.step_numbers(recipe, shapes, example)
    )
    run = jax.jit(jax.vmap(chunk, in_axes=(0, 0, 0, 0, None, None)), donate_argnums=(1,))
    look = jax.jit(jax.vmap(logits))
    _, evals_at, _ = boundaries(total, total, config.evals.every, 1.0)
    histories: list[list[dict[str, Any]]] = [[] for _ in seeds]
    _evaluate(recipe, look(state), 0, histories)
    first = 0
    for last in [1, *sorted(evals_at)]:
        state, sums = run(numbers, state, empty, order, first, last)
        host = jax.device_get(sums)
        for i, history in enumerate(histories):
            found = metrics.means({k: (s[i], c[i]) for k, (s, c) in host.items()})
            history.append({"kind": "train", "step": last, "fraction": last / total, "metrics": found})
        if last in evals_at:
            _evaluate(recipe, look(state), last, histories)
        first = last
    seconds = time.perf_counter() - began
    return [
        _record(config, seed, history, seconds / len(seeds)) for seed, history in zip(seeds, histories, strict=True)
    ]


def _order(config: Config, splits: Any, preparation: Any, seed: int, total: int) -> np.ndarray:
    """int32 [total, B]: which samples every step sees, from the trainer's own source."""
    small = {k: v._replace(graph={}, images=None) for k, v in splits.items()}
    source = data_lib.sources(small, preparation, batch_size=config.data.batch_size, eval_batch_size=64, seed=seed)[
        "train"
    ]
    return np.stack([source.batch(t)["index"] for t in range(total)]).astype(np.int32)


def _evaluate(recipe: Any, found: Any, step: int, histories: list[list[dict[str, Any]]]) -> None:
    host = {k: np.asarray(v) for k, v in found.items()}
    nothing = np.zeros((0, 0), np.float32)
    for i, history in enumerate(histories):
        banks = {s: FeatureBank(nothing, nothing, {}, np.arange(len(z[i])), {"logits": z[i]}) for s, z in host.items()}
        probe = Probe(step, banks.__getitem__, {}, None, {}, {})
        values: dict[str, Any] = {}
        for evaluation in recipe.evaluations:
            values |= evaluation.run(probe, jax.random.key(0))
        history.append(
            {"kind": "eval", "step": step, "fraction": step / recipe.total_steps, "metrics": metrics.plain(values)}
        )


def _record(config: Config, seed: int, history: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What is kept of a run: the last evaluation, the course of the validation KL, the findings with their onset."""
    evals = [r for r in history if r["kind"] == "eval"]
    trains = [r for r in history if r["kind"] == "train"]
    last = evals[-1]["metrics"]["soft_labels"]
    for split in ("val", "test"):
        last[split].pop("groups", None)
    keep = ("loss/soft_label/active", "loss/soft_label/largest_logit", "clipped", "grad_norm", "loss/total")
    return {
        "seed": seed,
        "steps": history[-1]["step"],
        "epoch": last["build"]["epoch_steps"],
        "seconds": round(seconds, 2),
        "soft_labels": last,
        "val_kl": [[r["step"], r["metrics"]["soft_labels"]["val"]["kl"]] for r in evals],
        "active": [r["metrics"].get("loss/soft_label/active") for r in trains],
        "train": {k: trains[-1]["metrics"].get(k) for k in keep},
        "first_loss": trains[0]["metrics"].get("loss/soft_label/kl"),
        "findings": [
            {k: f[k] for k in ("detector", "severity", "step", "evidence")}
            for f in detectors.diagnose(history, warmup_steps=round(0.1 * history[-1]["step"]))
        ],
    }


# ----------------------------------------------------------------------------------------------------- the file
def read() -> list[dict[str, Any]]:
    return metrics.read_records(OUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.environ.get("FASHION_MNIST"), help="fashion_mnist_28.npz")
    parser.add_argument("--only", default="", help="arms, separated by commas")
    parser.add_argument("--tables", action="store_true", help="write the page and stop")
    options = parser.parse_args()
    if not options.tables:
        wanted = set(filter(None, options.only.split(",")))
        done = {(r["config"], r["argument"]) for r in read()}
        for row in rows():
            arm = row.argument.split(",")[0]
            if (row.config, row.argument) in done or (wanted and arm not in wanted):
                continue
            if "fashion" in row.config and not options.root:
                print(f"{row.name}: no --root, left out")
                continue
            c = configs_path.load(row.name)
            if "fashion" in row.config:
                c.data.root = options.root
            records = train_seeds(freeze(c), SEEDS)
            OUT.parent.mkdir(parents=True, exist_ok=True)
            with OUT.open("a") as file:
                for record in records:
                    line = {"config": row.config, "argument": row.argument, "command": row.command(record["seed"]),
                            "device": summary.device(), "versions": summary.versions(), **record}  # fmt: skip
                    file.write(json.dumps(metrics.plain(line)) + "\n")
            test = [r["soft_labels"]["test"] for r in records]
            print(
                f"{row.name}: KL {np.mean([t['kl'] for t in test]):.4f}, {records[0]['seconds']:.1f} s a start",
                flush=True,
            )
    from benchmarks.soft_labels_page import write

    print(write(read()))


if __name__ == "__main__":
    main()
