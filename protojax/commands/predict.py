"""`protojax predict WORKDIR [WORKDIR ...] --data=FILE`: label distributions for the rows of a table."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

HELP = "predict label distributions for a CSV, Parquet or .npz file"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("workdirs", nargs="+", type=Path, help="runs; of several the mean is predicted")
    parser.add_argument("--data", type=Path, required=True, help="a table with the columns of training")
    parser.add_argument("--out", type=Path, default=None, help="CSV file to write (default: DATA.predictions.csv)")
    parser.add_argument(
        "--calibrated", action="store_true", help="divide logits by the temperature fitted on validation"
    )


def run(options: argparse.Namespace) -> int:
    """Write one line a row: probability of every category, the largest one's name, entropy in nats."""
    import numpy as np

    import protojax
    from protojax import loading, running
    from protojax.data.soft_labels import read_features
    from protojax.evals.soft_labels import entropy
    from protojax.predicting import Predict, ensemble

    running.prepare(loading.read_config(options.workdirs[0]))
    models = [protojax.load(workdir) for workdir in options.workdirs]
    other = [str(w) for w, m in zip(options.workdirs, models, strict=True) if not isinstance(m, Predict)]
    if other:
        raise ValueError(f"{', '.join(other)}: not a run of method.workload='soft_labels'; only those predict tables.")
    columns = read_features(options.data)
    probabilities = ensemble(models, columns, calibrated=options.calibrated)
    out = options.out or options.data.with_suffix(".predictions.csv")
    names = models[0].categories
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"p_{name}" for name in names), "largest", "entropy"])
        for row, h in zip(probabilities, entropy(probabilities), strict=True):
            writer.writerow([*(f"{p:.6g}" for p in row), names[int(np.argmax(row))], f"{h:.6g}"])
    print(f"{len(probabilities)} rows: {out}")
    return 0
