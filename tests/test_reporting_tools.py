"""TensorBoard files and browser screenshots: the small tools beside the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from protojax.reporting import shots
from protojax.reporting.tensorboard import TensorBoardWriter


def test_tensorboard_files_hold_what_was_written(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path / "tb") as writer:
        writer.scalars(3, {"knn": {"fine": {"20": 0.25}}, "empty": None, "word": "x", "flag": True})
        writer.histogram(3, "usage", np.asarray([0.1, 0.2, np.nan]))
        writer.histogram(3, "nothing", np.asarray([np.nan]))
        writer.flush()
    writer.scalars(4, {"late": 1.0})
    content = b"".join(file.read_bytes() for file in (tmp_path / "tb").iterdir())
    assert b"knn/fine/20" in content
    assert b"usage" in content
    assert [name for name in (b"empty", b"word", b"flag", b"nothing", b"late") if name in content] == []


def test_tensorboard_disabled_or_blocked(tmp_path: Path) -> None:
    TensorBoardWriter(tmp_path / "none", enabled=False).scalars(1, {"loss": 1.0})
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot write TensorBoard files to .*choose a --workdir"):
        TensorBoardWriter(tmp_path / "file" / "tb")


def test_shots_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no report at .*train a run first"):
        shots.screenshots(tmp_path / "report.html", tmp_path)
    with pytest.raises(ValueError, match=r"no browser found \(looked for no-such-browser\): install Chromium"):
        shots.find_browser("no-such-browser")
    assert shots.main([str(tmp_path / "report.html")]) == 2


@pytest.mark.slow
def test_shots_find_what_is_wrong_with_a_page(tmp_path: Path) -> None:
    """In a real browser: a page that is too wide, has a broken image and asks for a file outside fails on each count;
    a sound one passes at every width and scheme, and dark differs from light."""
    sound = tmp_path / "sound.html"
    style = "<style>@media (prefers-color-scheme: dark) { body { background: #000 } }</style>"
    head = '<!DOCTYPE html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    sound.write_text(f"{head}{style}<p>text", encoding="utf-8")
    looks = shots.screenshots(sound, tmp_path / "shots")
    assert [(look.width, look.scheme, look.problems) for look in looks] == [
        (width, scheme, ()) for width in (390, 1280) for scheme in ("light", "dark")
    ]
    assert looks[0].files[0].read_bytes() != looks[1].files[0].read_bytes()
    bad = tmp_path / "bad.html"
    bad.write_text(f'{head}<img src="gone.png"><div style="width:900px">wide</div>', encoding="utf-8")
    (look,) = shots.screenshots(bad, tmp_path / "shots", [390], ["light"])
    assert [problem.split(" ")[:2] for problem in look.problems] == [["it", "asked"], ["it", "is"], ["1", "of"]]
