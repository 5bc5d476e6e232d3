"""Image-text data: pairs stay in step, bad captions are named, and what is drawn is a function of the step."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protojax.data import pairs_registry
from protojax.data.captions import caption_strings, open_captions
from protojax.data.pairs import Pairs, check_pairs, check_text_varies, pair_records, text_tables, token_content
from protojax.data.pairs_npz import open_emoji, open_grocery
from protojax.data.pairs_synthetic import open_synthetic_pairs
from protojax.data.pairs_text import WORD_WIDTH, hashed_texts, longest_of, pool_states, word_vector
from protojax.data.tar_shards import open_tar_shards
from protojax.evals.pair_scores import factor_score


def picture(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = ["path,caption,split"]
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
        rows.append(f"{i}.png,a picture number {i},{'test' if i > 3 else 'train'}")
    rows.append("0.png,another name of nought,train")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    return tmp_path


# ---------------------------------------------------------------------------------------------------- texts
def test_hashed_tower_is_causal_and_reads_spelling():
    texts = hashed_texts(["a red apple", "a green apple", "submarine"])
    assert np.ptp(texts.pooled["bos"], axis=0).max() == 0.0
    unit = {k: v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in texts.pooled.items()}
    for pool in ("eos", "mean"):
        cosines = unit[pool] @ unit[pool].T
        assert cosines[0, 1] > cosines[0, 2]
    assert hashed_texts(["one two three four"], longest=4).cut == 1
    # A caption's states do not depend on what stands beside it.
    np.testing.assert_array_equal(hashed_texts(["submarine"]).pooled["eos"], texts.pooled["eos"][2:])
    with pytest.raises(ValueError, match=r"no word, the first is '!!'"):
        hashed_texts(["fine", "!!"])


def trigrams(word: str) -> set[str]:
    return {f"<{word}>"[i : i + 3] for i in range(len(word))}


def test_words_are_as_near_as_the_trigrams_that_they_share():
    """Half of a vector is the word's own and half the sum of its trigrams', all independent normal numbers: the mean
    product of two words is rho = shared / (2 sqrt(n m)), with a variance of (1 + rho^2) / D."""
    words = ["apple", "barrel", "carrot", "donkey", "elephant", "flower", "garden", "hammer", "island", "jacket",
             "kitten", "lemon", "mountain", "needle", "orange", "pencil"]  # fmt: skip
    pairs = {"plural": [(w, w + "s") for w in words], "other": list(itertools.pairwise(words))}
    for what, known in pairs.items():
        parts = [(trigrams(a), trigrams(b)) for a, b in known]
        rho = np.asarray([len(a & b) / (2.0 * np.sqrt(len(a) * len(b))) for a, b in parts])
        found = [word_vector(a) @ word_vector(b) / WORD_WIDTH for a, b in known]
        error = np.sqrt(np.sum((1.0 + rho**2) / WORD_WIDTH)) / len(known)
        assert np.mean(found) == pytest.approx(np.mean(rho), abs=4 * error), what
        assert (np.mean(rho) > 8 * error) == (what == "plural")  # and so the two kinds are told apart


def test_constant_text_stops_the_build():
    texts = hashed_texts(["a red apple", "a green apple"])
    check_text_varies(texts, "eos")
    with pytest.raises(ValueError, match=r"constant_side: .*'bos' on a causal tower sees only the start token"):
        check_text_varies(texts, "bos")


# ------------------------------------------------------------------------------------------------- synthetic
def test_synthetic_pairs_share_their_factors_and_nothing_stands_at_the_start():
    pairs = open_synthetic_pairs("train", preset="easy", size=600, test_size=8)
    assert pairs.factors is not None
    tokens = pairs.read(np.arange(600))[0]["image_tokens"]
    assert tokens.shape == (600, 29, 64)
    assert np.ptp(tokens[:, 0], axis=0).max() == 0.0
    fit, held = slice(0, 500), slice(500, 600)
    scores = {}
    for pool in ("eos", "bos"):
        rows = pairs.texts.pooled[pool]
        scores[pool] = factor_score(rows[fit], pairs.factors[fit], rows[held], pairs.factors[held])["r2"]
    assert scores["bos"] == pytest.approx(0.0, abs=1e-9)
    # The standard error of an R^2 of nothing, over 100 rows of 24 factors, is sqrt(2 / 2400).
    assert scores["eos"] > 5 * np.sqrt(2 / 2400)
    assert pairs.texts.states is not None
    assert pairs.texts.mask is not None
    states, mask = pairs.texts.states(np.asarray([7, 3])), pairs.texts.mask[[7, 3]]
    pools = pool_states(states, mask, mask.sum(axis=1) - 1)
    for pool, rows in pools.items():
        np.testing.assert_allclose(rows, pairs.texts.pooled[pool][[7, 3]], atol=1e-6)
    same = open_synthetic_pairs("test", preset="long", size=8, test_size=40)
    masked, unmasked = same.texts.pooled["mean"], same.texts.pooled["unmasked_mean"]
    assert np.abs(masked - unmasked).max() > 1e-3  # lengths vary: padding counts there, far above rounding
    with pytest.raises(ValueError, match="preset must be one of"):
        open_synthetic_pairs("train", preset="hard")


# ---------------------------------------------------------------------------------------------- embedded sets
def test_embedded_emoji_and_groceries():
    train, test = open_emoji("train"), open_emoji("test")
    assert (train.size, test.size) == (1523, 377)
    assert not set(train.texts.captions) & set(test.texts.captions)
    row = train.texts.captions.index("red apple")
    apple = train.read(np.asarray([row]))[0]["image"][0].astype(int)
    assert apple.shape == (64, 64, 3)
    assert apple[32, 32, 0] > apple[32, 32, 2] + 50
    few = open_emoji("test", flags=False)
    assert few.size < test.size
    assert not any(c.startswith("flag: ") for c in few.texts.captions)
    classes, names = open_grocery("classes"), open_grocery("class_names")
    assert classes.size == names.size == 81
    assert classes.texts.cut == open_grocery("test").texts.cut == 0
    assert names.texts.captions[:2] == ("Golden Delicious", "Granny Smith")
    assert classes.texts.fingerprint == names.texts.fingerprint == open_grocery("train").texts.fingerprint
    assert open_grocery("test").caption[0][0] == open_grocery("test").labels["fine"][0]


# ----------------------------------------------------------------------------------- sentences, true and false
def nlvr(path: Path, count: int = 9, **changes) -> Path:
    """As many pairs in each of three parts; the first of three is false."""
    images = np.full((count, 50, 200, 3), 128, np.uint8)
    for i, left in enumerate((0, 75, 150)):
        images[:, :, left : left + 50] = 10 * (i + 1)
    arrays = {"images": images, "sentences": np.asarray([f"sentence {i % 4}" for i in range(count)]),
              "is_true": np.arange(count) % 3 > 0, "split": np.arange(count) // (count // 3),
              "split_names": np.asarray(["dev", "test", "hidden"])}  # fmt: skip
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
    return path


def test_sentences_are_trained_on_when_true_and_matched_in_other_parts(tmp_path: Path):
    path = nlvr(tmp_path / "nlvr.npz")
    opened = {s: pairs_registry.open_pairs("nlvr", s, root=path) for s in ("train", "test", "dev_matching")}
    assert {name: p.size for name, p in opened.items()} == {"train": 2, "test": 2, "dev_matching": 3}
    assert opened["train"].texts.captions == ("sentence 3", "sentence 0")  # 7 and 8: the true ones of part hidden
    assert opened["dev_matching"].labels["true"].tolist() == [0, 1, 1]
    square = opened["test"].read(np.asarray([0]))[0]["image"][0, :, :, 0]
    assert square.shape == (110, 110)
    corners = square[[0, 0, 109, 109], [0, 109, 0, 109]]
    assert corners.tolist() == [10, 20, 30, 128]
    assert [int((square == v).sum()) for v in (10, 20, 30)] == [2500] * 3
    assert set(pairs_registry.MORE_SPLITS["nlvr"]) == {"dev_matching", "test_matching"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_true": None}, r"lacks the arrays \['is_true'\]"),
        ({"sentences": np.asarray(["one"])}, "the pairs are out of step: .*'sentences': 1"),
        ({"images": np.zeros((9, 50, 50, 3), np.uint8)}, r"must be \[M,50,200,3\], three boxes"),
        ({"split_names": np.asarray(["dev", "test", "secret"])}, "has no part 'hidden'; it has: dev, test, secret"),
    ],
)
def test_bad_archives_of_sentences_are_named(tmp_path: Path, changes, message):
    with pytest.raises(ValueError, match=message):
        pairs_registry.open_pairs("nlvr", "train", root=nlvr(tmp_path / "nlvr.npz", **changes))


# --------------------------------------------------------------------------------------------------- folders
def test_folder_with_captions(folder: Path):
    train, test = open_captions(str(folder), "train", canvas=8), open_captions(str(folder), "test", canvas=8)
    assert (train.size, test.size) == (4, 2)
    assert [len(c) for c in train.caption] == [2, 1, 1, 1]
    records = pair_records(train, "mean", expanded=False)
    batch = records.take(np.arange(4))
    assert batch["text"].shape == (4, 2, 256)
    assert batch["caption_id"].shape == (4, 2)
    assert batch["caption_id"][1, 0] == batch["caption_id"][1, 1]  # its one caption, repeated
    np.testing.assert_array_equal(batch["text"][0, 1], train.texts.pooled["mean"][batch["caption_id"][0, 1]])
    expanded = pair_records(train, "mean", expanded=True).take(np.arange(5))
    np.testing.assert_array_equal(expanded["image_id"], [0, 0, 1, 2, 3])
    assert train.texts.captions[expanded["caption_id"][1]] == "another name of nought"
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"thing {i}"}) for i in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    again = [
        open_captions(str(folder), s, captions_file="metadata.jsonl", holdout_fraction=0.5) for s in ("train", "test")
    ]
    assert sum(p.size for p in again) == 6
    assert min(p.size for p in again) > 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", "path,caption\n0.png,\n1.png,x", r"1 rows have no caption, the first are rows \[1\]"),
        ("captions.csv", "path,caption\nmissing.png,x", "1 images that do not exist .*'missing.png'"),
        ("captions.csv", "name,words\n0.png,x", "needs the columns 'path' and 'caption'"),
        ("captions.csv", "path,caption,split\n0.png,x,train\n1.png,y,", "1 rows have no split and others do"),
        ("captions.jsonl", "{'not json'}", "line 1: not JSON"),
        ("captions.csv", "path,caption,split\n0.png,x,val\n1.png,y,val", "no split 'train'; it has: val"),
        ("notes.txt", "", "holds no captions file; expected one of captions.csv"),
    ],
)
def test_bad_captions_files_are_named(tmp_path: Path, name, content, message):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_captions(str(tmp_path), "train")


def test_tar_shards_name_and_count_what_is_damaged(tmp_path: Path):
    def add(archive, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))

    with tarfile.open(tmp_path / "train-000.tar", "w") as archive:
        add(archive, "a.jpg", picture(1, "JPEG"))
        add(archive, "a.txt", b"a thing")
        add(archive, "b.jpg", picture(2, "JPEG"))
        add(archive, "b.json", json.dumps({"caption": "another thing"}).encode())
        add(archive, "lone.jpg", picture(3, "JPEG"))
        add(archive, "blank.jpg", picture(4, "JPEG"))
        add(archive, "blank.txt", b" ")
    whole = (tmp_path / "train-000.tar").read_bytes()
    (tmp_path / "train-001.tar").write_bytes(whole[: 512 + 100])
    pairs = open_tar_shards(str(tmp_path), "train", canvas=8)
    assert pairs.size == 2
    assert pairs.texts.captions == ("a thing", "another thing")
    assert pairs.read(np.asarray([1]))[0]["image"].shape == (1, 8, 8, 3)
    told = " ".join(pairs.problems())
    assert "lone: no caption" in told
    assert "blank: empty caption" in told
    assert "train-001.tar" in told
    with pytest.raises(ValueError, match=r"no shard matches 'test-\*.tar'"):
        open_tar_shards(str(tmp_path), "test")


# -------------------------------------------------------------------------------------------------- bad input
def test_pairs_out_of_step_and_tokens_without_content():
    good = open_synthetic_pairs("test", preset="easy", size=8, test_size=8)
    with pytest.raises(ValueError, match="8 images and 7 captions: the pairs are out of step"):
        check_pairs(good._replace(caption=good.caption[1:]))
    with pytest.raises(ValueError, match=r"1 images have no valid token, the first are \[1\]"):
        token_content(np.zeros((2, 3, 4), np.float32), np.asarray([[True] * 3, [False] * 3]), "x")
    with pytest.raises(ValueError, match="unknown image-text data 'emojy'; did you mean 'emoji'"):
        pairs_registry.open_pairs("emojy", "train")
    with pytest.raises(ValueError, match=r"needs data\.root"):
        pairs_registry.open_pairs("captions", "train")
    with pytest.raises(ValueError, match="no option 'flag'"):
        pairs_registry.open_pairs("emoji", "train", flag=True)
    assert isinstance(good, Pairs)
    assert caption_strings({"captions": {"text": [b"one", "two"]}}, "captions/text") == ["one", "two"]
    with pytest.raises(ValueError, match="no caption feature 'title'"):
        caption_strings({"captions": {}}, "title")


def test_caches_of_frozen_towers(tmp_path: Path):
    draw = np.random.default_rng(0)
    arrays = {"image_tokens": draw.normal(size=(6, 3, 4)).astype(np.float16), "text_mean": draw.normal(size=(6, 5)),
              "caption_id": np.asarray([7, 7, 8, 9, 10, 11]), "is_test": np.arange(6) > 3}  # fmt: skip
    np.savez(tmp_path / "cache.npz", **arrays)
    pairs = pairs_registry.open_pairs("pairs_npz", "train", root=tmp_path / "cache.npz")
    assert pairs.size == 4
    assert len(pairs.texts.captions) == 3
    batch = pair_records(pairs, "mean", expanded=False).take(np.arange(4))
    assert batch["caption_id"][0] == batch["caption_id"][1] != batch["caption_id"][2]
    np.testing.assert_allclose(batch["text"][2], arrays["text_mean"][2], rtol=1e-6)
    np.savez(tmp_path / "short.npz", **(arrays | {"text_mean": np.ones((5, 5))}))
    with pytest.raises(ValueError, match="6 images but 5 entries of 'text_mean': the pairs are out of step"):
        pairs_registry.open_pairs("pairs_npz", "train", root=tmp_path / "short.npz")
    repeated = {k: v for k, v in arrays.items() if k != "caption_id"} | {"text_mean": np.ones((6, 5))}
    np.savez(tmp_path / "same.npz", **repeated)
    with pytest.warns(UserWarning, match="75% of the captions repeat another and caption_id is missing"):
        pairs_registry.open_pairs("pairs_npz", "train", root=tmp_path / "same.npz")


def hidden_cache(**changes):
    """Six captions of four positions; the end token is the last valid one."""
    draw = np.random.default_rng(0)
    length = np.asarray([2, 3, 4, 2, 3, 4])
    arrays = {
        "image_tokens": draw.normal(size=(6, 3, 4)).astype(np.float16),
        "text_hidden": draw.normal(size=(6, 4, 5)),
        "text_mask": np.arange(4)[None, :] < length[:, None],
        "text_eos": length - 1,
        "caption_id": np.arange(6),
    }
    return {k: v for k, v in (arrays | changes).items() if v is not None}


def test_caches_of_every_position_give_all_pools(tmp_path: Path):
    arrays = hidden_cache(caption_id=np.asarray([0, 0, 1, 2, 3, 4]))
    np.savez(tmp_path / "cache.npz", **arrays)
    pairs = pairs_registry.open_pairs("pairs_npz", "all", root=tmp_path / "cache.npz")
    expected = pool_states(arrays["text_hidden"].astype(np.float32), arrays["text_mask"], arrays["text_eos"])
    assert set(pairs.texts.pooled) == set(expected)
    for pool, rows in expected.items():
        batch = pair_records(pairs, pool, expanded=False).take(np.arange(6))
        np.testing.assert_allclose(batch["text"][2:], rows[2:], atol=1e-6)
    batch = pair_records(pairs, "states", expanded=False).take(np.asarray([5, 1]))
    np.testing.assert_allclose(batch["text_states"], arrays["text_hidden"][[5, 0]], rtol=1e-6)
    np.testing.assert_array_equal(batch["text_mask"], arrays["text_mask"][[5, 0]])
    np.savez(tmp_path / "noend.npz", **hidden_cache(text_eos=None))
    without = pairs_registry.open_pairs("pairs_npz", "all", root=tmp_path / "noend.npz")
    assert "eos" not in without.texts.pooled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_mask": None}, r"text_hidden must be \[M,S,D\] with text_mask \[M,S\]; got \[6, 4, 5\] and none"),
        ({"text_mask": np.ones((6, 3), bool)}, r"got \[6, 4, 5\] and \[6, 3\]"),
        ({"text_mask": np.arange(6)[:, None] + np.zeros((1, 4)) != 2}, r"1 captions hold padding alone, .* \[2\]"),
        ({"text_eos": np.asarray([1, 9, 3, 1, 2, 3])}, r"text_eos names no valid position in 1 rows, .* \[1\]"),
        ({"text_eos": np.asarray([1, 3, 3, 1, 2, 3])}, r"text_eos names no valid position in 1 rows, .* \[1\]"),
        ({"text_hidden": None, "text_mask": None, "text_eos": None}, "holds no text: give 'captions', 'text_hidden'"),
    ],
)
def test_bad_caches_of_every_position_are_named(tmp_path: Path, changes, message):
    np.savez(tmp_path / "cache.npz", **hidden_cache(**changes))
    with pytest.raises(ValueError, match=message):
        pairs_registry.open_pairs("pairs_npz", "all", root=tmp_path / "cache.npz")


def test_states_that_were_not_kept_and_towers_that_are_not_ours():
    texts = hashed_texts(["a red apple", "a green apple"])
    with pytest.raises(ValueError, match=r"'hashed-128-77' are kept pooled: shared_resampler reads states"):
        text_tables(texts._replace(states=None), "states")
    assert longest_of(hashed_texts(["a red apple"], longest=9).fingerprint) == 9
    with pytest.raises(ValueError, match="texts of the tower 'clip-7', which is not in the package"):
        longest_of("clip-7")
