"""`protojax embed WORKDIR --data=FOLDER|SOURCE --out=features.npz|.parquet`: features of images, for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write features of a folder or source as .npz or .parquet"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("workdir", type=Path, help="of the run whose checkpoint is used")
    parser.add_argument("--data", default=None, help="SOURCE, SOURCE:key=value,... or a folder (default: the run's)")
    parser.add_argument("--split", default=None, help="default: all of a folder, else the training split")
    parser.add_argument("--protocol", default="standard", help="resize, crop and checkpoint are taken from it")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to load (default: the protocol's)")
    parser.add_argument("--width", type=int, default=None, help="of an alignment run: a trained prefix")
    parser.add_argument("--out", type=Path, required=True, help="features.npz or features.parquet")


def run(options: argparse.Namespace) -> int:
    """Write the file, print what is in it."""
    import dataclasses

    import jax

    from protojax import evaluating, feature_files, loading, protocol, running
    from protojax.data.naming import default_split, parse_data

    feature_files.check_target(options.out)
    if loading.read_config(options.workdir).method.workload == "alignment":
        from protojax.workloads.alignment_loading import embed

        print(embed(options.workdir, options.out, data=options.data, split=options.split, width=options.width))
        return 0
    running.prepare(loading.read_config(options.workdir))
    chosen = protocol.load(options.protocol)
    if options.step is not None:
        chosen = dataclasses.replace(chosen, checkpoint=str(options.step))
    data = None if options.data is None else parse_data(options.data)
    split = options.split or (None if data is None else default_split(data))
    bank, spec, step = evaluating.features(options.workdir, chosen, data, split)
    if jax.process_index() == 0:
        about = {"workdir": str(options.workdir), "step": step, "source": spec.name, "protocol": chosen.record()}
        feature_files.write(options.out, bank, spec, about)
        shapes = f"backbone {list(bank.backbone.shape)}, image {list(bank.image.shape)}"
        print(f"{options.out}: {spec.name}, {shapes}, labels {sorted(bank.labels) or 'none'}, protocol {chosen.hash}")
    return 0
