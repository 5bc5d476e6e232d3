"""One HTML page a run: self-contained, escaped, honest about what is missing."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protojax.report import write_report
from protojax.reporting import plots, records
from protojax.reporting.facts import facts_of
from protojax.reporting.verdict import collapsed, findings, learned, next_steps, suffering

K, D = 64, 16
EPSILONS = ("0.025", "0.1", "0.25", "0.5")


def audit(unique: float, live: float, live_unique: float) -> dict:
    """A prototype audit; arguments are shares of K."""
    counts = {e: round(K * unique ** (1 + i / 2)) for i, e in enumerate(EPSILONS)}
    alive = {e: round(K * live_unique ** (1 + i / 2)) for i, e in enumerate(EPSILONS)}
    usage = {"0": K - round(K * live), "0.3": round(K * live), "inf": 0}
    cosine = {"q05": 0.1, "q50": 0.3, "q95": 0.6, "max": 0.9}
    body = {"unique": counts, "live": round(K * live), "live_unique": alive, "perplexity": K * live * 0.9}
    body |= {"coverage": 0.8 + 0.1 * live, "nearest_cosine": cosine, "usage": usage}
    return {"count": K, "dim": D, **body, "centred": body}


def evaluation(knn: float, unique: float = 1.0, live: float = 0.95, live_unique: float = 0.9) -> dict:
    groups = {"fine": {"head": knn * 1.2, "medium": knn, "tail": knn * 0.6, "balanced": knn * 0.9}}
    groups["coarse"] = {"head": knn * 2, "medium": knn * 1.6, "tail": None, "balanced": knn * 1.7}
    scores = {"fine": {"10": knn * 0.98, "20": knn}, "coarse": {"10": knn * 1.7, "20": knn * 1.8}}
    return {"knn": scores, "groups": groups, "effective_rank": 30.0, "prototypes": audit(unique, live, live_unique)}


def write_run(
    path: Path, arm: str = "decoupled", finished: bool = True, arrays: bool = True, end: float = 0.18
) -> Path:
    """A run directory as the trainer leaves it: 600 steps, 13 evaluations, one finding."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines: list[dict] = []
    for step in range(0, 601, 10):
        done = step / 600
        if step:
            metrics = {"loss/consistency": 4.1 - 1.4 * done + 0.1 * rng.standard_normal(), "loss/chance": np.log(K)}
            metrics["loss/regulariser"] = 0.2 * (1 - done) + 0.02 * rng.random()
            metrics["loss/total"] = metrics["loss/consistency"] + metrics["loss/regulariser"]
            metrics |= {"grad_norm": 1 + 3 * rng.random(), "estimator/usage_perplexity": K * (0.5 + 0.4 * done)}
            rate = 410 + 15 * rng.standard_normal()
            record = {"kind": "train", "step": step, "fraction": done, "seconds": step / 5, "images_per_second": rate}
            lines.append(record | {"metrics": metrics})
        if step % 50 == 0:
            fall = 0.7 * done if arm == "joint" else 0.05 * done
            metrics = evaluation(
                0.09 + (end - 0.09) * done, 1 - fall, 0.3 + 0.65 * done, (0.3 + 0.6 * done) * (1 - fall)
            )
            lines.append({"kind": "eval", "step": step, "fraction": done, "metrics": metrics})
    finding = {"kind": "diagnosis", "step": 300, "detector": "dead_prototypes", "severity": "warning"}
    finding |= {
        "evidence": "38% of 64 prototypes are dead.",
        "cause": "The start missed the data.",
        "advice": "Start from data.",
    }
    lines += [finding, {"kind": "event", "step": 0, "event": "resume", "text": "from step 0"}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = {"name": "quickstart", "arm": arm, "seed": 0, "method": {"steps": 600}}
    versions = {"jax": "0.11.0", "python": "3.12"}
    (path / "config.json").write_text(json.dumps({"config": config, "versions": versions}), encoding="utf-8")
    if finished:
        summary = {"version": 1, "arm": arm, "seed": 0, "steps": 600, "images_per_second": 410.0, "name": "quickstart"}
        last = next(line for line in reversed(lines) if line["kind"] == "eval")["metrics"]
        controls = {"untrained_knn": evaluation(0.09)["knn"], "random_unique": dict.fromkeys(EPSILONS, K)}
        controls["initial_unique"] = dict.fromkeys(EPSILONS, K)
        summary |= last | {"controls": controls, "versions": versions, "finished": True, "device": "cpu x 2"}
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if arrays:
        write_arrays(path)
    return path


def write_arrays(path: Path) -> None:
    rng = np.random.default_rng(1)
    prototypes = rng.standard_normal((K, D)).astype(np.float32)
    prototypes[1:4] = prototypes[0]
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    usage = np.sort(rng.exponential(1.0, K)).astype(np.float32)
    usage[:5] = 0
    hue = rng.integers(0, 255, (6, 1, 1, 1, 3))
    images = np.clip(hue + rng.integers(-60, 60, (6, 8, 16, 16, 3)), 0, 255).astype(np.uint8)
    np.savez(
        path / "report_data.npz",
        prototypes=prototypes,
        usage=usage / usage.sum(),
        similarity=prototypes @ prototypes.T,
        sample_prototypes=np.arange(6) * 7,
        sample_images=images,
        sample_names=np.array([f"fruit {i}" for i in range(6)]),
        sample_purity=np.linspace(0.3, 1.0, 6),
        class_counts=np.arange(4, 24),
        class_coverage=np.linspace(0.5, 0.9, 20),
        class_prototypes=np.arange(20) // 4,
        projection=prototypes[:, :2],
    )


class Reader(HTMLParser):
    """Collects what a browser would fetch, the tags that are open at the end, and ids."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "use", "rect", "image", "line", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            assert not name.startswith("on"), f"script in attribute {name}"
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.fetched.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name in ("style", "clip-path", "fill"):
                self.fetched += re.findall(r"url\(([^)]*)\)", value or "")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = write_run(tmp_path_factory.mktemp("runs") / "quickstart-decoupled")
    return run, write_report(run).read_text(encoding="utf-8")


def edit(run: Path, name: str, change: dict) -> None:
    path = run / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the page
def test_page_names_no_outside_url_and_embeds_every_image(finished: tuple[Path, str]) -> None:
    _, html = finished
    page = Reader(html)
    assert page.open == []
    assert [url for url in page.fetched if not url.startswith(("data:", "#"))] == []
    assert re.findall(r"(?:https?|ftp|file)://|@import", html) == []
    assert page.tags.count("script") == 0
    images = [url for url in page.fetched if url.startswith("data:image/")]
    for url in images:
        with Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))) as picture:
            picture.load()
            assert min(picture.size) > 1
    assert page.tags.count("img") == 6 * 8
    assert len(images) >= 6 * 8 + 2  # and the colour maps inside the plots
    # Inner links of the plots resolve, and no two plots share an id.
    assert len(set(page.ids)) == len(page.ids)
    assert {url[1:] for url in page.fetched if url.startswith("#")} <= set(page.ids)


def test_plots_take_their_colours_from_the_page(finished: tuple[Path, str]) -> None:
    _, html = finished
    drawings = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 14
    declared = set(re.findall(r"(--[a-z0-9]+):", html))
    for drawing in drawings:
        used = set(re.findall(r"var\((--[a-z0-9]+)\)", drawing))
        assert used & {"--ink", "--muted"}
        assert used <= declared
        assert re.findall(r"(?:fill|stroke): #0[0-9a-f]{5}", drawing) == []
    light, dark = (set(re.findall(r"(--[a-z0-9]+): #", block)) for block in _themes(html))
    assert light == dark


def _themes(html: str) -> tuple[str, str]:
    style = html[html.index("<style>") : html.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    return light, dark[: dark.index("box-sizing")]


def test_page_answers_the_questions_before_the_plots(finished: tuple[Path, str]) -> None:
    _, html = finished
    order = [html.index(part) for part in ("Did it learn?", "Did the prototypes collapse?", "Which groups suffer?")]
    order += [html.index(part) for part in ("Findings</h2>", "What next</h2>", "k-NN accuracy</h3>")]
    assert order == sorted(order)
    assert "2.00 times as much now" in html
    assert "Uniqueness alone proves nothing: of 64 random directions in 16 dimensions, 64 are unique at 0.5" in html
    assert "dead_prototypes, step 300" in html
    assert "38% of 64 prototypes are dead." in html
    assert "of images, 30% of them fruit 0" in html
    assert "4 of 20 classes are the commonest one in no live prototype, 4 of them in the rarer half" in html
    assert "--config.method.steps=1200" in html
    assert "--config.seed=1" in html


def test_all_text_is_escaped(tmp_path: Path) -> None:
    evil = '</title></svg><script>alert(1)</script><img src="http://evil.example/x" onerror=a>&$x$'
    run = write_run(tmp_path / "a&<b>")
    edit(run, "summary.json", {"arm": evil, "name": evil, "device": evil, "versions": {evil: evil}})
    edit(run, "config.json", {"config": {evil: evil}, "versions": {evil: evil}})
    groups = {evil: {evil: 0.5, "tail": 0.1}}
    metrics = {"knn": {evil: {"20": 0.3}}, "groups": groups, "prototypes": {"centred": {evil: evil}}}
    lines = [{"kind": "diagnosis", "step": 1, "detector": evil, "severity": evil, "evidence": evil, "advice": [evil]}]
    lines += [{"kind": "event", "step": 1, "event": evil, "text": evil}]
    lines += [{"kind": "train", "step": 1, "metrics": {f"loss/{evil}": 1.0}}]
    lines += [{"kind": "eval", "step": 700, "metrics": metrics}]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines) + evil)
    html = write_report(run).read_text(encoding="utf-8")
    page = Reader(html)
    assert page.tags.count("script") == 0
    assert page.tags.count("title") == 1
    assert [url for url in page.fetched if not url.startswith(("data:", "#"))] == []


def test_missing_pieces_are_said_not_broken(tmp_path: Path) -> None:
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "metrics": {}}\n', encoding="utf-8")
    html = write_report(run).read_text(encoding="utf-8")
    assert Reader(html).open == []
    assert html.count("Not shown:") == 14
    for said in ("not finished", "report_data.npz is absent", "config.json is absent", "summary.json is absent"):
        assert said in html
    assert html.count("Not known") == 4


def test_unfinished_run_uses_its_last_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "quickstart-joint", "joint", finished=False, arrays=False)
    facts = facts_of(records.load_run(run))
    assert (facts.arm, facts.seed, facts.steps, facts.finished) == ("joint", 0, 600, False)
    assert facts.knn["fine"] == pytest.approx(0.18)
    assert facts.untrained_knn["fine"] == pytest.approx(0.09)
    assert facts.initial.unique[0.5] == K
    html = write_report(run).read_text(encoding="utf-8")
    assert "the last evaluation, step 600, because summary.json is absent" in html
    assert "same command resumes it" in html


def test_a_stopped_run_is_not_called_finished(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arrays=False)
    edit(run, "summary.json", {"finished": False})
    html = write_report(run).read_text(encoding="utf-8")
    assert "This run is not finished. Final numbers are from summary.json of a run that was stopped." in html


def test_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arrays=False)
    again = {"kind": "train", "step": 600, "images_per_second": 100.0, "metrics": {"loss/total": 9.0}}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(again) + "\n")
    steps, values = records.series(records.load_run(run).train, "metrics", "loss/total")
    assert np.all(np.diff(steps) > 0)
    assert values[-1] == 9.0


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('[1]\n{"kind": "eval"}\n{"kind": "train", "step": 610, "metr')
    (run / "summary.json").write_text("{", encoding="utf-8")
    (run / "config.json").write_text("[]", encoding="utf-8")
    data = (run / "report_data.npz").read_bytes()
    (run / "report_data.npz").write_bytes(data[: len(data) // 2])
    problems = records.load_run(run).problems
    expected = (
        r"metrics.jsonl line 76 has no kind of train, eval, diagnosis, event: skipped",
        r"metrics.jsonl line 77 has no step: skipped",
        r"metrics.jsonl line 78 is not JSON \(.*\): skipped",
        r"summary.json is damaged \(.*\): not used",
        r"config.json holds a list, expected an object: not used",
        r"report_data.npz is damaged \(.*\)",
    )
    for pattern, problem in zip(expected, problems, strict=True):
        assert re.match(pattern, problem), (pattern, problem)
    html = write_report(run).read_text(encoding="utf-8")
    assert "What this page could not use" in html


def test_arrays_that_disagree_are_not_paired(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arrays=False)
    arrays = {"prototypes": np.eye(4), "usage": np.ones(5), "sample_images": np.zeros((2, 3, 4))}
    np.savez(run / "report_data.npz", **arrays)
    loaded = records.load_run(run)
    assert set(loaded.arrays) == {"prototypes"}
    assert any("usage and prototypes do not agree in shape ((5,) and (4, 4))" in p for p in loaded.problems)
    assert any("sample_images has shape (2, 3, 4), expected 5 axes" in p for p in loaded.problems)


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run directory .*nowhere: it does not exist. Give the --workdir"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="file is a file, expected a run directory"):
        write_report(tmp_path / "file")
    with pytest.raises(ValueError, match=r"holds neither metrics.jsonl nor summary.json"):
        write_report(tmp_path)


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arrays=False)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 610, "metrics": {"loss/total": NaN, "grad_norm": null}}\n')
    steps, values = records.series(records.load_run(run).train, "metrics", "loss/total")
    assert (steps[-1], np.isnan(values[-1])) == (610, True)
    assert "1 values were not finite and are gaps" in write_report(run).read_text(encoding="utf-8")


def test_thinning_keeps_the_mean_and_the_range() -> None:
    steps = np.arange(100_000.0)
    values = np.sin(steps / 1e4)
    thin_steps, thin_values = plots.thin(steps, values)
    assert thin_steps.size == plots.MOST_POINTS
    assert thin_values.mean() == pytest.approx(values.mean(), abs=1e-9)
    assert np.all(np.diff(thin_steps) > 0)
    assert np.isnan(plots.thin(steps, np.full_like(steps, np.nan))[1]).all()


# ---------------------------------------------------------------------------------------------- the verdict
@pytest.mark.parametrize(
    ("unique", "live", "live_unique", "status", "answer"),
    [
        (64, 62, 60, "good", "No"),
        (50, 62, 60, "warn", "In part"),
        (20, 62, 60, "bad", "Yes"),
        (64, 62, 20, "bad", "Yes"),
        (64, 6, 6, "bad", "Most are dead"),
        (64, 0, 0, "bad", "Most are dead"),
    ],
)
def test_collapse_verdict(tmp_path: Path, unique: int, live: int, live_unique: int, status: str, answer: str) -> None:
    """Unique prototypes without use are not praised; neither are prototypes in use that are copies."""
    run = write_run(tmp_path / "run", arrays=False)
    prototypes = {"count": K, "dim": D, "unique": {"0.5": unique}, "live": live, "live_unique": {"0.025": live_unique}}
    edit(run, "summary.json", {"prototypes": prototypes})
    verdict = collapsed(facts_of(records.load_run(run)))
    assert verdict.status == status
    if answer != "Yes" or live_unique == 60:
        assert verdict.answer == answer


@pytest.mark.parametrize(("end", "status"), [(0.18, "good"), (0.12, "warn"), (0.095, "bad")])
def test_learning_verdict(tmp_path: Path, end: float, status: str) -> None:
    run = records.load_run(write_run(tmp_path / "run", arrays=False, end=end))
    assert learned(run, facts_of(run)).status == status


def test_group_verdict_names_the_worst_and_says_what_is_empty(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arrays=False)
    assert suffering(facts_of(records.load_run(run))).answer == "Tail classes"
    edit(run, "summary.json", {"groups": {"fine": {"head": 0.2, "medium": 0.19, "tail": None, "balanced": 0.2}}})
    answer = suffering(facts_of(records.load_run(run)))
    assert answer.status == "good"
    assert "No class falls into: tail." in answer.sentences


def test_findings_are_merged_and_errors_come_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arrays=False)
    lines = [{"kind": "diagnosis", "step": s, "detector": "dead_prototypes", "severity": "notice"} for s in (100, 500)]
    lines.append({"kind": "diagnosis", "step": 550, "detector": "not_finite", "severity": "error"})
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    merged = findings(facts_of(records.load_run(run)))
    assert [(f.detector, f.severity, f.first, f.last, f.times) for f in merged] == [
        ("not_finite", "error", 550, 550, 1),
        ("dead_prototypes", "warning", 100, 500, 3),
    ]


def test_a_collapsed_joint_run_is_sent_to_its_decoupled_twin(tmp_path: Path) -> None:
    run = records.load_run(write_run(tmp_path / "quickstart-joint", "joint", arrays=False))
    commands = "\n".join(command or "" for _, command in next_steps(run, facts_of(run)))
    assert "--config=quickstart:arm=decoupled" in commands
    assert f"protojax compare {tmp_path}/quickstart-joint {tmp_path}/quickstart-decoupled" in commands


def test_a_name_that_is_no_config_is_not_passed_off_as_one(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", "joint", arrays=False)
    edit(path, "summary.json", {"name": "my-own"})
    run = records.load_run(path)
    commands = "".join(command or "" for _, command in next_steps(run, facts_of(run)))
    assert "--config=CONFIG_FILE:arm=decoupled" in commands
