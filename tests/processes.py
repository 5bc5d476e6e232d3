"""Several processes of one run over loopback, as a launcher would start them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEVICES = 4  # of the whole run, however many processes share them


def free_port() -> int:
    """A port whose successor is free too (JAX's coordinator and ours)."""
    while True:
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            port = a.getsockname()[1]
            try:
                b.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class Run:
    """`count` processes of `tests.process_worker` in one workdir; output is collected by line."""

    def __init__(
        self, workdir: Path, count: int, *more: str, each: Sequence[Sequence[str]] = (), port: int | None = None
    ):
        port = port or free_port()
        cache = os.environ.get("PROTOJAX_TEST_CACHE", str(ROOT / ".cache" / "jax-processes"))
        environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
        environ |= {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.processes, self.lines = [], [[] for _ in range(count)]
        self._threads = []
        for index in range(count):
            who = (
                f"system__coordinator=127.0.0.1:{port}", f"system__processes={count}", f"system__process={index}",
            ) if count > 1 else ()  # fmt: skip
            command = [
                sys.executable, "-m", "tests.process_worker", str(workdir),
                f"system__compilation_cache={cache}", *who, *more,
                *(each[index] if each else ()),
            ]  # fmt: skip
            process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            thread = threading.Thread(target=self._read, args=(index, process), daemon=True)
            thread.start()
            self.processes.append(process)
            self._threads.append(thread)

    def _read(self, index: int, process: Any) -> None:
        for line in process.stdout:
            self.lines[index].append(line)

    def output(self, index: int) -> str:
        return "".join(self.lines[index])

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit statuses; kills what has not ended in time (its status is then -9)."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread, process in zip(self._threads, self.processes, strict=True):
            thread.join(10)
            process.stdout.close()
        return [p.returncode for p in self.processes]

    def at_step(self, workdir: Path, step: int, timeout: float = 240) -> None:
        """Wait until a train record of `step` or later is written."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            if any(r["kind"] == "train" and r["step"] >= step for r in records(workdir)):
                return
            time.sleep(0.05)
        raise AssertionError(f"never came to step {step}:\n" + "\n".join(map(self.output, range(len(self.processes)))))

    def until(self, text: str, timeout: float = 240) -> None:
        """Wait until process 0 has said `text`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and all(p.poll() is None for p in self.processes):
            if text in self.output(0):
                return
            time.sleep(0.05)
        raise AssertionError(f"never said {text!r}:\n" + "\n".join(map(self.output, range(len(self.processes)))))

    def signal(self, index: int, number: int = signal.SIGTERM) -> None:
        self.processes[index].send_signal(number)


def records(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def losses(workdir: Path) -> dict[int, float]:
    return {r["step"]: r["metrics"]["loss/total"] for r in records(workdir) if r["kind"] == "train"}


def checksums(workdir: Path, step: int) -> dict[str, int]:
    """Checksum of every array of a checkpoint, from its record: equal arrays, equal numbers."""
    (path,) = (workdir / "checkpoints" / str(step) / "record").glob("metadata")
    return json.loads(path.read_text())["checksums"]


def lost(text: str) -> re.Match | None:
    return re.search(r"process (\d) of (\d) \(host [^)]+\) was lost: (.*?)\. Process (\d) of", text)
