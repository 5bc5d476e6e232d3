"""Checkpoint folders of Orbax: runs of protojax through `loading`, others as plain trees of arrays.

One leaf is read at a time. This file and `checkpoint.py` are the only ones that know Orbax.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from protojax.audit.tensors import FileError, Tensor, TensorFile, check_size, plain, reading

_DEPTH = 3  # how far below the folder given an item of a checkpoint may lie


def is_run(path: Path) -> bool:
    """A workdir of protojax, its `checkpoints` folder, or one numbered checkpoint in there."""
    return _run_of(path) is not None


def _run_of(path: Path) -> tuple[Path, int | None] | None:
    path = path.resolve()
    for workdir, step in ((path, None), (path.parent, None), (path.parent.parent, path.name)):
        inside = path == workdir or path.parts[len(workdir.parts)] == "checkpoints"
        numbered = step is None or step.isdigit()
        if inside and numbered and (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
            return workdir, None if step is None else int(step)
    return None


def read_run(path: Path) -> tuple[np.ndarray, str]:
    """(the teacher's codebook [K,D], its name) of a run: prototypes as its loss sees them, whatever its estimator."""
    from protojax import loading

    found = _run_of(path)
    assert found is not None
    workdir, step = found
    encode = loading.load(workdir, step)
    return encode.prototypes, f"codebook of {encode.config.name}, arm {encode.config.arm}, step {encode.step}"


def read_orbax(path: Path) -> TensorFile:
    """The arrays of an Orbax checkpoint by their path in the tree. Raises FileError where there is none."""
    import orbax.checkpoint as ocp
    from etils import epath

    given, path = path, path.resolve()  # Orbax reads absolute paths alone
    items = _items(path)
    if not items:
        raise FileError(
            f"{given} is a folder without a checkpoint: expected a file, the workdir of a run of protojax, or an Orbax "
            "checkpoint (a folder that holds _METADATA)."
        )
    tensors: dict[str, Tensor] = {}
    for item in items:
        with reading(item, "Orbax"):
            metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(item))
            tree = getattr(metadata, "tree", metadata)
        prefix = "" if len(items) == 1 else f"{item.relative_to(path)}."
        for keys, leaf in _leaves(tree):
            name = prefix + ".".join(str(k) for k in keys)
            shape = tuple(int(n) for n in leaf.shape)
            check_size(shape, name)
            read = partial(_read_leaf, item, keys)
            tensors[name] = Tensor(shape, str(np.dtype(leaf.dtype)), read)
    return TensorFile("Orbax checkpoint", tensors)


def not_finite(path: Path) -> list[str]:
    """Names of the arrays of an Orbax checkpoint that hold NaN or infinity, in the order of its tree; all are read at
    once. Raises FileError for a folder that is none, or that is damaged."""
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    items = _items(path.resolve())  # Orbax reads absolute paths alone
    if not items:
        raise FileError(f"{path} is a folder without a checkpoint: expected one that holds _METADATA below it.")
    bad = []
    for item in items:
        with reading(item, "Orbax"):
            handler = ocp.PyTreeCheckpointHandler()
            metadata = handler.metadata(epath.Path(item))
            wanted = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), getattr(metadata, "tree", metadata)
            )
            with ocp.Checkpointer(handler) as reader:
                found = reader.restore(epath.Path(item), args=ocp.args.PyTreeRestore(restore_args=wanted))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(found):
            array = plain(np.asarray(leaf))
            if array.dtype.kind in "fc" and not np.isfinite(array).all():
                bad.append(jax.tree_util.keystr(keys, simple=True, separator="/"))
    return bad


def _items(path: Path) -> list[Path]:
    level, found = [path], []
    for _ in range(_DEPTH):
        found = [p for p in level if (p / "_METADATA").is_file()]
        if found:
            return found
        level = sorted(c for p in level for c in p.iterdir() if c.is_dir())
    return found


def _leaves(tree: Any, keys: tuple = ()) -> list[tuple[tuple, Any]]:
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return [(keys, tree)] if tree.shape is not None else []
    if isinstance(tree, dict) or hasattr(tree, "items"):
        pairs = list(tree.items())
    elif isinstance(tree, list | tuple):
        pairs = list(enumerate(tree))
    else:
        return []
    return [leaf for key, value in pairs for leaf in _leaves(value, (*keys, key))]


def _read_leaf(item: Path, keys: tuple) -> np.ndarray:
    import orbax.checkpoint as ocp
    from etils import epath

    def only(tree: Any, path: tuple, chosen: Any, other: Any) -> Any:
        """The tree with `chosen` at `keys` and `other` at every other leaf."""
        if hasattr(tree, "shape") and hasattr(tree, "dtype"):
            return chosen if path == keys else other
        if hasattr(tree, "items"):
            return {k: only(v, (*path, k), chosen, other) for k, v in tree.items()}
        if isinstance(tree, list | tuple):
            return [only(v, (*path, i), chosen, other) for i, v in enumerate(tree)]
        return other

    with reading(item, "Orbax"):
        handler = ocp.PyTreeCheckpointHandler()
        metadata = handler.metadata(epath.Path(item))
        tree = getattr(metadata, "tree", metadata)
        as_array = ocp.RestoreArgs(restore_type=np.ndarray)
        arguments = ocp.args.PyTreeRestore(
            item=only(tree, (), 0, ocp.PLACEHOLDER), restore_args=only(tree, (), as_array, as_array)
        )
        with ocp.Checkpointer(handler) as reader:
            found: Any = reader.restore(epath.Path(item), args=arguments)
        for key in keys:
            found = found[key]
        return plain(np.asarray(found))
