"""What a study measures on finished runs, beside what the runs measured while they trained.

A measure is `name` and `take(workdir, folder) -> plain numbers`; it looks at the last checkpoint. The result lies in
WORKDIR/measured/NAME.json, is taken once, and is found by rows of a study as 'measured/NAME/...'.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protojax import configs_path, metrics
from protojax.config import Config, freeze

FOLDER = "measured"


@dataclass(frozen=True)
class Evaluated:
    """The evaluations of a protocol (`plain`: its keys, docs/evaluation.md), all in one record.

    data: a config FILE[:ARGUMENT] whose data group is looked at in the place of the run's own: transfer of the encoder
    to another data set, whose training split is learned from. bank: another one's, whose training split is learned
    from, while the run's own test split (or that of `data`) is scored, on the classes that both name."""

    name: str
    plain: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    bank: str | None = None

    def take(self, workdir: Path, folder: Path | None) -> dict[str, Any]:
        """{'protocol': its hash, 'data': {split: size}, and the keys of the evaluations: 'knn', 'linear', ...}."""
        from protojax import evaluating, protocol

        data, bank = (
            None if name is None else placed(freeze(configs_path.load(name)), folder).data
            for name in (self.data, self.bank)
        )
        record = evaluating.evaluate(workdir, protocol.make({"name": self.name, **self.plain}), data, bank)
        numbers: dict[str, Any] = {"protocol": record["protocol"]["hash"]}
        numbers["data"] = {split: found["size"] for split, found in record["data"].items()}
        for result in record["results"].values():
            numbers |= result["numbers"]
        return numbers


@dataclass(frozen=True)
class Overhead:
    """What the estimator costs: `overhead.measure` of the run's configuration, on this machine, from its first step."""

    name: str = "overhead"
    rounds: int = 5

    def take(self, workdir: Path, folder: Path | None) -> dict[str, Any]:
        """Times, memory and shares; `folder` is not needed."""
        from protojax import loading, overhead

        return overhead.measure(loading.read_config(workdir), self.rounds)


Measure = Evaluated | Overhead


def placed(config: Config, folder: Path | None) -> Config:
    """The configuration with a relative `data.root` taken from `folder` (None: from the current directory)."""
    root = config.data.root
    if root is None or folder is None or Path(root).expanduser().is_absolute():
        return config
    place = str(folder.expanduser().absolute() / root)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=place))


def path(workdir: Path, measure: Measure) -> Path:
    """Where a measure's numbers are."""
    return workdir / FOLDER / f"{measure.name}.json"


def missing(workdir: Path, measures: Sequence[Measure]) -> list[Measure]:
    """Those that have not been taken."""
    return [measure for measure in measures if not path(workdir, measure).exists()]


def take(workdir: Path, measures: Sequence[Measure], folder: Path | None) -> None:
    """Take what is missing."""
    for measure in missing(workdir, measures):
        where = path(workdir, measure)
        where.parent.mkdir(exist_ok=True)
        metrics.write_json(where, metrics.plain(measure.take(workdir, folder)))


def found(workdir: Path, measures: Sequence[Measure]) -> dict[str, Any]:
    """name -> numbers, of those that have been taken."""
    paths = {measure.name: path(workdir, measure) for measure in measures}
    return {name: json.loads(where.read_text()) for name, where in paths.items() if where.exists()}
