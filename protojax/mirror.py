"""A copy of a run in another place, an object store for one: what a machine that was taken away leaves behind.

Orbax writes below the workdir; a thread copies every complete checkpoint, and the small files beside it, to
`run.mirror` (gs://, s3:// or a folder, through `etils.epath`). A machine whose workdir is older, or empty, fetches the
newest complete copy before it begins. Stores have no atomic rename, so a copy counts once its list of files, written
last, is there.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from protojax.checkpoint import BEST, NEWEST, check_writable, steps_below

COMPLETE = ".complete.json"  # of a copied checkpoint: its files and their sizes
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
CHUNK = 16 * 2**20
STREAMS = 8
POLL = 0.1  # seconds between looks at whether Orbax has finished a checkpoint


class MirrorError(OSError):
    """The mirror cannot be reached, or a copy in it is damaged."""


class Mirror:
    """The copy of one workdir. `say` is told of what could not be copied: training goes on without it."""

    def __init__(self, url: str, workdir: Path, say: Callable[[str], None]):
        self.url, self.workdir, self._say = url.rstrip("/"), Path(os.path.abspath(workdir)), say
        self._scheme = url.partition("://")[0] if "://" in url else ""
        if not self._scheme:
            check_writable(Path(url))
        with self._reaching("reached"):
            self._root = epath.Path(self.url)
            probe = self._root / ".writable"
            probe.write_text("")
            probe.unlink()
        self._one = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._settled = threading.Event()
        self._pending: list[concurrent.futures.Future] = []
        self._sizes: dict[str, tuple[int, int]] = {}
        self.problem = ""

    # ------------------------------------------------------------------------------------------------- fetching
    def fetch(self) -> dict[str, int]:
        """{'checkpoints': step, 'best': step} of what was fetched, being newer than what the workdir has.

        Raises MirrorError when there are copies but none of them is whole."""
        found: dict[str, int] = {}
        for folder in (NEWEST, BEST):
            here = max(steps_below(self.workdir / folder), default=-1)
            with self._reaching("read"):
                there = sorted((s for s in self._complete(folder) if s > here), reverse=True)
            for step in there:
                try:
                    self._fetch_step(folder, step)
                    found[folder] = step
                    break
                except MirrorError as error:
                    self._say(f"{error} The copy before it is tried.")
            if there and folder not in found and here < 0:
                raise MirrorError(f"no checkpoint below {self.url}/{folder} can be read, though {there} are complete.")
        if NEWEST in found:
            with self._reaching("read"):
                self._fetch_files()
            self._say(f"fetched the checkpoint of step {found[NEWEST]} from {self.url}")
        return found

    def _fetch_step(self, folder: str, step: int) -> None:
        source = self._root / folder / str(step)
        with self._reaching("read"):
            files = json.loads((self._root / folder / f"{step}{COMPLETE}").read_text())["files"]
            temporary = self.workdir / f".fetching-{folder}-{step}"
            shutil.rmtree(temporary, ignore_errors=True)
            for name in files:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _copy_all(source, temporary, files)
        wrong = [name for name, size in files.items() if (temporary / name).stat().st_size != size]
        if wrong:
            shutil.rmtree(temporary)
            raise MirrorError(f"the copy {self.url}/{folder}/{step} is damaged: {wrong[:3]} have another size.")
        target = self.workdir / folder / str(step)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)

    def _fetch_files(self) -> None:
        listed = self._root / "files.json"
        for name in json.loads(listed.read_text()) if listed.exists() else []:
            target = self.workdir / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".tmp")
            _copy(self._root / "files" / name, temporary)
            os.replace(temporary, target)

    # -------------------------------------------------------------------------------------------------- copying
    def later(self, checkpoint: Path) -> None:
        """Copy this checkpoint (WORKDIR/FOLDER/STEP), whose writing has begun, when it is complete; returns at once."""
        self._pending.append(self._one.submit(self._copied, checkpoint))

    def flush(self) -> None:
        """Until all complete checkpoints of the workdir and the files beside them are copied. Nothing may be writing
        any more."""
        self._settled.set()
        self._wait()
        self.problem = ""  # what failed before is tried now
        for folder in (NEWEST, BEST):
            for step in steps_below(self.workdir / folder):
                self.later(self.workdir / folder / str(step))
            # Again: when the last one was copied, older ones may not have gone yet.
            self._pending.append(self._one.submit(self._guarded, functools.partial(self._prune, folder)))
        self._pending.append(self._one.submit(self._guarded, self._copy_files))
        self._wait()
        self._settled.clear()

    def _wait(self) -> None:
        concurrent.futures.wait(self._pending)
        self._pending.clear()

    def close(self) -> None:
        self._settled.set()
        self._one.shutdown(cancel_futures=True)

    def _copied(self, checkpoint: Path) -> None:
        while not checkpoint.is_dir():  # Orbax gives it this name when it is complete
            if self._settled.wait(POLL) and not checkpoint.is_dir():
                return  # it could not be written
        self._guarded(lambda: self._copy_step(checkpoint))

    def _guarded(self, copy: Callable[[], None]) -> None:
        try:
            copy()
        except Exception as error:  # whatever a store's client raises
            self.problem = f"{type(error).__name__}: {error}"[:300]
            self._say(f"warning: not copied to {self.url} ({self.problem}); training goes on, the next one is tried.")

    def _copy_step(self, checkpoint: Path) -> None:
        folder, step = self._root / checkpoint.parent.name, checkpoint.name
        complete = folder / f"{step}{COMPLETE}"
        if complete.exists():
            return
        target = folder / step
        _remove(target)  # an upload that was cut short
        try:
            files = self._upload(checkpoint, target)
        except FileNotFoundError:
            if max(steps_below(checkpoint.parent), default=-1) <= int(step):
                raise
            _remove(target)  # the checkpoint went because a newer one is complete: that one comes next
            return
        self._copy_files()
        complete.write_text(json.dumps({"files": files}))
        self._prune(checkpoint.parent.name)

    def _prune(self, folder: str) -> None:
        """Remove copies of checkpoints that the workdir has no more, older than one that it has and that is copied."""
        here, copied = {*steps_below(self.workdir / folder)}, self._complete(folder)
        newest = max(here & copied, default=-1)
        for old in copied - here:
            if old < newest:
                (self._root / folder / f"{old}{COMPLETE}").unlink()
                (self._root / folder / str(old)).rmtree()

    def _upload(self, checkpoint: Path, target: Any) -> dict[str, int]:
        """Sizes of the checkpoint's files, by name below it, copied to `target`. FileNotFoundError: some are gone."""
        files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
        if not files:
            raise FileNotFoundError(f"{checkpoint} holds no file")
        self._make([target / name for name in files])
        _copy_all(checkpoint, target, files)
        return files

    def _copy_files(self) -> None:
        """Everything of the workdir that is no checkpoint and has changed since it was last copied."""
        names = []
        for name in _besides(self.workdir):
            path = self.workdir / name
            names.append(name)
            now = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._sizes.get(name) != now:
                target = self._root / "files" / name
                self._make([target])
                _copy(path, target)
                self._sizes[name] = now
        (self._root / "files.json").write_text(json.dumps(names))

    # -------------------------------------------------------------------------------------------------- helpers
    def _complete(self, folder: str) -> set[int]:
        place = self._root / folder
        names = [p.name for p in place.iterdir()] if place.exists() else []
        return {int(n.removesuffix(COMPLETE)) for n in names if n.endswith(COMPLETE)}

    def _make(self, files: list[Any]) -> None:
        if not self._scheme:  # stores have no folders, and making one may be a right that a key does not have
            for parent in {path.parent for path in files}:
                parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            package = PACKAGES.get(self._scheme, "fsspec")
            raise MirrorError(f"run.mirror={self.url!r} needs a package: pip install {package} ({error})") from error
        except MirrorError:
            raise
        except Exception as error:
            raise MirrorError(
                f"run.mirror={self.url!r} could not be {what} ({type(error).__name__}: {str(error)[:300]}); see that "
                "the bucket exists and that this machine may read and write it, or leave run.mirror out"
            ) from error


@contextlib.contextmanager
def following(url: str | None, workdir: Path, say: Callable[[str], None]) -> Iterator[Mirror | None]:
    """The mirror of a workdir, which has everything when the block ends; None without a URL.

    Raises MirrorError when the place cannot be used, and at the end when the last copy failed: the workdir is whole
    then, and the same command copies it."""
    if url is None:
        yield None
        return
    mirror = Mirror(url, workdir, say)
    try:
        mirror.fetch()
        try:
            yield mirror
        finally:
            mirror.flush()
        if mirror.problem:
            raise MirrorError(
                f"{workdir} is complete, but its copy in {url} is not ({mirror.problem}); the same command copies it."
            )
    finally:
        mirror.close()


def _besides(workdir: Path) -> list[str]:
    """Files that belong to no checkpoint. Folders of checkpoints are not entered: they may go meanwhile."""
    found = []
    for folder, inner, files in os.walk(workdir):
        if Path(folder) == workdir:
            inner[:] = [n for n in inner if n not in (NEWEST, BEST) and not n.startswith((".", "damaged-"))]
            files = [n for n in files if not n.startswith((".", "damaged-"))]
        paths = [Path(folder) / name for name in files if not name.endswith(".tmp")]
        found += [str(path.relative_to(workdir)) for path in paths if path.is_file()]
    return sorted(found)


def _remove(folder: Any) -> None:
    if folder.exists():
        folder.rmtree()


def _copy_all(source: Any, target: Any, names: Iterable[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(lambda name: _copy(source / name, target / name), names))


def _copy(source: Any, target: Any) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, CHUNK)
