"""The audit of a file counts what was planted, prints one documented object, and draws a self-contained page."""

from __future__ import annotations

import json
import re
import resource
import sys
import time

import numpy as np
import pytest

from protojax.audit import measure
from protojax.audit.tensors import FileError
from protojax.cli import main
from protojax.evals import audit as audit_lib
from protojax.ops.unique import nearest_cosine, unique_groups
from tests.audit.writers import BFLOAT16, Saver, rows, safetensors

KEYS = {
    "version", "file", "format", "key", "layout", "dtype", "weight_norm", "features", "prototypes", "dim", "unique",
    "control", "nearest_cosine", "rows", "undirected", "live", "live_unique", "perplexity", "coverage", "usage",
    "centred", "duplicates", "identical", "spectrum",
}  # fmt: skip
EPSILONS = ["0.025", "0.1", "0.25", "0.5"]


def planted(copies: dict[int, list[int]], count: int = 40, width: int = 64) -> np.ndarray:
    """Orthogonal prototypes in which some rows are near copies of others, at other lengths."""
    made = np.eye(count, width, dtype=np.float32)
    rng = np.random.default_rng(0)
    for source, targets in copies.items():
        made[targets] = made[source] + 0.02 * rng.standard_normal((len(targets), width)).astype(np.float32) / 8
    return made * rng.uniform(0.2, 5.0, (count, 1)).astype(np.float32)


def test_planted_duplicates_are_found_exactly(tmp_path, capsys):
    np.save(tmp_path / "p.npy", planted({3: [7, 20, 39], 11: [30]}))
    assert main(["audit", str(tmp_path / "p.npy"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == KEYS
    assert result["duplicates"] == [[3, 7, 20, 39], [11, 30]]
    assert result["unique"] == dict.fromkeys(EPSILONS, 36)
    assert list(result["control"]) == EPSILONS
    assert (result["prototypes"], result["dim"], result["identical"]) == (40, 64, 0)
    assert result["nearest_cosine"]["1"] > 0.99
    assert result["live"] is None


def test_exact_copies_are_told_from_near_ones():
    rows_ = planted({3: [7]})
    result, _ = measure.measure(np.concatenate([rows_, rows_[:5], 2 * rows_[5:6]]))
    assert result["identical"] == 5
    assert sum(map(len, result["duplicates"])) - len(result["duplicates"]) == 46 - result["unique"]["0.025"] == 7


def test_groups_equal_the_greedy_cover_of_all_rows():
    """Leaving out rows that have no neighbour changes no group, at any epsilon, also among a subset."""
    rng = np.random.default_rng(1)
    made = np.concatenate([rng.standard_normal((60, 6)), rng.standard_normal((3, 6)).repeat(15, axis=0)])
    made = (made + 0.1 * rng.standard_normal(made.shape)).astype(np.float32)[rng.permutation(len(made))]
    nearest = nearest_cosine(made)
    for epsilon in (0.0, 0.02, 0.1, 0.5, 1.0):
        np.testing.assert_array_equal(audit_lib.groups_at(made, epsilon, nearest), unique_groups(made, epsilon))
    among = rng.random(len(made)) < 0.6
    alone = audit_lib.unique_counts(made[among])
    assert audit_lib.unique_counts(made, among=among, nearest=nearest) == alone


def test_the_control_is_drawn_only_where_chance_can_bring_two_together():
    """The expected number of close pairs against a count of them, and the bound against a draw."""
    drawn = rows(0, 3000, 8)
    unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    for epsilon in (0.1, 0.5):
        pairs = (np.count_nonzero(unit @ unit.T > 1 - epsilon) - 3000) / 2
        expected = audit_lib.pairs_expected(3000, 8, epsilon)
        assert abs(pairs - expected) < 8 * np.sqrt(expected)
    assert audit_lib.pairs_expected(65_536, 256, 0.5) < 1e-6
    assert audit_lib.random_unique(300, 64) == audit_lib.unique_counts(
        np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    )


def test_features_give_usage_and_coverage(tmp_path, capsys):
    prototypes = planted({})
    features = np.repeat(prototypes[:10], 12, axis=0) + 0.01
    safetensors(tmp_path / "p.safetensors", {"prototypes": prototypes.astype(BFLOAT16)})
    np.savez(tmp_path / "f.npz", features=features)
    arguments = ["audit", str(tmp_path / "p.safetensors"), f"--features={tmp_path / 'f.npz'}"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["live"], result["live_unique"]["0.025"]) == (120, 10, 10)
    assert result["perplexity"] == pytest.approx(10.0)
    assert result["usage"] == {**dict.fromkeys(result["usage"], 0), "0": 30, "10": 10}
    assert result["dtype"] == "bfloat16"
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "10 of 40 (25.0%) are live" in said
    assert "Does each get work?" in said


def test_the_page_is_self_contained_and_drawn(tmp_path, capsys):
    np.save(tmp_path / "p.npy", planted({3: [7, 20, 39]}))
    np.save(tmp_path / "f.npy", rows(0, 200, 64))
    page = tmp_path / "out.html"
    assert main(["audit", str(tmp_path / "p.npy"), f"--features={tmp_path / 'f.npy'}", f"--out={page}"]) == 0
    text = page.read_text()
    assert str(page) in capsys.readouterr().out
    assert text.count("<svg") == 6
    assert "3, 7, 20, 39" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("prototypes", "features", "message"),
    [
        (np.zeros((3, 4), np.float32), None, r"3 of 3 rows are zero \(first: row 0\)"),
        (np.full((3, 4), np.nan, np.float32), None, "3 of 3 rows hold NaN"),
        (np.eye(4, dtype=np.float16), rows(0, 5, 6), "features have width 6, prototypes 4"),
        (np.eye(4, dtype=np.float32), np.full((2, 4), np.inf, np.float32), "features: 2 of 2 rows hold NaN"),
    ],
)
def test_rows_without_direction_and_other_widths_are_named(prototypes, features, message, tmp_path):
    np.save(tmp_path / "p.npy", prototypes)
    if features is not None:
        np.save(tmp_path / "f.npy", features)
    with pytest.raises(FileError, match=message):
        measure.audit_file(tmp_path / "p.npy", None, None if features is None else tmp_path / "f.npy")


def test_doubt_ends_with_status_2_and_commands_that_work(tmp_path, capsys):
    saver = Saver()
    state = {
        f"teacher.{n}_head.last_layer.weight": saver.tensor(rows(i, 20, 4)) for i, n in enumerate(("dino", "ibot"))
    }
    path = saver.zip(tmp_path / "two heads.pth", {"model": state})
    assert main(["audit", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "2 layers may be the prototypes. Choose one:" in said[0]
    command = re.match(
        r"  protojax audit '(.*)' --key=(\S+)  # \[20, 4\] float32 DINOv2 or DINOv3, image head", said[1]
    )
    assert main(["audit", command[1], f"--key={command[2]}"]) == 0
    assert main(["audit", str(tmp_path / "none.pth")]) == 2


@pytest.mark.slow
def test_65536_random_unit_vectors_are_unique_within_three_minutes():
    """The largest codebook of the paper: 100% unique at 0.5, and the process stays within a few copies of it."""
    made = rows(0, 65_536, 256)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    began = time.process_time()
    result, _ = measure.measure(made)
    spent = time.process_time() - began  # of both cores together: more than the time on the clock
    assert result["unique"] == dict.fromkeys(EPSILONS, 65_536)
    assert result["control"] == result["unique"]
    assert result["duplicates"] == []
    assert result["nearest_cosine"]["1"] < 0.42
    assert spent < 180
    scale = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale < 3 * 2**30
