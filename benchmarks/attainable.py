"""How many prototypes could be told apart? Unique counts of a run's own features, and of k-means on them.

    python -m benchmarks.attainable runs/quickstart-decoupled runs/quickstart-joint [--out FILE.jsonl]

A codebook that follows the data cannot be more diverse than the data: what a run's prototypes reach stands beside the
unique counts of the features themselves (teacher, one centre view a training image, centred by their mean) and of K
spherical k-means centres on the same features.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from protojax import loading
from protojax.evals.attainable import attainable
from protojax.evals.audit import unique_counts, usage
from protojax.evals.neighbours import unit_rows
from protojax.workloads import images


def measure(workdir: Path, step: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Unique counts of the features, of k-means and of the prototypes; coverage by the last two."""
    encoder = loading.load(workdir, step)
    config = encoder.config
    found = images.records(config, config.data.train_split)
    size = found.size
    features = encoder.encode(found.take(np.arange(size))["image"], output="image")
    rows = unit_rows(features - features.mean(0, keepdims=True))
    prototypes = np.asarray(encoder.prototypes)
    control = attainable(rows, len(prototypes), seed=seed)
    return {
        "run": Path(workdir).name,
        "step": encoder.step,
        "images": size,
        "features": control["features"],
        "kmeans": control["kmeans"]["unique"],
        "prototypes": unique_counts(prototypes),
        "coverage": {"kmeans": control["kmeans"]["coverage"], "prototypes": usage(prototypes, rows).coverage},
    }


def main() -> None:
    """Print a line a run; write them with --out."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("workdirs", nargs="+", type=Path)
    options.add_argument("--out", type=Path, default=None)
    given = options.parse_args()
    found = [measure(workdir) for workdir in given.workdirs]
    for record in found:
        print(json.dumps(record))
    if given.out is not None:
        given.out.write_text("".join(json.dumps(record) + "\n" for record in found))


if __name__ == "__main__":
    main()
