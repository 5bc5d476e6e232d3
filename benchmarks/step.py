"""The whole training step: arms against one another and against compiled PyTorch; share of every phase; MFU.

    python -m benchmarks.step          # CPU sizes; `--full`: ResNet-50, ViT-S/16, ViT-B/16 at 224 px on a GPU

PyTorch runs the same network, CARP loss, EMA teacher and optimiser in the same call, channels-last and bfloat16 on a
GPU, and is *given* its views: ours makes them inside the step. The decoupled arm here is the plain mixture; `balanced`
is a row of its own, swept at every step and by turnover of its memory (`every=0`; a round trains as many steps as lie
between two sweeps).
"""

from __future__ import annotations

import functools
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.torch_nets import make_network, torch_step
from protojax import configs_path, experiment, flops, parallel
from protojax import session as session_lib
from protojax import step as step_lib
from protojax.config import component, freeze
from protojax.estimators.balanced import MEMORY, turnover
from protojax.running import fingerprint

ARMS = {"decoupled": "mixture", "balanced": "balanced", "joint": "joint"}


def sizes(options: Any) -> list[dict[str, Any]]:
    if options.tiny:
        return [{"net": "vit_ti", "image": 32, "local": 0, "batch": 16, "K": 512, "patch": 16}]
    if options.full:
        nets = [("resnet50", None), ("vit_s", 16), ("vit_b", 16)]
        return [
            {"net": net, "image": 224, "local": local, "batch": 256, "K": 65_536, "patch": patch}
            for net, patch in nets
            for local in (0, 6)
        ]
    return [
        {"net": "vit_ti", "image": 64, "local": 0, "batch": 32, "K": 4096, "patch": 16},
        {"net": "resnet18", "image": 64, "local": 0, "batch": 16, "K": 4096, "patch": None},
    ]


def config(arm: str, size: dict[str, Any], every: int | None = None) -> Any:
    """configs/inat.py with this network, batch and image size on synthetic images; `every`: of the estimator."""
    c = runpy.run_path(str(configs_path.find("inat")))["get_config"](arm)
    with c.unlocked():
        c.data.source = component("synthetic", classes=4, size=2 * size["batch"], side=size["image"])
        c.data.train_split, c.data.test_split = "train", "test"
        c.data.batch_size, c.evals.batch_size = size["batch"], size["batch"]
        patch = {} if size["patch"] is None else {"patch_size": size["patch"], "image_size": size["image"]}
        c.method.backbone = component(size["net"], **patch)
        c.method.views = component("carp", global_size=size["image"], local_count=size["local"])
        c.method.optim = component("adamw", peak_lr=1e-4)
        c.method.estimator.components = size["K"]
        if every is not None:
            c.method.estimator.every = every
        c.method.dtype = "float32" if common.policy() is None else "bfloat16"
        c.method.epochs, c.method.steps = None, 10_000
        c.evals.evaluations = ("rank",)
    return freeze(experiment.fill(c))


class Stepper:
    """One arm: its state, and a call that trains it on a batch, `steps` times."""

    def __init__(self, arm: str, size: dict[str, Any], every: int | None = None, steps: int = 1):
        made, self.steps = config(arm, size, every), steps
        self.recipe = experiment.build(made)
        options = session_lib.Options(configs_path.find("inat").parent, made.run, made.system, 1.0, fingerprint(made))
        self.session = session_lib.make_session(self.recipe, options)
        self.state = session_lib.initial_state(self.session)
        self.empty = jax.jit(lambda: step_lib.empty_accumulator(self.session.numbers))
        self.accumulator = self.empty()
        self.batches = [parallel.to_device(self.session.mesh, self.recipe.sources["train"].batch(i)) for i in range(2)]

    def __call__(self, batch: Any) -> Any:
        for _ in range(self.steps):
            self.state, self.accumulator = self.session.one(
                self.state, self.accumulator, batch, self.session.constants
            )  # fmt: skip
        return self.state.step

    @functools.cached_property
    def compiled(self) -> Any:
        return self.session.one.lower(self.state, self.accumulator, self.batches[0], self.session.constants).compile()

    def memory(self) -> dict[str, float]:
        """What the step holds: its arguments (state, optimiser, batch; outputs take their place), and temporaries."""
        memory = self.compiled.memory_analysis()
        held, extra = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        return {"state and batch MB": held / 1e6, "extra MB": extra / 1e6, "both MB": (held + extra) / 1e6}

    def contender(self, name: str) -> common.Contender:
        extra = int(self.compiled.memory_analysis().temp_size_in_bytes)
        return common.Contender(name, self, [(b,) for b in self.batches], extra_bytes=extra, steps=self.steps)

    def operations(self) -> tuple[float, float | None]:
        """(our count, the compiled program's own count) of one step."""
        batch = step_lib.join(self.batches[0], self.session.constants.arrays)
        ours = flops.count(lambda s, b: step_lib.step(self.recipe, s, b), self.session.shapes, batch)
        found = self.compiled.cost_analysis() or {}
        return ours, found.get("flops")

    def phases(self) -> list[common.Contender]:
        """The step's parts on their own, compiled separately: views, prototypes (E- and M-step), loss and gradient."""
        recipe, state, batch = self.recipe, self.state, self.batches[0]
        key = jax.random.key(0)
        inputs = jax.jit(recipe.views)(key, batch)
        _, variables, head = step_lib.observer(recipe, state)
        embeddings, _ = jax.jit(lambda v, x: recipe.teacher.apply(v, x, True, None))(
            variables, recipe.teacher_views(inputs)
        )
        student, _ = jax.jit(lambda v, x: recipe.encoder.apply(v, x, True, None))(variables, inputs)
        rows = recipe.rows(embeddings, batch, head)
        # Copies: the step donates its state.
        held, params = jax.tree.map(jnp.copy, (state, state.params))

        def prototypes(state: Any, rows: Any) -> Any:
            statistics = recipe.estimator.statistics(state.estimator, rows)
            return recipe.estimator.update(state.estimator, statistics, rows, state.step, key)

        def loss(params: Any, state: Any, student: Any) -> Any:
            data = {"batch": batch, "teacher": embeddings, "inputs": inputs}
            given = step_lib.scored_inputs(recipe, params, state, state.estimator, data, student)
            return recipe.objective.loss(params["head"]["objective"], given)[0]

        return [
            common.contender("views alone", recipe.views, [(key, batch)]),
            common.contender("prototypes alone", prototypes, [(held, rows)]),
            common.contender("loss and gradient alone", jax.grad(loss, argnums=2), [(params, held, student)]),
        ]


def main() -> None:
    options = common.parser(__doc__).parse_args()
    report = common.Report("step", options)
    torch = common.torch_or_none(options)
    for size in sizes(options):
        arms = {name: Stepper(arm, size) for name, arm in ARMS.items()}
        between = turnover(MEMORY * size["K"], 2 * size["batch"])  # two views an image
        arms |= {"balanced, every=0": Stepper("balanced", size, 0, between)}
        contenders = [stepper.contender(name) for name, stepper in arms.items()]
        if torch is not None:
            network = make_network(torch, size["net"], size["image"], size["patch"])
            contenders.append(torch_step(torch, network, size))
        ours, compiled = arms["decoupled"].operations()
        columns = {k: v for k, v in size.items() if k != "patch"}
        report.compare("step", [*contenders, *arms["decoupled"].phases()], flops=ours, **columns)
        for name, stepper in arms.items():
            report.add(case="memory", what=name, **columns, **stepper.memory())
        steps = [r for r in report.records if r["case"] == "step" and r["net"] == size["net"]]
        row = next(r for r in steps if r["what"] == "decoupled")
        seconds = row["ms"] / 1e3
        peak = flops.peak(jax.devices()[0])
        report.add(
            case="rates", **columns, images_per_second=size["batch"] / seconds, GFLOP=ours / 1e9,
            compiled_over_ours=None if compiled is None else compiled / ours,
            mfu=None if peak is None else ours / seconds / peak / jax.device_count(),
            loss=float(np.asarray(arms["decoupled"].accumulator["numbers"]["loss/total"][0])),
        )  # fmt: skip
    report.table()


if __name__ == "__main__":
    main()
