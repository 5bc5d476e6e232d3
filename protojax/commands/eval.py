"""`protojax eval WORKDIR [--data=SOURCE] [--protocol=NAME|FILE]`: the run's own evaluations again, or those of a
protocol, on its own data or on others."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

HELP = "evaluate a checkpoint: as in training, or by a protocol, on any data"
DEFAULT = "standard"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("workdir", type=Path, help="of the run whose checkpoint is evaluated")
    parser.add_argument("--protocol", default=None, help=f"name or .json file (with --data default: {DEFAULT})")
    parser.add_argument("--data", default=None, help="SOURCE, SOURCE:key=value,... or a folder (default: the run's)")
    parser.add_argument("--bank", default=None, help="learn from this source, on the classes of both (transfer)")
    parser.add_argument("--step", default=None, help="checkpoint to load: a step, or best (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--out", type=Path, default=None, help="write the record to this JSON file too")


def run(options: argparse.Namespace) -> int:
    """Print the numbers."""
    import jax

    from protojax import loading, metrics, protocol, running

    step = None if options.step is None else protocol.which(options.step)
    running.prepare(loading.read_config(options.workdir))
    if options.protocol is None and options.data is None and options.bank is None:
        record = metrics.plain(loading.evaluate(options.workdir, step))
        text = json.dumps(record, indent=None if options.json else 1)
    else:
        record = metrics.plain(_by_protocol(options))
        text = json.dumps(record) if options.json else lines(record)
    if jax.process_index() == 0:
        if options.out is not None:
            metrics.write_json(options.out, record)
        print(text)
    return 0


def _by_protocol(options: argparse.Namespace) -> dict[str, Any]:
    from protojax import evaluating, protocol
    from protojax.data.naming import parse_data

    chosen = protocol.load(options.protocol or DEFAULT)
    if options.step is not None:
        chosen = dataclasses.replace(chosen, checkpoint=options.step)
    data = None if options.data is None else parse_data(options.data)
    bank = None if options.bank is None else parse_data(options.bank)
    return evaluating.evaluate(options.workdir, chosen, data, bank)


def lines(record: dict[str, Any]) -> str:
    """One number a line, with the hash of its protocol beside it."""
    from protojax import metrics

    protocol, data = record["protocol"], record["data"]
    head = [
        f"protocol {protocol['name']} {protocol['hash']}, {record['run']['workdir']} at step {record['run']['step']}",
        *(f"{split}: {spec['name']}, {spec['size']} images" for split, spec in data.items()),
    ]
    numbers = []
    for result in record["results"].values():
        flat = metrics.flatten(result["numbers"])
        numbers += [f"{name:52} {value:12.6g}  {result['protocol']}" for name, value in flat.items()]
    left = [f"left out: {name}, {reason}" for name, reason in record["skipped"].items()]
    return "\n".join([*head, *numbers, *left])
