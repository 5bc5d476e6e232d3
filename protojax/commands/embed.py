"""Features of images, for other programs: by the network of a run, or by pretrained towers.

`protojax embed WORKDIR --data=FOLDER|SOURCE --out=features.npz|.parquet`
`protojax embed --weights=FOLDER --data=FOLDER|TABLE|SOURCE --out=cache.npz` (CLIP or SigLIP: a cache for mixtures of
prompts)
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write features of a folder or source, by a run or by pretrained towers"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("workdir", type=Path, nargs="?", help="of the run whose checkpoint is used")
    parser.add_argument("--data", default=None, help="SOURCE, SOURCE:key=value,... or a folder (default: the run's)")
    parser.add_argument("--out", type=Path, required=True, help="features.npz or features.parquet")
    run = parser.add_argument_group("by a run")
    run.add_argument("--split", default=None, help="default: all of a folder, else the training split")
    run.add_argument("--protocol", default="standard", help="resize, crop and checkpoint are taken from it")
    run.add_argument("--step", default=None, help="checkpoint to load: a step, or best (default: the protocol's)")
    run.add_argument("--width", type=int, default=None, help="of an alignment run: a trained prefix")
    towers = parser.add_argument_group("by pretrained towers")
    towers.add_argument("--weights", type=Path, default=None, help="folder of CLIP or SigLIP: config.json, safetensors")
    towers.add_argument("--templates", default="photo", help="installed set, file, or none (default: photo)")
    towers.add_argument("--classes", type=Path, default=None, help="file of fields of classes, for templates")
    towers.add_argument("--label", default="fine", help="which label (default: fine)")
    towers.add_argument("--splits", default="", help="those to read, as train,test (default: all of a folder)")
    towers.add_argument("--test-share", type=float, default=0.0, help="of data in one piece: held out as test")
    towers.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of activations")
    towers.add_argument("--batch-size", type=int, default=64, help="images at once (default: 64)")
    towers.add_argument("--tokens", action="store_true", help="patch tokens and text states, for alignment")
    towers.add_argument("--drop-empty-classes", action="store_true", help="leave out classes without training image")
    towers.add_argument("--overwrite", action="store_true", help="replace a file that something else made")


def run(options: argparse.Namespace) -> int:
    """Write the file, print what is in it. Raises ValueError unless one of WORKDIR and --weights is given."""
    if (options.workdir is None) == (options.weights is None):
        given = "neither" if options.workdir is None else "both"
        raise ValueError(f"expected WORKDIR (a run) or --weights=FOLDER (pretrained towers), got {given}")
    return _by_run(options) if options.weights is None else _by_towers(options)


def _by_towers(options: argparse.Namespace) -> int:
    from protojax.towers.bank import embed

    if options.data is None:
        raise ValueError("--weights needs --data: a folder, a table (path, label) or a source")
    splits = tuple(part.strip() for part in options.splits.split(",") if part.strip())
    keys = ("label", "test_share", "templates", "classes", "dtype", "batch_size", "tokens", "overwrite",
            "drop_empty_classes")  # fmt: skip
    chosen = {key: getattr(options, key) for key in keys}
    print(embed(options.weights, options.out, data=options.data, splits=splits, **chosen))
    return 0


def _by_run(options: argparse.Namespace) -> int:
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
        chosen = dataclasses.replace(chosen, checkpoint=options.step)
    data = None if options.data is None else parse_data(options.data)
    split = options.split or (None if data is None else default_split(data))
    bank, spec, step = evaluating.features(options.workdir, chosen, data, split)
    if jax.process_index() == 0:
        about = {"workdir": str(options.workdir), "step": step, "source": spec.name, "protocol": chosen.record()}
        feature_files.write(options.out, bank, spec, about)
        shapes = f"backbone {list(bank.backbone.shape)}, image {list(bank.image.shape)}"
        print(f"{options.out}: {spec.name}, {shapes}, labels {sorted(bank.labels) or 'none'}, protocol {chosen.hash}")
    return 0
