"""What every benchmark shares: interleaved timing with an A/A row, a float64 check first, absolute rates, one table.

A figure is a ratio within one run: ours and the peers take turns (A B A B ...), each on its next input buffer, and the
median counts; the first of ours runs twice in every round ("A/A"), whose spread is the noise of the table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from protojax.ops import kernels


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--full", action="store_true", help="the large sizes, meant for an accelerator")
    options.add_argument("--tiny", action="store_true", help="sizes that only show that the script runs")
    options.add_argument("--repeats", type=int, default=20, help="rounds of the interleaved timing")
    options.add_argument("--out", type=Path, help="folder for NAME.md (the table) and NAME.jsonl (the records)")
    options.add_argument("--no-torch", action="store_true", help="leave PyTorch out even where it is installed")
    options.add_argument(
        "--allow-portable", action="store_true", help="do not fail when an accelerator's kernel is off"
    )
    return options


@dataclass
class Contender:
    """One function and its rotating buffers. wait(result) blocks until it is computed; a call that does several things
    of the same kind says how many (`steps`): figures are those of one."""

    name: str
    call: Callable[..., Any]
    buffers: Sequence[tuple[Any, ...]]
    wait: Callable[[Any], Any] = jax.block_until_ready
    extra_bytes: int | None = None
    steps: int = 1


@dataclass
class Report:
    """Records of one benchmark: printed as JSON lines while it runs and as a table at its end."""

    name: str
    options: argparse.Namespace
    records: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = {
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "python": platform.python_version(),
            **versions("jax", "jaxlib", "numpy", "scikit-learn", "torch"),
            **machine_rates(),
        }
        self.add(case="machine", **self.machine)

    def add(self, **record: Any) -> None:
        record = {"benchmark": self.name, **record}
        self.records.append(record)
        print(json.dumps(record), flush=True)

    def compare(self, case: str, contenders: Sequence[Contender], flops: float | None = None, **columns: Any) -> None:
        """Time `contenders` against one another (the first is ours) and record a row each."""
        times = interleave(contenders, self.options.repeats)
        ours = float(np.median(times[0]))
        for contender, taken in zip(contenders, times, strict=False):
            seconds = float(np.median(taken))
            record: dict[str, Any] = {"ms": 1e3 * seconds, "times ours": seconds / ours}
            if contender is contenders[0]:
                record["A/A"] = float(np.median(times[-1])) / ours
                if flops is not None:
                    record["share of matmul rate"] = flops / seconds / self.machine["matmul_flops"]
            if contender.extra_bytes is not None:
                record["extra MB"] = contender.extra_bytes / 1e6
            self.add(case=case, what=contender.name, **columns, **record)

    def table(self) -> None:
        rows = [{k: v for k, v in r.items() if k != "benchmark"} for r in self.records if r["case"] != "machine"]
        print("\n" + markdown(rows))
        if self.options.out is not None:
            self.write(self.options.out, rows)
        if self.fallbacks:
            sys.exit("the portable path ran instead of a kernel (--allow-portable): " + "; ".join(self.fallbacks))

    def write(self, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        """NAME.md: command, machine and table; NAME.jsonl: every record."""
        folder.mkdir(parents=True, exist_ok=True)
        command = f"python -m benchmarks.{self.name} " + " ".join(sys.argv[1:])
        machine = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.machine.items())
        text = [f"# {self.name}", f"`{command.strip()}`, {time.strftime('%Y-%m-%d')}; {machine}.", markdown(rows)]
        if self.fallbacks:
            text.append("The portable path ran instead of a kernel: " + "; ".join(self.fallbacks))
        (folder / f"{self.name}.md").write_text("\n\n".join(text) + "\n")
        lines = [json.dumps(record) for record in ({"command": command}, *self.records)]
        (folder / f"{self.name}.jsonl").write_text("\n".join(lines) + "\n")


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; what is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cell = lambda value: f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)  # noqa: E731
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows])


def interleave(contenders: Sequence[Contender], repeats: int) -> list[list[float]]:
    """Seconds a step of each contender in turn, and last those of the first one run once more in every round (A/A)."""
    turns = [*contenders, contenders[0]]
    for turn in turns:
        for buffer in turn.buffers:
            turn.wait(turn.call(*buffer))
    times: list[list[float]] = [[] for _ in turns]
    for step in range(repeats):
        for slot, turn in enumerate(turns):
            buffer = turn.buffers[step % len(turn.buffers)]
            start = time.perf_counter()
            turn.wait(turn.call(*buffer))
            times[slot].append((time.perf_counter() - start) / turn.steps)
    return times


def machine_rates() -> dict[str, float]:
    """This run's matmul rate (flop/s; bfloat16 on accelerators) and copy bandwidth (bytes/s, read plus written)."""
    cpu = jax.default_backend() == "cpu"
    size, dtype, number = (1536, jnp.float32, 2**24) if cpu else (8192, jnp.bfloat16, 2**28)
    table = jax.random.normal(jax.random.key(0), (size, size), dtype)
    vector = jnp.ones((number,), jnp.float32)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1.0)
    seconds = []
    for function, argument in ((product, table), (copy, vector)):
        taken = interleave([Contender("", function, [(argument,)])], 7)
        seconds.append(min(taken[0] + taken[1]))
    return {"matmul_flops": 2.0 * size**3 / seconds[0], "copy_bytes": 8.0 * number / seconds[1]}


def extra_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Temporaries of the compiled program, without arguments and results."""
    return int(jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes)


def contender(name: str, function: Callable[..., Any], buffers: Sequence[tuple[Any, ...]]) -> Contender:
    """A JAX function, jitted, with the memory of its compiled program."""
    return Contender(name, jax.jit(function), buffers, extra_bytes=extra_bytes(function, *buffers[0]))


def check(name: str, found: Any, reference: Callable[..., Any], arguments: Sequence[Any], tolerance: float) -> float:
    """Largest error of `found` against `reference` in float64, relative to each array's size; exits when too large."""
    with jax.enable_x64(True):
        wide = [
            jnp.asarray(np.asarray(a), jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else jnp.asarray(a)
            for a in arguments
        ]
        expected = jax.tree.map(np.asarray, reference(*wide))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    worst = max(float(np.max(np.abs(np.asarray(a, np.float64) - b)) / max(1e-30, np.max(np.abs(b)))) for a, b in pairs)
    if not worst <= tolerance:
        sys.exit(f"{name}: differs from float64 by {worst:.2e}, more than {tolerance:.0e}; nothing was timed")
    return worst


def require_kernel(report: Report, rows: int, count: int, width: int) -> str:
    """The path that these sizes take; on an accelerator the portable one makes the whole benchmark fail at its end."""
    path, reason = kernels.choose(rows, count, width, jnp.dtype(policy() or jnp.float32), jnp.dtype(jnp.float32))
    if jax.default_backend() != "cpu" and path == "scan" and not report.options.allow_portable:
        report.fallbacks.append(f"N={rows} K={count} width={width}: {reason}")
    return path


def policy() -> Any:
    """Dtype of matrix products: bfloat16 on accelerators, float32 on CPU."""
    return None if jax.default_backend() == "cpu" else jnp.bfloat16


def unit_rows(seed: int, count: int, width: int) -> jax.Array:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def temperatures() -> dict[str, float]:
    """Random inputs (logits of order one) and peaked ones (unit features at temperature 0.02)."""
    return {"random": 0.5, "peaked": 0.02}


def torch_or_none(options: argparse.Namespace) -> Any:
    """PyTorch on this run's device and as many threads as JAX has, or None."""
    if options.no_torch:
        return None
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def torch_contender(
    torch: Any, name: str, function: Callable[..., Any], buffers: Sequence[tuple[Any, ...]]
) -> Contender:
    """`torch.compile`d function on copies of JAX buffers."""
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() != "cpu" else "cpu"
    moved = [tuple(torch.from_numpy(np.array(a)).to(device) for a in buffer) for buffer in buffers]
    wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
    return Contender(name, torch.compile(function), moved, wait)
