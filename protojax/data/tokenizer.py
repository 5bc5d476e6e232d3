"""Byte-pair tokenizers, trained on the captions or read from a tokenizer.json, by the `tokenizers` library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protojax.data.pairs import Texts

PADDING, START, END = "[PAD]", "[START]", "[END]"


def tokenizers_library() -> Any:
    """The package `tokenizers`. Raises ValueError with what to install."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "byte-pair tokenizers need the package 'tokenizers': pip install tokenizers, or use text='hashed'"
        ) from None
    return tokenizers


def train_tokenizer(captions: Sequence[str], vocabulary: int = 8000) -> Any:
    """A byte-level BPE tokenizer (Sennrich et al. 2016) of at most `vocabulary` pieces, lower-cased: the same for the
    same captions. Ids 0, 1, 2 are padding, start and end. Raises ValueError below 300 pieces (256 bytes and the
    marks)."""
    if vocabulary < 300:
        raise ValueError(f"a byte-level vocabulary needs at least 300 pieces, got {vocabulary}")
    library = tokenizers_library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.normalizer = library.normalizers.Sequence([library.normalizers.NFKC(), library.normalizers.Lowercase()])
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PADDING, START, END], show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(list(captions), trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Any:
    """A tokenizer.json of any kind. Raises ValueError when it is missing or not one."""
    if not Path(path).is_file():
        raise ValueError(
            f"no such tokenizer file: {path} (text must be 'hashed', 'bpe' or the path of a tokenizer.json)"
        )
    try:
        return tokenizers_library().Tokenizer.from_file(str(path))
    except ValueError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json ({error})") from error


class Marks(NamedTuple):
    """Ids of the marks around a caption; start None: captions begin with their first piece."""

    start: int | None
    end: int
    padding: int


def tokenise(
    tokenizer: Any, captions: Sequence[str], longest: int, marks: Marks | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids int32 [T,longest], mask bool [T,longest], captions that were cut): start, pieces, end, padding. A caption
    that does not fit is cut and keeps its end token. marks: found by their usual names unless given. Raises ValueError
    for `longest` below 3, and for a tokenizer without marks."""
    if longest < 3:
        raise ValueError(f"max_length must be at least 3 (start, one piece, end), got {longest}")
    if marks is None:
        marks = Marks(*(find_mark(tokenizer, names) for names in (
            (START, "<|startoftext|>", "[CLS]", "<s>"), (END, "<|endoftext|>", "[SEP]", "</s>"),
            (PADDING, "<pad>", "<|endoftext|>")
        )))  # fmt: skip
    first = [] if marks.start is None else [marks.start]
    room, padding = longest - 1 - len(first), marks.padding
    ids = np.full((len(captions), longest), padding, np.int32)
    mask = np.zeros((len(captions), longest), bool)
    cut = 0
    for row, encoding in enumerate(tokenizer.encode_batch(list(captions), add_special_tokens=False)):
        pieces = encoding.ids
        cut += len(pieces) > room
        own = [*first, *pieces[:room], marks.end]
        ids[row, : len(own)], mask[row, : len(own)] = own, True
    return ids, mask, cut


def find_mark(tokenizer: Any, names: Sequence[str]) -> int:
    """The id of the first of these tokens that the tokenizer has. Raises ValueError when it has none."""
    for name in names:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise ValueError(f"the tokenizer has none of the marks {', '.join(names)}")


def token_texts(captions: Sequence[str], tokenizer: Any, longest: int) -> Texts:
    """`Texts` as token ids, for a text tower that is trained."""
    ids, mask, cut = tokenise(tokenizer, captions, longest)
    digest = hashlib.blake2b(tokenizer.to_str().encode(), digest_size=4).hexdigest()
    fingerprint = f"bpe-{digest}-{longest}-{tokenizer.get_vocab_size()}"
    return Texts(tuple(captions), {}, True, fingerprint, ids=ids, mask=mask, cut=cut, tokenizer=tokenizer.to_str())
