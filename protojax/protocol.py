"""Protocols: what is measured, in a small file, so that two numbers can be told to be comparable.

A protocol is a JSON file: splits, resize, labels, k, temperature, seed, checkpoint, and the evaluations with their
options. What a file leaves out has a default, and the *hash* is that of the protocol with every default filled in: the
first 12 hexadecimal digits of the SHA-256 of its canonical JSON (sorted keys, no spaces, without the name). It stands
beside every number. Two numbers of one hash, on the same data, were measured in the same way. docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from protojax.checkpoint import BEST
from protojax.config import Component, Config, from_plain, suggest
from protojax.data.longtail import GroupRule
from protojax.evals import table
from protojax.evals.knn import DEFAULT_KS

VERSION = 1  # of the definitions: rises when a number changes although no option does
LAST = "last"
TRAINING = "training:"  # before a rule for groups
_FILES = importlib.resources.files("protojax") / "protocols"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One way to measure.

    bank_split, test_split: what is learned from and what is scored; None: the splits of the run's configuration, or of
    the data that are named on the command line. resize: side of the image that the network sees, in pixels (None: that
    of the global views in training); crop: side of the central square over the shorter side of the image. labels: label
    keys (None: all that both splits have). groups: rule for head, medium and tail. k, temperature: of k-NN. seed: of
    whatever is drawn. checkpoint: 'last', a step, or 'best': what the run's own `run.best` chose. evaluations:
    name -> options (`evals.table`).
    """

    name: str = "protocol"
    bank_split: str | None = None
    test_split: str | None = None
    resize: int | None = None
    crop: float = 1.0
    labels: tuple[str, ...] | None = None
    groups: str = "inat"
    k: tuple[int, ...] = DEFAULT_KS
    temperature: float = 0.07
    seed: int = 0
    checkpoint: str = LAST
    evaluations: Mapping[str, Component] = dataclasses.field(
        default_factory=lambda: {name: Component(name) for name in ("knn", "prototypes", "rank")}
    )

    @property
    def chosen(self) -> dict[str, dict[str, Any]]:
        """Evaluation -> all of its options, as `table.make_evaluations` takes them."""
        return {name: table.resolved(name, part.options) for name, part in self.evaluations.items()}

    @property
    def step(self) -> int | str | None:
        """The checkpoint as `loading` calls it: a step, 'best', or None: the last."""
        return which(self.checkpoint)

    def canonical(self) -> dict[str, Any]:
        """Everything that can change a number, defaults filled in, as JSON types."""
        plain = to_plain_fields(self)
        plain.pop("name")
        plain["evaluations"] = {
            name: {k: _like(v, table.resolved(name, {})[k]) for k, v in options.items()}
            for name, options in self.chosen.items()
        }
        return {"version": VERSION, **plain}

    @property
    def hash(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the canonical JSON."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def record(self) -> dict[str, Any]:
        """What is written beside numbers: name, hash and the whole protocol."""
        return {"name": self.name, "hash": self.hash, **self.canonical()}


def _names_checkpoint(text: str) -> bool:
    return text in (LAST, BEST) or text.isdigit()


def which(checkpoint: str) -> int | str | None:
    """What `loading` calls a checkpoint: a step, 'best', or None for 'last'. Raises ValueError for another text."""
    if not _names_checkpoint(checkpoint):
        raise ValueError(f"checkpoint: expected 'last', 'best' or a step, got {checkpoint!r}.")
    return int(checkpoint) if checkpoint.isdigit() else None if checkpoint == LAST else BEST


def to_plain_fields(protocol: Protocol) -> dict[str, Any]:
    """The fields as JSON types, evaluations left out."""
    names = [f.name for f in dataclasses.fields(Protocol) if f.name != "evaluations"]
    values = {name: getattr(protocol, name) for name in names}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _like(value: Any, default: Any) -> Any:
    """`value` as JSON, numbers in the kind of the default's: 1 and 1.0 are one option."""
    if isinstance(value, list | tuple):
        kind = default[0] if isinstance(default, list | tuple) and len(default) else None
        return [_like(v, kind) for v in value]
    return float(value) if isinstance(default, float) and isinstance(value, int) else value


def built_in() -> list[str]:
    """Names of the protocols that are installed with the package."""
    return sorted(f.name.removesuffix(".json") for f in _FILES.iterdir() if f.name.endswith(".json"))


def load(name: str | Path) -> Protocol:
    """The protocol of a name (`built_in()`) or of a JSON file.

    Raises FileNotFoundError for a missing file, ValueError for an unknown name, a file that is no JSON object, an
    unknown key, evaluation or option (with the nearest known one) or a value out of range, TypeError for a value of
    another type.
    """
    text = str(name)
    if text in built_in():
        content, default = (_FILES / f"{text}.json").read_text(), text
    elif text.endswith(".json") or "/" in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no such protocol file: {path}.")
        content, default = path.read_text(), path.stem
    else:
        known = built_in()
        raise ValueError(
            f"unknown protocol {text!r}{suggest(text, known)}. Known: {', '.join(known)}; or give the path of a .json "
            "file."
        )
    try:
        plain = json.loads(content)
    except ValueError as error:
        raise ValueError(f"protocol {text}: not readable as JSON ({error}).") from None
    if not isinstance(plain, dict):
        raise ValueError(f"protocol {text}: expected a JSON object with keys such as 'k', got {type(plain).__name__}.")
    return make({"name": default, **plain})


def make(plain: Mapping[str, Any]) -> Protocol:
    """A checked protocol of plain values. Raises as `load`."""
    checkpoint = plain.get("checkpoint")
    whole = isinstance(checkpoint, int) and not isinstance(checkpoint, bool)
    plain = {**plain, "checkpoint": str(checkpoint)} if whole else plain
    found: Protocol = from_plain(Protocol, plain, "protocol")
    _validate(found)
    return dataclasses.replace(found, evaluations=types.MappingProxyType(dict(found.evaluations)))


def of_training(config: Config) -> Protocol:
    """What a run measures while it trains, by its `evals` group: the protocol of the numbers in summary.json."""
    evals, data = config.evals, config.data
    return make({
        "name": "training", "bank_split": data.train_split, "test_split": data.test_split, "labels": evals.labels,
        "groups": evals.groups, "k": evals.knn_k, "temperature": evals.knn_temperature, "seed": config.seed,
        "evaluations": {name: {} for name in evals.evaluations},
    })  # fmt: skip


def _validate(protocol: Protocol) -> None:
    def require(ok: bool, key: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"protocol.{key}: expected {expected}, got {getattr(protocol, key)!r}.")

    require(protocol.resize is None or protocol.resize > 0, "resize", "null or a number of pixels > 0")
    require(0.0 < protocol.crop <= 1.0, "crop", "a fraction in (0, 1]")
    rules = [*get_args(GroupRule), *(TRAINING + rule for rule in get_args(GroupRule))]
    require(protocol.groups in rules, "groups", f"one of {', '.join(map(repr, rules))}")
    require(bool(protocol.k) and min(protocol.k) > 0, "k", "positive numbers of neighbours")
    require(protocol.temperature > 0, "temperature", "a positive number")
    require(protocol.seed >= 0, "seed", "a number >= 0")
    require(_names_checkpoint(protocol.checkpoint), "checkpoint", "'last', 'best' or a step")
    for name, part in protocol.evaluations.items():
        if part.name != name:
            raise ValueError(f"protocol.evaluations.{name}: an evaluation is chosen by its key; remove the name.")
        table.resolved(name, part.options)
