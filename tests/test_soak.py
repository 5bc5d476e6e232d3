"""A long run of a tiny model: no memory growth, no second compilation, no drift in the time of a step.

PROTOJAX_SOAK_STEPS=100000 python -m pytest tests/test_soak.py: as long as that (figures: docs/scaling.md).
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import jax
import numpy as np
import pytest

from protojax import experiment, parallel, train
from tests.process_worker import linear
from tests.toy import toy_config, toy_options

STEPS = int(os.environ.get("PROTOJAX_SOAK_STEPS", "5000"))


def resident() -> float:
    """Memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@pytest.mark.slow
def test_thousands_of_steps_change_nothing_but_the_state(tmp_path, monkeypatch):
    # Two of the eight fake devices: they share XLA's threads with the collectives that wait on them, and after some
    # thousand steps on eight the last one of a collective finds no thread (jaxlib 0.10: "Termination timeout").
    whole = parallel.make_mesh
    monkeypatch.setattr(parallel, "make_mesh", lambda data, proto: whole(data, proto, jax.devices()[:2]))
    config = toy_config(
        method__steps=STEPS, data__batch_size=16, evals__batch_size=16, run__log_every=125, run__checkpoint_every=0.1,
        evals__every=0.1, run__keep=2,
    )  # fmt: skip
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **kw: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    memory, counts, arrays = [], [], []

    def at_log(self, *given, **kw):
        log(self, *given, **kw)
        memory.append(resident())
        counts.append(len(compiled))
        arrays.append(len(jax.live_arrays()))

    log = train.Loop._log
    train.Loop._log = at_log
    try:
        result = train.run(linear(experiment.build(config)), toy_options(config, tmp_path))
    finally:
        train.Loop._log = log
        jax.monitoring.clear_event_listeners()
    assert result.finished
    records = [r for r in train.metrics_lib.read_records(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    settled = len(memory) // 4  # after two evaluations and two checkpoints
    assert counts[-1] == counts[settled], "something was compiled again"
    # A state that is being saved may be alive beside the next one, at any log step: the median counts. What stays
    # behind at every log, evaluation or save would raise it.
    half = len(arrays) // 2
    assert np.median(arrays[half:]) <= np.median(arrays[settled:half]), f"arrays stay behind: {arrays}"
    assert memory[-1] - memory[settled] < 30, f"memory grew: {memory}"
    rates = np.array([r["images_per_second"] for r in records[2:]])
    first, last = (float(np.median(part)) for part in np.array_split(rates, 2))
    print(
        f"{STEPS} steps: memory {memory[settled]:.0f} -> {memory[-1]:.0f} MB since step {records[settled]['step']}, "
        f"{first:.0f} -> {last:.0f} images/s by halves, {counts[-1] - counts[settled]} compilations"
    )
    assert last > 0.5 * first, f"steps became slower: {first:.0f} to {last:.0f} images/s (on a shared machine)"
    assert all(np.isfinite(r["metrics"]["loss/total"]) for r in records)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [STEPS - STEPS // 10, STEPS]
