"""A packed copy of a split: decoded once into fixed-size uint8 images in one memory-mapped file.

    DIR/NAME.images      uint8 [M,H,W,3], as it is on disk: a batch is a copy of pages, nothing is decoded
    DIR/NAME.<key>.npy   the other content (extent)
    DIR/NAME.json        what it was made from, and the CRC-32 of every chunk that is complete

Building again goes on where it stopped: a chunk counts as soon as its checksum is in the JSON file, which is replaced
atomically. Chunks are checked when they are first read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from protojax.data.records import Content, Records

CHUNK = 1024  # examples a chunk: what an interruption loses at most
STALE_SECONDS = 120.0  # a builder that has not moved its lock for so long is dead


def identity(records: Records) -> dict[str, Any]:
    """What a packed copy must agree with: name, size, shapes and a digest of the labels."""
    digest = hashlib.sha256()
    for key in sorted(records.labels):
        digest.update(key.encode() + np.ascontiguousarray(records.labels[key], np.int64).tobytes())
    shapes = {k: [str(np.dtype(s.dtype)), *s.shape] for k, s in _content(records).items()}
    return {"version": 1, "name": records.name, "size": records.size, "content": shapes, "labels": digest.hexdigest()}


def _content(records: Records) -> dict[str, Any]:
    return {k: s for k, s in records.shapes.items() if k not in records.labels and k != "index"}


def pack(records: Records, directory: str | Path, *, progress: bool = True, wait: float = 24 * 3600.0) -> Records:
    """The same records, read from a packed copy below `directory`, which is built (or finished) first.

    Unreadable examples stay unreadable. Several processes may call it with one directory: one builds, the others wait,
    at most `wait` seconds.
    Raises ValueError when the files there belong to other data or were changed; OSError, with what is needed, when the
    disk is full or read-only (what is packed so far stays, and the next call goes on).
    """
    folder, stem = Path(directory).expanduser(), records.name.replace("/", "-").replace(":", "-")
    made = identity(records)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait
        while not _complete(folder / f"{stem}.json", made):
            with _lock(folder / f"{stem}.lock") as alive:
                if alive is not None:
                    _build(records, folder, stem, made, alive, progress)
                    break
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has not finished packing {records.name} in {folder} in {wait:g} s")
            time.sleep(1.0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise OSError(error.errno, _no_room(records, folder, error)) from error
        raise
    return records._replace(read=_Reader(folder, stem, made))


def bytes_needed(records: Records) -> int:
    """Size of the packed copy in bytes."""
    return records.size * sum(
        int(np.prod(s.shape, dtype=np.int64)) * np.dtype(s.dtype).itemsize for s in _content(records).values()
    )


def _no_room(records: Records, folder: Path, error: OSError) -> str:
    free = f"{shutil.disk_usage(folder).free / 1e9:.2f} GB are free" if folder.is_dir() else "it is not there"
    return (
        f"cannot pack {records.name} in {folder} ({error.strerror}): the copy takes "
        f"{bytes_needed(records) / 1e9:.2f} GB, {free}. Free some, or give another data.packed; what is "
        "packed so far is kept."
    )


def _state(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to pack again") from error


def _checked_state(path: Path, made: dict[str, Any]) -> dict[str, Any] | None:
    state = _state(path)
    if state is not None and state["made"] != made:
        changed = sorted(k for k in made if state["made"].get(k) != made[k])
        raise ValueError(
            f"{path} was packed from other data (different: {', '.join(changed)}); give another data.packed, or "
            "delete it"
        )
    return state


def _complete(path: Path, made: dict[str, Any]) -> bool:
    state = _checked_state(path, made)
    return state is not None and len(state["chunks"]) == -(-made["size"] // CHUNK)


@contextlib.contextmanager
def _lock(path: Path) -> Any:
    """Yields a function that shows that the builder lives, or None when another process builds."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        yield None
        return
    try:
        yield lambda: os.utime(path)
    finally:
        path.unlink(missing_ok=True)


def _maps(folder: Path, stem: str, made: dict[str, Any], mode: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, (dtype, *shape) in made["content"].items():
        path = folder / (f"{stem}.images" if key == "image" else f"{stem}.{key}")
        if mode == "r+" and not path.exists():
            with path.open("wb") as file:  # its full size at once: a full disk is noticed now and not in the middle
                size = made["size"] * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
                if hasattr(os, "posix_fallocate") and size:
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
        out[key] = np.memmap(path, dtype, mode, shape=(made["size"], *shape))
    return out


def _build(
    records: Records, folder: Path, stem: str, made: dict[str, Any], alive: Callable[[], None], progress: bool
) -> None:
    path = folder / f"{stem}.json"
    state = _checked_state(path, made) or {"made": made, "chunks": {}, "bad": []}
    try:
        maps = _maps(folder, stem, made, "r+")
    except OSError:
        if not state["chunks"]:  # nothing is lost by removing files without content
            for key in made["content"]:
                (folder / (f"{stem}.images" if key == "image" else f"{stem}.{key}")).unlink(missing_ok=True)
        raise
    count = -(-records.size // CHUNK)
    with tqdm(
        total=records.size, initial=min(len(state["chunks"]) * CHUNK, records.size), unit="image",
        desc=f"packing {records.name}", disable=None if progress else True,
    ) as bar:  # fmt: skip
        for chunk in range(count):
            if str(chunk) in state["chunks"]:
                continue
            rows = np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, records.size))
            content, good = records.read(rows)
            for key, values in content.items():
                maps[key][rows[0] : rows[-1] + 1] = values
                maps[key].flush()
            state["bad"] += rows[~good].tolist()
            state["chunks"][str(chunk)] = _checksum(content)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(state))
            os.replace(temporary, path)
            alive()
            bar.update(len(rows))


def _checksum(content: Content) -> int:
    value = 0
    for key in sorted(content):
        value = zlib.crc32(np.ascontiguousarray(content[key]).data, value)
    return value


class _Reader:
    """`Records.read` over the packed files; maps them again in another process."""

    def __init__(self, folder: Path, stem: str, made: dict[str, Any]):
        self._where = (folder, stem, made)
        self._open()

    def _open(self) -> None:
        folder, stem, made = self._where
        state = _checked_state(folder / f"{stem}.json", made)
        assert state is not None
        self._sums = {int(k): int(v) for k, v in state["chunks"].items()}
        self._bad = np.zeros(made["size"], bool)
        self._bad[state["bad"]] = True
        self._maps = _maps(folder, stem, made, "r")
        self._checked: set[int] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> Any:
        return self._where

    def __setstate__(self, where: Any) -> None:
        self._where = where
        self._open()

    def __call__(self, rows: np.ndarray) -> tuple[Content, np.ndarray]:
        for chunk in np.unique(rows // CHUNK).tolist():
            self._check(chunk)
        return {key: np.asarray(values[rows]) for key, values in self._maps.items()}, ~self._bad[rows]

    def _check(self, chunk: int) -> None:
        with self._lock:
            if chunk in self._checked:
                return
        part = {key: values[chunk * CHUNK : (chunk + 1) * CHUNK] for key, values in self._maps.items()}
        if _checksum(part) != self._sums[chunk]:
            folder, stem, _ = self._where
            raise ValueError(
                f"{folder / stem}.images changed on disk (images {chunk * CHUNK} and following); delete {stem}.* in "
                f"{folder} to pack again"
            )
        with self._lock:
            self._checked.add(chunk)
