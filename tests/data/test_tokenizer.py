"""Byte-pair tokenizers: the same for the same captions, end tokens that survive cutting, clear errors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from protojax.data import tokenizer as tokens
from protojax.models.text import check_token_ids

CAPTIONS = ["a red apple", "a green apple on a table", "two submarines", "a red submarine"] * 5


@pytest.fixture
def trained():
    return tokens.train_tokenizer(CAPTIONS, 320)


def test_ids_masks_and_cuts(trained, tmp_path: Path):
    ids, mask, cut = tokens.tokenise(trained, ["a red apple", "zebra " * 30], 8)
    assert (ids.shape, cut) == ((2, 8), 1)
    assert ids[0, 0] == ids[1, 0] == 1
    last = mask.sum(axis=1) - 1
    assert (ids[np.arange(2), last] == 2).all()  # the end token, of the cut caption too
    assert (ids[~mask] == 0).all()
    check_token_ids(ids, mask, trained.get_vocab_size())
    again = tokens.train_tokenizer(CAPTIONS, 320)
    assert again.to_str() == trained.to_str()
    (tmp_path / "tokenizer.json").write_text(trained.to_str())
    loaded = tokens.load_tokenizer(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(tokens.tokenise(loaded, ["a red apple"], 8)[0], ids[:1])
    texts = tokens.token_texts(["a red apple"], trained, 8)
    assert texts.fingerprint.endswith(f"-{trained.get_vocab_size()}")
    with pytest.raises(ValueError, match="at least 3"):
        tokens.tokenise(trained, ["x"], 2)


def test_what_is_refused(monkeypatch, tmp_path: Path):
    with pytest.raises(ValueError, match="at least 300 pieces, got 100"):
        tokens.train_tokenizer(CAPTIONS, 100)
    with pytest.raises(ValueError, match="no such tokenizer file"):
        tokens.load_tokenizer(tmp_path / "none.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="need the package 'tokenizers': pip install tokenizers"):
        tokens.train_tokenizer(CAPTIONS, 320)
