"""A command's work around the loop: prepare the process, build, train, write the summary and the report."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from protojax import __version__, checkpoint, distributed, experiment, metrics, mirror, parallel, summary, train
from protojax import session as session_lib
from protojax import step as step_lib
from protojax.api import Recipe, SourceSpec
from protojax.config import Config, to_plain
from protojax.models.encoder import count_parameters
from protojax.parallel import path_of

RESULT_GROUPS = ("seed", "method", "data", "evals")  # `data.root` is where, not what


def prepare(config: Config) -> None:
    """Process-wide settings: platform, the persistent compilation cache, and the other processes of the run.

    Raises TimeoutError when they do not come, ValueError when they run something else.
    """
    system = config.system
    if system.platform:
        jax.config.update("jax_platforms", system.platform)
    cluster = distributed.detect(system.cluster, system.coordinator, system.processes, system.process)
    distributed.join(cluster, _facts(config), system.join_timeout, system.lost_after)
    if config.system.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.system.compilation_cache))


def build(config: Config) -> Recipe:
    """`experiment.build` for this process and its devices: every size is checked before anything is compiled."""
    prepare(config)
    mesh = parallel.make_mesh(config.system.data, config.system.proto)
    parallel.check_divisible(
        mesh, **{"data.batch_size": config.data.batch_size, "evals.batch_size": config.evals.batch_size}
    )
    recipe = experiment.build(config)
    distributed.agree("the data", {k: _data_facts(s.spec) for k, s in recipe.sources.items()})
    return recipe


def _facts(config: Config) -> dict[str, Any]:
    """What all processes of a run must have in common: versions and the configuration, without where things are."""
    flat = metrics.flat_items(to_plain(config))
    for key in ("data.root", "data.source.packed", "system.process", "system.coordinator", "system.compilation_cache"):
        flat.pop(key, None)
    return json.loads(json.dumps({"protojax": __version__, "jax": jax.__version__, **flat}, default=str))


def _data_facts(spec: SourceSpec) -> dict[str, Any]:
    counts = {k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest()[:16] for k, v in spec.counts.items()}
    return {"name": spec.name, "size": spec.size, "batch": spec.batch_size, "counts": counts}


def fingerprint(config: Config) -> dict[str, Any]:
    """'method.optim.peak_lr' -> value, for the groups that change results: two runs with equal fingerprints are the
    same run."""
    plain = to_plain(config)
    flat = metrics.flat_items({group: plain[group] for group in RESULT_GROUPS})
    for key in ("data.root", "data.source.packed"):  # where, not what
        flat.pop(key, None)
    return json.loads(json.dumps(flat))


def train_config(config: Config, workdir: Path, say: Any = print) -> dict[str, Any]:
    """Build, train (or resume), evaluate, and write config.json, summary.json, report_data.npz and report.html.

    Returns the summary. Raises before anything is compiled where shapes and names already tell.
    """
    checkpoint.check_writable(workdir)
    recipe = build(config)
    with mirror.following(config.run.mirror if jax.process_index() == 0 else None, workdir, say) as copy:
        distributed.barrier("mirror")  # what process 0 fetched is there for all
        return _train(config, recipe, workdir, say, None if copy is None else copy.later)


def _train(config: Config, recipe: Recipe, workdir: Path, say: Any, written: Any) -> dict[str, Any]:
    workload = experiment.workload(config.method.workload)
    known = (config.run, config.system, config.evals.every, fingerprint(config))
    options = session_lib.Options(workdir, *known, wandb=_wandb(config, workdir), say=say, written=written)
    # Not over that of a run which has begun: this configuration may be another one, and is then refused.
    if not checkpoint.steps_below(workdir / checkpoint.NEWEST) and jax.process_index() == 0:
        metrics.write_json(workdir / "config.json", summary.dumps_config(config))
        workload.begun(config, recipe, workdir)
    result = train.run(recipe, options)
    record = summary.summarise(config, result)
    if result.finished and jax.process_index() == 0:
        metrics.write_json(workdir / "config.json", summary.dumps_config(config))
        metrics.write_json(workdir / "summary.json", record)
        if config.run.report:
            from protojax.report import write_report

            if result.probe is not None:
                workload.report_data(config, workdir, result.probe)
            say(f"report: {write_report(workdir)}")
        say(summary.lines(record))
    return record


def run_train(config: Config, workdir: Path) -> int:
    """`train_config` as a command: exit status 0, also when a signal stopped the run cleanly."""
    train_config(config, workdir)
    return 0


def describe(config: Config) -> str:
    """What a dry run prints: the resolved configuration, shapes, parameter counts and memory."""
    recipe = build(config)
    options = session_lib.Options(Path("."), config.run, config.system, config.evals.every, {})
    session = session_lib.make_session(recipe, options)
    spec = recipe.sources["train"].spec
    out = [json.dumps(to_plain(config), indent=1), "", f"devices: {summary.device()}, mesh {dict(session.mesh.shape)}"]
    things = summary.unit(config.method.workload)
    out.append(f"data: {spec.name}, {spec.size} {things}, batch {spec.batch_size}, {recipe.total_steps} steps")
    batch = step_lib.join(recipe.sources["train"].batch(0), recipe.constants)
    inputs = jax.eval_shape(lambda b: recipe.views(jax.random.key(0), b), batch)
    named = [(path_of(p), v) for p, v in jax.tree_util.tree_leaves_with_path(inputs)]
    out += [f"  view {k}: {v.dtype} {list(v.shape)}" for k, v in named if not k.startswith("constants")]
    parts = {
        "encoder": session.shapes.params["encoder"],
        "head": session.shapes.params["head"],
        "teacher": session.shapes.teacher,
        "optimiser": session.shapes.opt,
        "estimator": session.shapes.estimator,
        "constants": session.constants.arrays,
    }
    for name, tree in parts.items():
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        out.append(f"{name}: {count_parameters(tree):,} numbers, {size / 2**20:.1f} MiB")
    out.append(_memory(session))
    return "\n".join(out)


def _memory(session: session_lib.Session) -> str:
    """The compiled step's own account of memory, a device."""
    example = session.recipe.sources["train"].batch(0)
    accumulator = jax.eval_shape(lambda: step_lib.empty_accumulator(session.numbers))
    lowered = session.one.lower(session.shapes, accumulator, example, session.constants)
    analysis = lowered.compile().memory_analysis()
    mib = 2**20
    return (
        f"one step, each device: arguments {analysis.argument_size_in_bytes / mib:.1f} MiB (of them donated "
        f"{analysis.alias_size_in_bytes / mib:.1f}), temporaries {analysis.temp_size_in_bytes / mib:.1f} MiB"
    )


def _wandb(config: Config, workdir: Path) -> Any:
    if not config.run.wandb or jax.process_index() != 0:
        return None
    try:
        import wandb
    except ImportError:
        raise ValueError("config.run.wandb is True but wandb is not installed: pip install 'protojax[wandb]'") from None
    return wandb.init(project="protojax", name=f"{config.name}-{config.arm}-{config.seed}", dir=str(workdir),
                      config=to_plain(config), resume="allow")  # fmt: skip
