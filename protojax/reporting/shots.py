"""Look at a report in a real browser: screenshots at two widths, light and dark, and what is wrong with the page.

    python -m protojax.reporting.shots runs/quickstart-decoupled/report.html

A headless Chromium is driven through its DevTools pipe, because only that sets a phone's width, the colour scheme and
the full height of the page. Exit status 1 when the page overflows its width, an image is broken or anything outside
the page was requested.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
VIEW_HEIGHT = 900
# Browsers paint wrongly beyond the largest texture: long pages are cut into pieces.
PIECE_HEIGHT = 4000
PATIENCE = 60.0
PHONE_WIDTH = 600
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
)
_PROBE = """JSON.stringify({
  height: Math.ceil(document.documentElement.getBoundingClientRect().height),
  scroll: document.documentElement.scrollWidth,
  broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
  images: document.images.length, drawings: document.querySelectorAll('figure svg').length})"""


@dataclass(frozen=True)
class Look:
    """One rendering. files: its screenshots, top to bottom. problems: sentences, empty where the page is sound.
    images, drawings: how many pictures and plots the page shows."""

    width: int
    scheme: str
    files: tuple[Path, ...]
    problems: tuple[str, ...]
    images: int
    drawings: int


def find_browser(name: str | None = None) -> str:
    """Path of a Chromium-like browser: the one named, or the first known name on PATH.

    Raises:
      ValueError: there is none.
    """
    for candidate in (name,) if name else BROWSERS:
        path = shutil.which(candidate)
        if path:
            return path
    wanted = name or ", ".join(BROWSERS)
    raise ValueError(f"no browser found (looked for {wanted}): install Chromium or give --browser=PATH.")


class Browser:
    """A headless browser and one open page, spoken to over DevTools messages on a pipe."""

    def __init__(self, binary: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="protojax-shots-", ignore_cleanup_errors=True)
        reads, self._send = os.pipe()
        self._receive, writes = os.pipe()
        # DevTools reads descriptor 3 and writes descriptor 4; a shell puts them there whatever their numbers are here.
        flags = " ".join((*_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "about:blank"))
        script = f'exec "$0" {flags} 3<&{reads} 4>&{writes}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, binary],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._buffer, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a DevTools command and wait for its answer; requests seen meanwhile are remembered."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise ValueError(f"the browser refused {method}: {answer['error'].get('message')}")
                return answer["result"]

    def wait(self, event: str) -> None:
        """Wait for an event of the page."""
        while self._next().get("method") != event:
            pass

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._receive, 1 << 16) if ready else b""
            if not chunk:
                raise ValueError(f"the browser did not answer within {PATIENCE:.0f} s or ended: try it by hand.")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._send)
        os.close(self._receive)
        self._profile.cleanup()


def screenshots(
    report: str | Path,
    out: str | Path,
    widths: Sequence[int] = WIDTHS,
    schemes: Sequence[str] = SCHEMES,
    browser: str | None = None,
) -> list[Look]:
    """Render a page at each width (CSS pixels) in each colour scheme and write PNGs of its full height to `out`.

    Raises:
      ValueError: the page does not exist, no browser is found, or the browser fails.
    """
    page = Path(report).resolve()
    if not page.is_file():
        raise ValueError(f"no report at {page}: train a run first, or give the path of its report.html.")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    session = Browser(find_browser(browser))
    try:
        return [_look(session, page, folder, width, scheme) for width in widths for scheme in schemes]
    finally:
        session.close()


def _look(session: Browser, page: Path, folder: Path, width: int, scheme: str) -> Look:
    phone = width < PHONE_WIDTH
    metrics = {"width": width, "height": VIEW_HEIGHT, "deviceScaleFactor": 1, "mobile": phone}
    session.call("Emulation.setDeviceMetricsOverride", **metrics)
    session.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    session.requests.clear()
    session.call("Page.navigate", url=page.as_uri())
    session.wait("Page.loadEventFired")
    seen = json.loads(session.call("Runtime.evaluate", expression=_PROBE)["result"]["value"])
    files = []
    for number, top in enumerate(range(0, seen["height"], PIECE_HEIGHT), start=1):
        clip = {"x": 0, "y": top, "width": width, "height": min(PIECE_HEIGHT, seen["height"] - top), "scale": 1}
        shot = session.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        files.append(folder / f"{page.stem}-{width}-{scheme}-{number}.png")
        files[-1].write_bytes(base64.b64decode(shot["data"]))
    outside = sorted({url for url in session.requests if not url.startswith("data:") and url != page.as_uri()})
    problems = [f"it asked for {url}" for url in outside]
    if seen["scroll"] > width:
        problems.append(f"it is {seen['scroll']} pixels wide, expected at most {width}")
    if seen["broken"]:
        problems.append(f"{seen['broken']} of {seen['images']} images are broken")
    return Look(width, scheme, tuple(files), tuple(problems), seen["images"], seen["drawings"])


def pages_of(given: Path) -> list[Path]:
    """The page given; of a run directory its report; of a folder of runs every page in it and in its runs.

    Raises:
      ValueError: a folder without a page.
    """
    if not given.is_dir():
        return [given]
    pages = sorted([*given.glob("*.html"), *given.glob("*/report.html")])
    if not pages:
        raise ValueError(f"no report in {given}: train a run first, or give the path of its report.html.")
    return pages


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Screenshots of a report at two widths, light and dark.")
    parser.add_argument("reports", nargs="+", help="a page, a run directory, or a folder of runs")
    parser.add_argument("--out", default=None, help="folder for the PNGs (default: shots/ beside each report)")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="page widths in CSS pixels")
    parser.add_argument("--browser", default=None, help="browser binary (default: Chromium on PATH)")
    options = parser.parse_args(arguments)
    looks: list[Look] = []
    try:
        for report in [page for given in options.reports for page in pages_of(Path(given))]:
            out = options.out or report.parent / "shots"
            looks += screenshots(report, out, options.widths, browser=options.browser)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for look in looks:
        state = "; ".join(look.problems) or f"sound, {look.drawings} plots, {look.images} images"
        print(f"{look.width} px {look.scheme}: {state}: {', '.join(map(str, look.files))}")
    return int(any(look.problems for look in looks))


if __name__ == "__main__":
    sys.exit(main())
