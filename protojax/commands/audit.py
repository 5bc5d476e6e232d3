"""`protojax audit FILE`: are the prototypes of anybody's checkpoint distinct, and does each get work?"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

HELP = "count unique, duplicate and dead prototypes in a checkpoint of any project"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("file", type=Path, help=".npy, .npz, .safetensors, .pth, .pt, an Orbax folder, or a workdir")
    parser.add_argument("--key", default=None, help="the tensor, where it is not found by itself")
    parser.add_argument("--features", type=Path, default=None, help="features [rows, D] (.npy, .npz, ...) for usage")
    parser.add_argument("--json", action="store_true", help="print one JSON object alone (docs/audit.md)")
    parser.add_argument("--out", type=Path, default=None, help="also write a page with plots (HTML)")


def run(options: argparse.Namespace) -> int:
    """Print the audit. Exit status 2 where the prototypes cannot be found or read."""
    from protojax.audit import measure
    from protojax.audit.layers import AmbiguousError

    try:
        result, arrays = measure.audit_file(options.file, options.key, options.features)
    except AmbiguousError as error:
        print(f"protojax: error: {options.file}: {error}. Choose one:", file=sys.stderr)
        for candidate in error.candidates:
            about = f"  # {list(candidate.shape)} {candidate.dtype} {candidate.layout}".rstrip()
            key = shlex.quote(f"--key={candidate.name}")
            print(f"  protojax audit {shlex.quote(str(options.file))} {key}{about}", file=sys.stderr)
        return 2
    if options.out is not None:
        from protojax.audit.page import write_page

        write_page(options.out, result, arrays)
    if options.json:
        print(json.dumps(result, allow_nan=False))
        return 0
    print(f"{result['file']}: {result['prototypes']:,} prototypes in {result['dim']} dimensions")
    print(f"  {result['format']}, {result['key']} ({result['layout']}), {result['dtype']}"
          + (", weight norm resolved" if result["weight_norm"] else ""))  # fmt: skip
    for question, _, said in measure.sentences(result):
        print(f"\n{question}")
        print("\n".join(f"  {sentence}" for sentence in said))
    if options.out is not None:
        print(f"\n{options.out}")
    return 0
