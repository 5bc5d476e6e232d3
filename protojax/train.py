"""The only training loop. It knows a Recipe and no workload: initialise or resume, step, log, evaluate, save.

Between two log steps the host reads no device value: it dispatches steps and loads batches. At a boundary (log,
evaluation, checkpoint: all known before the run starts) it reads one accumulator.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from protojax import distributed, flops, parallel, probing
from protojax import metrics as metrics_lib
from protojax import step as step_lib
from protojax.api import Recipe, TrainState
from protojax.checkpoint import NEWEST, CheckpointError, Checkpoints
from protojax.distributed import StopFlag
from protojax.gauges import Gauges
from protojax.metrics import Meter, NotFiniteError, Writer
from protojax.prefetch import prefetch, stack
from protojax.session import Options, Session, initial_state, make_session


class Result(NamedTuple):
    """finished: False when a signal stopped the run. initial, final: evaluation metrics. best: of `Checkpoints`."""

    state: TrainState
    step: int
    finished: bool
    initial: dict[str, Any]
    final: dict[str, Any]
    findings: list[dict[str, Any]]
    images_per_second: float
    probe: Any
    best: dict[str, Any] | None


# ------------------------------------------------------------------------------------------------ setting up
def resume(session: Session, checkpoints: Checkpoints) -> tuple[int, TrainState] | None:
    """The newest good checkpoint of this run, or None. Raises CheckpointError for a checkpoint of another run."""

    def accept(record: Mapping[str, Any]) -> None:
        here, there = dict(session.options.fingerprint), record["fingerprint"]
        changed = sorted(k for k in {*here, *there} if here.get(k) != there.get(k))
        if changed:
            lines = "; ".join(f"{k}: saved {there.get(k)!r}, now {here.get(k)!r}" for k in changed[:8])
            raise CheckpointError(
                f"{session.options.workdir} holds a run of another configuration ({lines}). "
                "Give the same configuration to resume it, or another --workdir."
            )

    found = checkpoints.restore_latest(session.shapes, session.shardings, accept, session.options.say)
    damaged = sorted(session.options.workdir.glob("damaged-*"))
    if found is None and damaged:
        names = ", ".join(p.name for p in damaged)
        raise CheckpointError(
            f"{session.options.workdir} holds damaged checkpoints ({names}) and no good one. "
            "To begin again give another --workdir, or delete them."
        )
    return None if found is None else (found[0], found[1])


# ------------------------------------------------------------------------------------------------------ loop
def boundaries(total: int, log_every: int, evals: float, saves: float) -> tuple[set[int], set[int], set[int]]:
    """Steps after which to log, evaluate and save (the last step belongs to all)."""

    def spaced(fraction: float) -> set[int]:
        count = max(1, round(1 / fraction))
        return {round(total * (i + 1) / count) for i in range(count)} - {0} | {total}

    evals_at, saves_at = spaced(evals), spaced(saves)
    # A state is saved or evaluated only after its metrics were read and found finite.
    return {1, *range(log_every, total + 1, log_every), *evals_at, *saves_at}, evals_at, saves_at


def plan(first: int, total: int, stops: set[int], calls: int) -> list[tuple[int, int]]:
    """(step, count) of every dispatch: `calls` steps at a time, one at a time where a boundary is nearer."""
    out, at = [], first
    ahead = sorted(s for s in stops if s > first)
    for stop in ahead:
        while at < stop:
            count = calls if at + calls <= stop else 1
            out.append((at, count))
            at += count
    assert at == total or first == total
    return out


def run(recipe: Recipe, options: Options) -> Result:
    """Train to the end (or to a signal) and return the last state with its evaluations.

    Writes checkpoints, metrics.jsonl and TensorBoard files below options.workdir; resumes when checkpoints are there.
    Raises NotFiniteError at the first non-finite loss or gradient; checkpoints of finite states stay.
    """
    session = make_session(recipe, options)
    best = recipe.best if options.run.best is None else options.run.best
    checkpoints = Checkpoints(options.workdir / NEWEST, options.run.keep, best=best, written=options.written)
    try:
        with StopFlag() as stop:
            return _run(session, checkpoints, stop)
    finally:
        checkpoints.close()


def _run(session: Session, checkpoints: Checkpoints, stop: StopFlag) -> Result:
    options = session.options
    found = resume(session, checkpoints)
    first, state = found if found else (0, initial_state(session))
    main = jax.process_index() == 0
    history = None if jax.process_count() == 1 else json.loads(distributed.share(_history(options.workdir)))
    writer = Writer(
        options.workdir,
        step=first if found else None,
        tensorboard=options.run.tensorboard,
        wandb=options.wandb,
        main=main,
        history=history,
    )
    try:
        return _train(session, checkpoints, writer, first, state, bool(found), stop)
    finally:
        writer.close()


def _history(workdir: Path) -> str:
    """metrics.jsonl as one JSON list: the first process's is everybody's."""
    return json.dumps(metrics_lib.read_records(workdir / "metrics.jsonl") if jax.process_index() == 0 else [])


def _train(
    session: Session,
    checkpoints: Checkpoints,
    writer: Writer,
    first: int,
    state: TrainState,
    found: bool,
    stop: StopFlag,
) -> Result:
    options, total = session.options, session.recipe.total_steps
    loop = Loop(session, checkpoints, writer)
    if found:
        if first < total:
            writer.write("event", first, event="resume", text=f"resumed at step {first} of {total}")
            options.say(f"resuming at step {first} of {total} from {checkpoints.directory}")
        else:
            options.say(f"this run is finished ({total} steps): nothing is trained, only the report is written again")
        if not loop.evaluated(0):
            raise CheckpointError(f"{writer.path} lost the evaluation at step 0 that the checkpoint belongs to.")
        loop.offer(state, first)  # the process may have ended between the evaluation and its checkpoint
    else:
        checkpoints.forget_best()
        loop.evaluate(state, 0)
        loop.save(state, 0)
    state, at = (state, first) if found and loop.exhausted(first) else loop.advance(state, first, stop)
    probe = None if loop.evaluated(at) else loop.evaluate(state, at)
    checkpoints.wait()
    final, initial = loop.evaluated(at) or {}, loop.evaluated(0) or {}
    finished = at == total or loop.exhausted(at)
    return Result(state, at, finished, initial, final, loop.findings(), loop.rate(), probe, checkpoints.best)


class Loop:
    """The mutable shell around the pure step: what is due at a boundary."""

    def __init__(self, session: Session, checkpoints: Checkpoints, writer: Writer):
        self.session, self.checkpoints, self.writer = session, checkpoints, writer
        self.recipe, self.options = session.recipe, session.options
        self.meter = Meter()
        run = self.options.run
        self.gauges = Gauges(
            self.options.workdir, self.recipe.sources["train"].spec.batch_size, self._operations, run.profile
        )
        self.logs, self.evals, self.saves = boundaries(
            self.recipe.total_steps, run.log_every, self.options.eval_every, run.checkpoint_every
        )

    # -- the hot path: no device value is read here
    def advance(self, state: TrainState, first: int, stop: StopFlag) -> tuple[TrainState, int]:
        """Steps from `first` to the end, or to the step after a signal."""
        total, size = self.recipe.total_steps, self.recipe.sources["train"].spec.batch_size
        make_empty = functools.partial(step_lib.empty_accumulator, self.session.numbers)
        empty = jax.jit(make_empty, out_shardings=parallel.replicated(self.session.mesh))
        accumulator, waited, images, at = empty(), 0.0, 0, first
        calls = plan(first, total, self.logs | self.evals | self.saves, self.options.run.steps_per_call)
        batches = prefetch(calls, self._load, self.options.system.prefetch)
        disable = None if self.options.run.progress else True
        with tqdm(total=total, initial=first, unit="step", disable=disable, dynamic_ncols=True) as bar:
            self.meter.start()
            for (begin, count), (batch, wait) in zip(calls, batches, strict=True):
                dispatch = self.session.one if count == 1 else self.session.many
                state, accumulator = dispatch(state, accumulator, batch, self.session.constants)
                at, waited, images = begin + count, waited + wait, images + count * size
                bar.update(count)
                self.gauges.step(at)
                stopping = stop.due(at)
                if at in self.logs or stopping:
                    self._log(state, accumulator, at, images, waited, bar)
                    accumulator, waited, images = empty(), 0.0, 0
                if at in self.evals and at != total:
                    self.evaluate(state, at)
                early = at in self.evals and at < total and self.exhausted(at)
                if at in self.saves or stopping or early:
                    self.save(state, at)
                if at in self.evals or at in self.saves:
                    self.meter.start()
                if (stopping or early) and at < total:
                    self._early(at) if early else self._stopped(at, stop)
                    batches.close()  # type: ignore[attr-defined]
                    break
        self.gauges.close()
        return state, at

    def _operations(self) -> float:
        recipe, constants = self.recipe, self.session.constants
        batch = step_lib.join(parallel.global_shapes(recipe.sources["train"].batch(0)), constants.arrays)
        return flops.count(lambda s, b: step_lib.step(recipe, s, b), self.session.shapes, batch)

    def _load(self, step: int, count: int) -> dict[str, jax.Array]:
        source, mesh = self.recipe.sources["train"], self.session.mesh
        if count == 1:
            return parallel.to_device(mesh, source.batch(step))
        return parallel.to_device(mesh, stack([source.batch(step + i) for i in range(count)]), axis=1)

    # -- boundaries
    def _log(self, state: TrainState, accumulator: Any, at: int, images: int, waited: float, bar: tqdm) -> None:
        began = time.perf_counter()
        host = read(accumulator)
        lag = time.perf_counter() - began
        bad = step_lib.first_bad(state, host["bad"])
        if bad is not None:
            self._not_finite(at, bad)
        rate, starved = self.meter.lap(images, waited, lag)
        if at == 1:  # that lap was compilation
            self.meter = Meter()
            self.meter.start()
        numbers = metrics_lib.means(host["numbers"])
        numbers |= {name: float(f(jnp.int32(at - 1))) for name, f in self.recipe.schedules.items()}
        if at in self.evals and self.session.terms is not None:
            numbers |= self._term_gradients(state, at)
        fraction = at / self.recipe.total_steps
        warning = self.meter.starving()
        if warning:
            self.options.say(warning)
        self.writer.write(
            "train", at, fraction=fraction, seconds=self.meter.seconds, images_per_second=rate, input_wait=starved,
            metrics=numbers, **self.gauges.read(rate),
        )  # fmt: skip
        bar.set_postfix_str(f"loss {numbers['loss/total']:.4f}, {rate:.0f} images/s", refresh=False)
        self._diagnose(at)

    def _term_gradients(self, state: TrainState, at: int) -> dict[str, float]:
        """Gradient norm of every term on the batch that comes next: at evaluations, where the host waits anyway."""
        batch = self._load(at, 1)
        return {k: float(v) for k, v in read(self.session.terms(state, batch, self.session.constants)).items()}

    def _diagnose(self, at: int) -> None:
        known = {(f["detector"], f["severity"]) for f in self.findings()}
        for finding in self.recipe.diagnose(self.writer.records):
            if (finding["detector"], finding["severity"]) in known:
                continue
            self.writer.write("diagnosis", **{**finding, "step": at})
            text = (
                f"[{finding['severity']}] {finding['detector']} at step {at}: {finding['evidence']} {finding['advice']}"
            )
            tqdm.write(text)
            if self.options.run.on_finding == "stop" and finding["severity"] == "error":
                raise RuntimeError(f"stopped by run.on_finding='stop': {text}")

    def _not_finite(self, at: int, bad: str) -> None:
        last = max(self.checkpoints.steps(), default=None)
        self.checkpoints.wait()
        text = (
            f"{bad} is NaN or infinite. The last finite checkpoint is step {last} in {self.checkpoints.directory}. "
            "Usual causes: the learning rate (config.method.optim.peak_lr), a missing warm-up or clip_norm, or inputs "
            "that hold NaN."
        )
        self.writer.write("diagnosis", at, detector="not_finite", severity="error", evidence=f"{bad} is not finite.",
                          cause="the optimisation diverged or the input holds NaN", advice=text)  # fmt: skip
        raise NotFiniteError(text)

    def evaluate(self, state: TrainState, at: int) -> Any:
        """Run every evaluation on the teacher and write one record."""
        began = time.perf_counter()
        initial = self.evaluated(0) or {}
        probe = probing.make_probe(
            self.recipe, self.session.forward, state, self.session.mesh, initial, self.session.constants
        )
        numbers = probing.run_evaluations(self.recipe, probe)
        record = {"fraction": at / self.recipe.total_steps, "eval_seconds": time.perf_counter() - began}
        self.writer.write("eval", at, **record, metrics=numbers)
        self.offer(state, at)
        self._diagnose(at)
        return probe

    def offer(self, state: TrainState, at: int) -> None:
        """Keep this state where its evaluation, one of the planned ones, is the best so far."""
        numbers = self.evaluated(at)
        if numbers is not None and at in {0, *self.evals}:
            self.checkpoints.offer(at, state, self._record(), numbers)

    def save(self, state: TrainState, at: int) -> None:
        """Begin a checkpoint, never of a non-finite state (at a log step that was just checked)."""
        self.checkpoints.save(at, state, self._record())
        distributed.note(
            f"The checkpoint of step {at} is the last one begun below {self.checkpoints.directory}; complete ones are "
            "intact, and the same command resumes from the newest."
        )

    def _record(self) -> dict[str, Any]:
        record = {"fingerprint": dict(self.options.fingerprint), "images_per_second": self.rate()}
        return json.loads(json.dumps(record))

    def _stopped(self, at: int, stop: StopFlag) -> None:
        self.checkpoints.wait()
        text = f"{stop.name or 'SIGTERM'} at step {at} of {self.recipe.total_steps}: saved; the same command resumes"
        self.writer.write("event", at, event="stop", text=text)
        self.options.say(text)

    def _early(self, at: int) -> None:
        rule = self.recipe.stopping
        assert rule is not None
        text = f"stopped early: {rule.metric} has not risen for {rule.patience} evaluations"
        self.writer.write("event", at, event="early_stop", text=text)
        self.options.say(f"{text} (step {at} of {self.recipe.total_steps})")

    # -- history
    def exhausted(self, at: int) -> bool:
        """Whether the recipe's stopping rule says that the evaluation at this step was the last one needed."""
        rule = self.recipe.stopping
        if rule is None or not self.evaluated(at):
            return False
        records = [r for r in self.writer.records if r["kind"] == "eval" and 0 < r["step"] <= at]
        best, waited = rule.floor, 0
        for record in records:
            value = metrics_lib.flatten(record["metrics"]).get(rule.metric, rule.floor)
            best, waited = (value, 0) if value > best else (best, waited + 1)
        return waited >= rule.patience

    def evaluated(self, at: int) -> dict[str, Any] | None:
        return metrics_lib.evaluated(self.writer.records, at)

    def findings(self) -> list[dict[str, Any]]:
        return [r for r in self.writer.records if r["kind"] == "diagnosis"]

    def rate(self) -> float:
        """Images a second over the training laps of this and, if resumed, of earlier processes."""
        rates = [r["images_per_second"] for r in self.writer.records if r["kind"] == "train" and r["step"] > 1]
        return self.meter.rate or (float(np.median(rates)) if rates else 0.0)


def read(tree: Any) -> Any:
    """The one place where the loop reads device values (a test counts the calls)."""
    return parallel.to_host(tree)
