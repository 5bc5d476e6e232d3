"""Which tensor of a checkpoint holds the prototypes: by the names that known projects use, else by name, else by shape.

Known layouts, from the projects' own code: DINO and CARP (`head.last_layer`, weight norm), iBOT (also `last_layer2`,
patches), DINOv2 (`dino_head`, `ibot_head`, weight norm), DINOv3 (the same without it), SwAV (`prototypes.weight`, or
several heads `prototypes.prototypes0.weight`), CAPI (`teacher.head.layer`, the clustering), MSN (`prototypes`).
Where the same layer is stored for teacher and student, the teacher's is taken: it makes the targets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from protojax.audit.tensors import FileError, Tensor
from protojax.config import suggest

_LISTED = 12
# Weight norm: row k of the layer is g_k v_k / |v_k|; the two names are those of torch before and since 2.0.
_NORMED = ((".weight_v", ".weight_g"), (".parametrizations.weight.original1", ".parametrizations.weight.original0"))
_LAST = r"last_layer(\.weight|\.weight_v|\.parametrizations\.weight\.original1)$"
_MSN = ("prototypes", "target_encoder.")  # beside `prototypes`, a bare matrix, lie the two encoders
_LAYOUTS: tuple[tuple[str, str], ...] = (
    ("CAPI", r"(^|\.)teacher\.head\.layer\.weight$"),
    ("DINOv2 or DINOv3, image head", rf"(^|\.)dino_head\.{_LAST}"),
    ("DINOv2 or DINOv3, patch head", rf"(^|\.)ibot_head\.{_LAST}"),
    ("iBOT, patch head", rf"(^|\.)head\.{_LAST.replace('last_layer', 'last_layer2')}"),
    ("DINO, CARP or iBOT", rf"(^|\.)(head\.)?{_LAST}"),
    ("SwAV", r"(^|\.)prototypes(\.prototypes\d+)?\.weight$"),
)
_NAMES = re.compile(r"(^|[./_])(prototypes?|codebooks?|centroids?|cluster_centers?_?|centers|protos?)([./_]|$)", re.I)
# Best first. What is left of a name without these is the layer.
_NETWORKS = ("teacher", "target_encoder", "model_ema", "ema", "student_ema", "momentum", "student", "encoder", "online")
_SILENT = ("module", "model", "state_dict", "params", "_orig_mod", "net")
_NO_LAYER = re.compile(
    r"(^|\.)(opt|optimi[sz]er|clustering_optimizer|optimizer_state\w*|mu|nu|exp_avg\w*|scaler|fp16_scaler|args|scheduler\w*)(\.|$)"
)


class Candidate(NamedTuple):
    """name: of the tensor (of v where the layer is weight-normed). layout: whose names these are, or how it was found.
    transposed: the tensor is [D,K] (Flax kernels), not [K,D]."""

    name: str
    shape: tuple[int, int]
    dtype: str
    layout: str
    transposed: bool = False


class AmbiguousError(FileError):
    """Several tensors may be the prototypes, or none is named like them. candidates: to choose from."""

    def __init__(self, text: str, candidates: Sequence[Candidate]):
        super().__init__(text)
        self.candidates = tuple(candidates)


def find(tensors: Mapping[str, Tensor]) -> Candidate:
    """The prototype layer of a checkpoint.

    Raises AmbiguousError with the candidates where several qualify or none does, FileError where no tensor can be a
    codebook at all.
    """
    matrices = [c for c in (_candidate(name, tensor) for name, tensor in tensors.items()) if c is not None]
    if not matrices:
        kinds = ", ".join(f"{name} {list(t.shape)}" for name, t in list(tensors.items())[:5]) or "nothing"
        raise FileError(f"no matrix [prototypes, width] of floating-point numbers; the file holds {kinds}.")
    known = [c._replace(layout=layout) for c in matrices if (layout := _layout(c.name))]
    for group, how in ((known, ""), ([c for c in matrices if _NAMES.search(c.name)], "by its name")):
        chosen = _distinct(_of_best_network(group), tensors)
        if len(chosen) == 1:
            msn = chosen[0].name == _MSN[0] and any(name.startswith(_MSN[1]) for name in tensors)
            return chosen[0] if not how else chosen[0]._replace(layout="MSN" if msn else f"found {how}")
        if chosen:
            raise AmbiguousError(f"{len(chosen)} layers may be the prototypes", chosen[:_LISTED])
    if len(matrices) == 1:
        return matrices[0]._replace(layout="the only matrix in the file")
    by_size = sorted(matrices, key=lambda c: (-c.shape[0] / c.shape[1], c.name))
    raise AmbiguousError("no tensor is named like prototypes", by_size[:_LISTED])


def named(tensors: Mapping[str, Tensor], key: str) -> Candidate:
    """The tensor `key`, or the weight-normed layer of that name. Raises FileError with the nearest names."""
    for name in (key, f"{key}.weight", *(key + v for v, _ in _NORMED), *(f"{key}{v[7:]}" for v, _ in _NORMED)):
        if name in tensors:
            found = _candidate(name, tensors[name])
            if found is None:
                tensor = tensors[name]
                raise FileError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, expected a matrix [prototypes, width] of "
                    "floating-point numbers."
                )
            return found._replace(layout=_layout(name) or "chosen with --key")
    shown = ", ".join(list(tensors)[:8])
    raise FileError(f"there is no tensor {key!r}{suggest(key, tensors)}. The first of {len(tensors)}: {shown}.")


def rows_of(tensors: Mapping[str, Tensor], candidate: Candidate) -> tuple[np.ndarray, bool]:
    """(prototypes [K,D] float32 or float64, was it weight-normed). Weight norm is resolved: w_k = g_k v_k / |v_k|."""
    rows = tensors[candidate.name].read()
    rows = rows.T if candidate.transposed else rows
    gains = _partner(candidate.name, tensors)
    if gains is None:
        return rows, False
    g = tensors[gains].read()
    if g.size not in (1, len(rows)):
        raise FileError(f"{gains} has shape {list(g.shape)}, expected one number for each of the {len(rows)} rows.")
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.where(length > 0, rows / length, 0.0).astype(rows.dtype) * g.reshape(-1, 1).astype(rows.dtype), True


# ---------------------------------------------------------------------------------------------------- helpers
def _candidate(name: str, tensor: Tensor) -> Candidate | None:
    """A matrix of floating-point numbers with at least two rows, that is no part of an optimiser."""
    if len(tensor.shape) != 2 or not tensor.dtype.startswith(("float", "bfloat")) or _NO_LAYER.search(name):
        return None
    transposed = name.rpartition(".")[2] == "kernel"
    rows, width = tensor.shape[::-1] if transposed else tensor.shape
    if rows < 2 or width < 2:
        return None
    return Candidate(name, (rows, width), tensor.dtype, "", transposed)


def _layout(name: str) -> str:
    return next((layout for layout, pattern in _LAYOUTS if re.search(pattern, name)), "")


def _split(name: str) -> tuple[int, str]:
    """(rank of the network, the layer inside of it)."""
    parts = [p for p in name.split(".") if p not in _SILENT]
    ranks = [_NETWORKS.index(p) for p in parts[:3] if p in _NETWORKS]
    return (min(ranks) if ranks else len(_NETWORKS)), ".".join(p for p in parts if p not in _NETWORKS)


def _of_best_network(candidates: Sequence[Candidate]) -> list[Candidate]:
    """For each layer the copy of the network that makes the targets; of CAPI the clustering alone."""
    clustering = [c for c in candidates if c.layout == "CAPI"]
    best: dict[str, tuple[int, Candidate]] = {}
    for candidate in clustering or candidates:
        rank, layer = _split(candidate.name)
        if layer not in best or rank < best[layer][0]:
            best[layer] = (rank, candidate)
    return [candidate for _, candidate in best.values()]


def _distinct(candidates: Sequence[Candidate], tensors: Mapping[str, Tensor]) -> list[Candidate]:
    """Without second names of the same memory (iBOT's shared head)."""
    kept: dict[object, Candidate] = {}
    for candidate in candidates:
        identity = tensors[candidate.name].identity
        kept.setdefault(candidate.name if identity is None else identity, candidate)
    return list(kept.values())


def _partner(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    for v, g in _NORMED:
        if name.endswith(v) and (partner := name.removesuffix(v) + g) in tensors:
            return partner
    return None
