"""`protojax teach WORKDIR --out=teacher.npz`: images with the label distributions that a trained encoder believes."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write images with a trained encoder's label distributions, for soft labels"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("workdir", type=Path, help="of the run whose checkpoint is the teacher")
    parser.add_argument("--data", default=None, help="SOURCE, SOURCE:key=value,... or a folder (default: the run's)")
    parser.add_argument("--protocol", default="standard", help="resize, crop and checkpoint are taken from it")
    parser.add_argument("--label", default="fine", help="which labels vote")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote")
    parser.add_argument("--temperature", type=float, default=0.07, help="of a vote, exp(cos / T)")
    parser.add_argument("--out", type=Path, required=True, help="teacher.npz")


def run(options: argparse.Namespace) -> int:
    """Write the file, print what is in it and how to train on it."""
    from protojax import feature_files, loading, protocol, running, teaching
    from protojax.data.naming import parse_data

    feature_files.check_target(options.out, (".npz",))
    running.prepare(loading.read_config(options.workdir))
    data = None if options.data is None else parse_data(options.data)
    found = teaching.arrays(
        options.workdir,
        protocol.load(options.protocol),
        data,
        label=options.label,
        k=options.k,
        temperature=options.temperature,
    )
    print(teaching.write(options.out, found))
    print("Train on the images or on the teacher's features:")
    for config in ("soft_labels_images", "soft_labels_table"):
        print(f"  protojax train --config={config} --config.data.root={options.out}")
    return 0
