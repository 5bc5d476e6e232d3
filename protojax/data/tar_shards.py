"""WebDataset shards: tar files whose members KEY.jpg and KEY.txt (or KEY.json) belong together.

Shards are indexed once (names, offsets), then read by random access: no unpacking, no second copy.
"""

from __future__ import annotations

import glob
import json
import logging
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from protojax.data import decode
from protojax.data.captions import CAPTIONS, texts_of
from protojax.data.pairs import Pairs, distinct
from protojax.data.pairs_text import LONGEST
from protojax.data.records import image_shapes

IMAGES, TEXTS = (".jpg", ".jpeg", ".png", ".webp"), (".txt", ".json")
_log = logging.getLogger(__name__)


class Member(NamedTuple):
    """Where an example lies. shard: path. key: the member's name without suffix. image: (offset, bytes). caption."""

    shard: str
    key: str
    image: tuple[int, int]
    caption: str


class Index(NamedTuple):
    """members in order of shard and position; problems: one line for every member that was left out."""

    members: tuple[Member, ...]
    problems: tuple[str, ...]


def open_tar_shards(
    root: str,
    split: str,
    *,
    shards: str = "{split}-*.tar",
    canvas: int = 64,
    text: str = "hashed",
    vocabulary: int = 8000,
    longest: int = LONGEST,
    on_corrupt: decode.OnCorrupt = "skip",
) -> Pairs:
    """Pairs of the shards below `root` that match `shards` ('{split}' stands for the split's name).

    The caption is KEY.txt, or 'caption' or 'text' of KEY.json. Members without a partner, empty captions and truncated
    shards are left out, named in `problems` and counted in the log; images that do not decode are skipped when met.
    Other options as in `open_captions`. Raises ValueError when no shard matches or nothing is left.
    """
    pattern = shards.replace("{split}", split)
    paths = sorted(glob.glob(str(Path(root) / pattern)))
    if not paths:
        raise ValueError(f"no shard matches {pattern!r} below {root}; set data.source.shards")
    index = index_shards(paths)
    if index.problems:
        _log.warning("%s: %d members left out; the first: %s", root, len(index.problems), index.problems[0])
    if not index.members:
        raise ValueError(
            f"none of the {len(paths)} shards below {root} holds a pair; the first problem: {index.problems[:1]}"
        )
    name = f"{Path(root).name}/{split}"
    captions, rows = distinct([[m.caption] for m in index.members], name)
    corpus: Sequence[str] = captions
    if text == "bpe" and split != "train":
        training = sorted(glob.glob(str(Path(root) / shards.replace("{split}", "train"))))
        corpus = [m.caption for m in index_shards(training).members] or captions
    texts = texts_of(captions, text, vocabulary, longest, corpus)
    reader = decode.ImageReader(
        lambda row: decode.decode(_bytes(index.members[row]), canvas, canvas),
        lambda row: f"{index.members[row].shard}:{index.members[row].key}", len(index.members), (canvas, canvas),
        on_corrupt=on_corrupt, cache=True,
    )  # fmt: skip
    return Pairs(name, len(index.members), image_shapes(canvas, canvas), reader, rows, texts,
                 problems=lambda: [*index.problems, *reader.problems()])  # fmt: skip


def index_shards(paths: Sequence[str]) -> Index:
    """Members of the shards that form whole pairs, and what was wrong with the others."""
    members: list[Member] = []
    problems: list[str] = []
    for path in paths:
        found: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path) as archive:
                for item in archive:
                    if not item.isfile():
                        continue
                    stem, dot, suffix = item.name.rpartition("/")[2].partition(".")
                    key = item.name[: len(item.name) - len(suffix) - len(dot)] if stem else item.name
                    found.setdefault(key, {})[f".{suffix.lower()}"] = (item.offset_data, item.size)
        except (tarfile.TarError, OSError, EOFError) as error:
            problems.append(f"{path}: damaged after {len(found)} keys ({error})")
        for key, parts in found.items():
            problem = _pair(path, key, parts, members)
            if problem:
                problems.append(f"{path}:{key}: {problem}")
    return Index(tuple(members), tuple(problems))


def _pair(path: str, key: str, parts: dict[str, tuple[int, int]], members: list[Member]) -> str | None:
    """Append the pair, or say what is wrong with it."""
    image = next((parts[s] for s in IMAGES if s in parts), None)
    text = next(((s, parts[s]) for s in TEXTS if s in parts), None)
    if image is None or text is None:
        return "no image" if image is None else "no caption"
    if image[0] + image[1] > Path(path).stat().st_size:
        return "the shard ends inside the image"
    try:
        caption = _caption(path, *text)
    except (ValueError, OSError) as error:
        return f"unreadable caption ({error})"
    if not caption.strip():
        return "empty caption"
    members.append(Member(path, key, image, caption))
    return None


def _caption(path: str, suffix: str, place: tuple[int, int]) -> str:
    with open(path, "rb") as file:
        file.seek(place[0])
        content = file.read(place[1]).decode()
    if suffix == ".txt":
        return content.strip()
    record = json.loads(content)
    return str(next((record[k] for k in CAPTIONS if record.get(k)), ""))


def _bytes(member: Member) -> bytes:
    with open(member.shard, "rb") as file:
        file.seek(member.image[0])
        return file.read(member.image[1])
