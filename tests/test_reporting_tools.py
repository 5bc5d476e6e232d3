"""Browser screenshots: the small tool beside the report."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from protojax.evals.audit import Usage
from protojax.reporting import shots
from protojax.reporting.data import class_arrays


def test_shots_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no report at .*train a run first"):
        shots.screenshots(tmp_path / "report.html", tmp_path)
    with pytest.raises(ValueError, match=r"no browser found \(looked for no-such-browser\): install Chromium"):
        shots.find_browser("no-such-browser")
    assert shots.main([str(tmp_path / "report.html")]) == 2
    with pytest.raises(ValueError, match=r"no report in .*train a run first"):
        shots.pages_of(tmp_path)


def test_shots_of_a_folder_of_runs_are_of_all_its_pages(tmp_path: Path) -> None:
    pages = [tmp_path / name for name in ("a/report.html", "b/report.html", "compare.html")]
    for page in pages:
        page.parent.mkdir(exist_ok=True)
        page.write_text("", encoding="utf-8")
    assert shots.pages_of(tmp_path) == pages
    assert shots.pages_of(tmp_path / "a") == shots.pages_of(pages[0]) == pages[:1]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, shots.BROWSERS)), reason="no Chromium on this machine")
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


def test_class_arrays_say_whose_prototypes_are_whose() -> None:
    """Three prototypes: one of apples alone, one that three pears share with an apple, one that nobody chose; a class
    without a prototype of its own is counted with its cosine. A row without direction counts for no prototype."""
    nearest = np.array([0, 0, 1, 1, 1, 1, 1, -1])
    fine = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    cosines = np.array([0.9, 0.7, 0.5, 0.6, 0.6, 0.6, 0.4, 0.0])
    used = Usage(np.bincount(nearest[:-1], minlength=3) / 8, nearest, float(cosines.mean()), 1, cosines)
    bank = SimpleNamespace(labels={"fine": fine})
    specs = {"bank": SimpleNamespace(classes={"fine": ("apple", "pear", "plum")})}
    found = class_arrays(SimpleNamespace(bank=lambda split: bank, specs=specs), used, np.array([1, 0, 2]))
    assert found["sample_names"].tolist() == ["pear", "apple", ""]
    np.testing.assert_allclose(found["sample_purity"], [3 / 5, 1.0, 0.0])
    assert found["class_counts"].tolist() == [3, 3, 2]
    assert found["class_prototypes"].tolist() == [1, 1, 0]
    np.testing.assert_allclose(found["class_coverage"], [0.7, 0.6, 0.2])
    bank.labels = {}
    assert class_arrays(SimpleNamespace(bank=lambda split: bank, specs=specs), used, np.array([0])) == {}
