"""What the studies of prototypes share: data sets, trials by arm, and the rows of their tables.

All of them train configs/prototypes.py, and those on one data set keep their runs in one folder, so that the decoupled
default of one study is not trained again for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from protojax import arms, configs_path
from protojax.arms import NETWORKS
from protojax.evals.audit import EPSILONS
from protojax.reporting.records import as_number, dig
from protojax.study import Row, Trial

# What a table calls the data, and where they come from: sizes are those of configs/prototypes.py.
DATA: Mapping[str, str] = {
    "grocery": "Grocery Store photographs (embedded): 2,936 training and 2,485 test images, 81 classes; K = 512",
    "omniglot": "Omniglot, 659 characters, 15 of 20 drawings of each for training (9,885), 5 for testing; K = 2,048",
    "fashion": "Fashion-MNIST, 60,000 training and 10,000 test images, 10 classes; K = 4,096",
    "tiny_mini": "Tiny ImageNet at 32 px, 20 classes, 2,000 training and 1,000 test images; K = 512",
    "tiny": "Tiny ImageNet at 32 px, 200 classes, 100,000 training and 10,000 test images; K = 16,384",
}
SEEDS = (0, 1, 2)
# Of a smoke version: the network that compiles in seconds, and no files that nobody reads.
SMALLEST: dict[str, Any] = {
    "system.compilation_cache": "",
    **{"method.backbone.widths": (4, 8, 8), "method.head.hidden": 16, "method.head.dim": 8},
    **{"method.views.global_size": 16, "run.report": False, "run.tensorboard": False},
}
K_NEAREST = 20


class Asked(NamedTuple):
    """What stands behind the colon of a study: DATA[,NETWORK][,STEPS], or smoke. steps: None for those of the data
    (and of the smoke version)."""

    data: str
    network: str
    smoke: bool
    steps: int | None = None

    @property
    def runs(self) -> str:
        """The folder that all studies of this data set, network and length share."""
        parts = ("" if self.network == "micro" else self.network, "" if self.steps is None else str(self.steps))
        return "_".join(("prototypes", self.data, *filter(None, parts)))

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS[:1] if self.smoke else SEEDS

    @property
    def about(self) -> str:
        length = "" if self.steps is None else f"; {self.steps} steps"
        return DATA[self.data] + ("" if self.network == "micro" else f"; {self.network}") + length

    @property
    def nearest(self) -> str:
        """k of the k-NN that is reported."""
        return "5" if self.smoke else str(K_NEAREST)

    @property
    def config(self) -> ConfigDict:
        """The decoupled default on these data: what changes are made against."""
        c = configs_path.load(self.trial("").config)
        c.unlock()
        c.method.steps = self.steps or c.method.steps
        return c

    def trial(self, label: str, arm: str = "decoupled", changes: Mapping[str, Any] | None = None) -> Trial:
        """arm: as behind the colon of configs/prototypes.py, further flags included ('joint,ibot')."""
        flags = ("smoke",) if self.smoke else (self.data, self.network)
        common: dict[str, Any] = {}
        if self.smoke:
            common = {k: v for k, v in SMALLEST.items() if "ibot" not in arm or "widths" not in k}
        if self.steps is not None:
            common = {"method.steps": self.steps}
        return Trial(label, "prototypes:" + ",".join((arm, *flags)), {**common, **(changes or {})})

    def at_batch(self, label: str, arm: str, size: int) -> Trial:
        """The arm at another batch size, as many images seen (`arms.at_batch`)."""
        c = self.config
        arms.at_batch(c, size)
        method = c.method
        changed = {"method.optim.peak_lr": method.optim.peak_lr, "method.teacher.start": method.teacher.start}
        return self.trial(label, arm, {"data.batch_size": size, "method.steps": method.steps, **changed})

    def arms(self, names: Iterable[str]) -> tuple[Trial, ...]:
        """A trial an arm; the smoke version takes the first."""
        chosen = list(names)[: 1 if self.smoke else None]
        return tuple(self.trial(name, name) for name in chosen)


def asked(argument: str, smoke: bool) -> Asked:
    """Of 'omniglot', 'tiny,resnet18', 'grocery,350', ... Raises ValueError for a data set or network that is none, for
    a second one, and for a number of steps that is not positive."""
    names = [part.strip() for part in argument.split(",") if part.strip()]
    data, networks = [n for n in names if n in DATA], [n for n in names if n in NETWORKS]
    steps = [int(n) for n in names if n.isdecimal()]
    given = len(data) + len(networks) + len(steps)
    if len(data) != 1 or len(networks) > 1 or len(steps) > 1 or 0 in steps or len(names) > given:
        raise ValueError(
            f"a study is of DATA[,NETWORK][,STEPS], DATA one of {[*DATA]}, NETWORK of {[*NETWORKS]}, STEPS a number of "
            f"steps if not the usual one; got {names}."
        )
    return Asked(data[0], networks[0] if networks else "micro", smoke, steps[0] if steps and not smoke else None)


# ---------------------------------------------------------------------------------------------------------- rows
def share(path: str, whole: str = "prototypes/count") -> Callable[[Mapping[str, Any]], float | None]:
    """The number at a path of the summary as a share of another one."""

    def value(summary: Mapping[str, Any]) -> float | None:
        part, total = (as_number(dig(summary, *p.split("/"))) for p in (path, whole))
        return None if part is None or not total else part / total

    return value


def k_nn(nearest: str, label: str = "fine") -> tuple[Row, ...]:
    """Accuracy of the trained and of the untrained encoder."""
    return (
        Row("k-NN, %", f"knn/{label}/{nearest}", 100),
        Row("k-NN untrained, %", f"controls/untrained_knn/{label}/{nearest}", 100),
    )


# Shares of K, in percent; the headline first. Dead prototypes are unique for ever: 'unique' never stands alone.
ALIVE = (
    Row("live, % of K", share("prototypes/live"), 100),
    *(Row(f"live-unique at {e:g}, % of K", share(f"prototypes/live_unique/{e:g}"), 100) for e in EPSILONS),
)
UNIQUE = tuple(Row(f"unique at {e:g}, % of K", share(f"prototypes/unique/{e:g}"), 100) for e in EPSILONS)
START = (
    Row("live-unique at 0.025 at the start, % of K", share("controls/initial_live_unique/0.025"), 100),
    Row("unique at 0.5 at the start, % of K", share("controls/initial_unique/0.5"), 100),
    Row("random directions unique at 0.5, % of K", share("controls/random_unique/0.5"), 100),
)
USE = (
    Row("usage perplexity, % of K", share("prototypes/perplexity"), 100),
    Row("coverage", "prototypes/coverage", digits=3),
    Row("effective rank", "effective_rank"),
)
TAIL = tuple(Row(f"k-NN {g}, %", f"groups/fine/{g}", 100) for g in ("head", "medium", "tail"))
CURVES = {
    "live, of K": "prototypes/live",
    "live-unique at 0.025": "prototypes/live_unique/0.025",
    "unique at 0.5": "prototypes/unique/0.5",
}
