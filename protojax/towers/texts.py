"""The tokenizers of CLIP (byte pairs) and SigLIP (SentencePiece) from a folder of weights.

CLIP: start, pieces, end, padding; tokenizer.json, or vocab.json with merges.txt. SigLIP: pieces, end, padding to the
last position, which is the one that speaks for the text; tokenizer.json, or spiece.model. Texts of SigLIP are lower
case and without ASCII punctuation, as it was trained.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protojax.data.tokenizer import Marks, find_mark, load_tokenizer, tokenise, tokenizers_library
from protojax.models.pretrained.config import ImageTextConfig
from protojax.towers.weights import read_json

JSON, VOCABULARY, MERGES, SENTENCEPIECE = "tokenizer.json", "vocab.json", "merges.txt", "spiece.model"
_CLASSES = {
    "clip": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "siglip": ("SiglipTokenizer", "SiglipTokenizerFast"),
}
_ANY_CLASS = ("PreTrainedTokenizerFast", "TokenizersBackend")
_DEFAULT_MARKS = {
    "clip": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "siglip": {"eos_token": "</s>", "pad_token": "</s>"},
}
_SPACE = "\u2581"  # SentencePiece's mark of a space
# Special tokens, contractions, runs of letters, single digits, runs of anything else (Radford et al. 2021).
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_SUFFIX = "</w>"


class Tokens(NamedTuple):
    """ids int32 [T,S]; mask bool [T,S], False at padding; cut: texts that did not fit and lost their end."""

    ids: np.ndarray
    mask: np.ndarray
    cut: int


class Tokeniser(NamedTuple):
    """texts -> Tokens. masked: whether the tower is given the mask. digest: of the files and of how they are used."""

    tokenizer: Any
    marks: Marks
    length: int
    masked: bool
    lower: bool
    plain: bool
    digest: str

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Raises ValueError for no texts, and for texts that are no strings or blank."""
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError("texts: expected a list of at least one string, none of them blank")
        prepared = [canonical(t, self.lower) for t in texts] if self.plain else list(texts)
        return Tokens(*tokenise(self.tokenizer, prepared, self.length, self.marks))


def canonical(text: str, lower: bool = True) -> str:
    """SigLIP's text: lower case, no ASCII punctuation, single spaces."""
    text = text.replace(_SPACE, " ")
    text = (text.lower() if lower else text).translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\s+", " ", text).strip()


def open_tokeniser(folder: Path, config: ImageTextConfig) -> Tokeniser:
    """The tokenizer of a folder of weights.

    tokenizer_config.json, where there is one, gives the marks, do_lower_case, and in model_input_names whether SigLIP's
    tower is given the mask of its padding (it was trained without, so that is the default).

    Raises ValueError when files are missing or damaged, for a tokenizer of another kind, and where the end token is not
    the one that config.json pools at.
    """
    about = read_json(folder, "tokenizer_config.json", optional=True)
    known = _CLASSES[config.kind]
    if (name := about.get("tokenizer_class", known[0])) not in (*known, *_ANY_CLASS):
        raise ValueError(
            f"{folder}: tokenizer_config.json names {name!r}, expected {known[0]} for model_type {config.kind!r}. "
            "Encode texts with the library of that model and save them as `base` of a feature cache (docs/prompts.md)"
        )
    tokenizer, files = _open(folder, config.kind)
    marks = _marks(folder, tokenizer, config.kind, about)
    if config.text.pool == "eos" and marks.end != config.text.eos:
        raise ValueError(
            f"{folder}: the tokenizer ends texts with id {marks.end}, config.json pools at eos_token_id "
            f"{config.text.eos}: take all files from the same model"
        )
    masked = config.kind == "siglip" and "attention_mask" in (about.get("model_input_names") or ())
    lower, plain = bool(about.get("do_lower_case", True)), config.kind == "siglip"
    digest = hashlib.blake2b(repr((tuple(marks), config.text.max_length, masked, lower, plain)).encode(), digest_size=4)
    for file in files:
        digest.update(file.read_bytes())
    return Tokeniser(tokenizer, marks, config.text.max_length, masked, lower, plain, digest.hexdigest())


def _open(folder: Path, kind: str) -> tuple[Any, list[Path]]:
    if (folder / JSON).is_file():
        tokenizer = load_tokenizer(folder / JSON)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer, [folder / JSON]
    if kind == "clip":
        if not ((folder / VOCABULARY).is_file() and (folder / MERGES).is_file()):
            raise ValueError(f"{folder} holds no tokenizer: expected {JSON}, or {VOCABULARY} and {MERGES}")
        return _byte_pairs(folder), [folder / VOCABULARY, folder / MERGES]
    if not (folder / SENTENCEPIECE).is_file():
        raise ValueError(f"{folder} holds no tokenizer: expected {JSON} or {SENTENCEPIECE}")
    return _SentencePieces(folder / SENTENCEPIECE), [folder / SENTENCEPIECE]


def _byte_pairs(folder: Path) -> Any:
    """CLIP's tokenizer: lower case, words by `_CLIP_WORDS`, byte pairs that end in </w>."""
    library = tokenizers_library()
    vocabulary = read_json(folder, VOCABULARY)
    lines = (folder / MERGES).read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    try:
        model = library.models.BPE(
            vocab=vocabulary, merges=pairs, unk_token="<|endoftext|>", end_of_word_suffix=_CLIP_SUFFIX,
            continuing_subword_prefix="",
        )  # fmt: skip
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{folder}: {VOCABULARY} and {MERGES} do not fit each other ({error}); download both again"
        ) from error
    tokenizer = library.Tokenizer(model)
    normal, before = library.normalizers, library.pre_tokenizers
    space = normal.Replace(library.Regex(r"\s+"), " ")
    tokenizer.normalizer = normal.Sequence([normal.NFC(), space, normal.Lowercase()])
    words = before.Split(library.Regex(_CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = before.Sequence([words, before.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([mark for mark in ("<|startoftext|>", "<|endoftext|>") if mark in vocabulary])
    return tokenizer


class _Encoding(NamedTuple):
    ids: list[int]


class _SentencePieces:
    """A spiece.model behind the two methods that `tokenise` uses.

    A text is encoded behind a piece of which is known into how many ids it falls, and these are cut off: only then does
    SentencePiece keep the space in front of the first word as part of it.
    """

    def __init__(self, path: Path):
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(
                f"{path}: reading SentencePiece models needs the package 'sentencepiece': pip install sentencepiece, "
                f"or put the {JSON} of the model beside it"
            ) from None
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error}); download it again") from error
        self._before = "<unk>"
        self._skip = len(self._model.encode(self._before))

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[_Encoding]:
        return [_Encoding(self._model.encode(f"{self._before}{_SPACE}{text}")[self._skip :]) for text in texts]

    def token_to_id(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)
        return None if found == self._model.unk_id() and token != "<unk>" else found


def _marks(folder: Path, tokenizer: Any, kind: str, about: Mapping[str, Any]) -> Marks:
    """Ids of the marks that the folder's files name, else of the usual ones."""
    special = read_json(folder, "special_tokens_map.json", optional=True)

    def mark(name: str) -> int:
        token = about.get(name) or special.get(name) or _DEFAULT_MARKS[kind][name]
        return find_mark(tokenizer, [token["content"] if isinstance(token, Mapping) else str(token)])

    return Marks(mark("bos_token") if kind == "clip" else None, mark("eos_token"), mark("pad_token"))
