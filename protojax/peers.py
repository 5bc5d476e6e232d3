"""Processes that watch one another: they meet before anything starts, and whoever is lost later is named.

Plain sockets between process 0 and each other process. A killed process closes its connection, which the others see at
once; a silent one (a dead host, a cut cable) is noticed after `lost_after` seconds. Collectives alone would hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

LOST_STATUS = 75  # EX_TEMPFAIL: run the same command again
GRACE = 5.0  # seconds in which a process whose peer failed with an error may fail with its own
SETTLE = 2.0  # seconds in which the loss of a peer may be seen behind the error that it caused here
_LINE_LIMIT = 1 << 22


class Connection:
    """JSON objects, one a line, over a socket. `receive` raises OSError when the peer is gone or silent."""

    def __init__(self, sock: socket.socket):
        self._socket, self._buffer, self._lock = sock, b"", threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None) -> dict[str, Any]:
        self._socket.settimeout(timeout)
        while b"\n" not in self._buffer:
            chunk = self._socket.recv(65536)
            if not chunk or len(self._buffer) > _LINE_LIMIT:
                raise ConnectionError("its connection was closed")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """'key: 1 here, 2 there' for every key whose values differ."""
    keys = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
    return [f"{k}: {mine.get(k)!r} and {theirs.get(k)!r}" for k in keys]


class Peers:
    """All processes of one run. Made by `meet`; `leave` before a clean end, `fail` before an end with an error."""

    def __init__(self, index: int, count: int, names: Mapping[int, str], lost_after: float):
        self.index, self.count, self.lost_after = index, count, lost_after
        self.names: dict[int, str] = dict(names)
        self.note = ""  # where things stand, for the message of a loss
        self._connections: dict[int, Connection] = {}
        self._gone: set[int] = set()
        self._leaving = False
        self._lock = threading.Lock()

    def name(self, index: int) -> str:
        host = self.names.get(index)
        return f"process {index} of {self.count}" + (f" (host {host})" if host else "")

    def watch(self) -> None:
        """Start the threads that send and expect a sign of life."""
        for index, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(index, connection), daemon=True, name="protojax-peer").start()
        threading.Thread(target=self._beat, daemon=True, name="protojax-beat").start()

    def leave(self) -> None:
        """Tell the others that this process ends in good order."""
        self._leaving = True
        self._tell({"bye": self.index})

    def fail(self, reason: str) -> None:
        """Tell the others that this process ends with an error; they end too.

        A collective fails the moment a peer is lost, often before its closed connection is noticed: the listeners get
        SETTLE seconds to end this process with the true cause."""
        time.sleep(SETTLE)
        self._leaving = True
        self._tell({"failed": self.index, "why": reason})

    def close(self) -> None:
        """Drop the connections (to leave first is what makes that no loss)."""
        self._leaving = True
        for connection in self._connections.values():
            connection.close()

    def _tell(self, message: Mapping[str, Any]) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.send(message)

    def _beat(self) -> None:
        while not self._leaving:
            self._tell({"beat": self.index})
            time.sleep(min(self.lost_after / 4, 5.0))

    def _listen(self, index: int, connection: Connection) -> None:
        while True:
            try:
                message = connection.receive(self.lost_after)
            except OSError as error:
                if index not in self._gone and not self._leaving:
                    silent = isinstance(error, TimeoutError)
                    why = f"it gave no sign of life for {self.lost_after:g} s" if silent else "its connection closed"
                    self._report(index, why, failed=False)
                return
            if "bye" in message:
                self._gone.add(index)
            elif "failed" in message:
                self._report(message["failed"], message["why"], failed=True)
            elif "lost" in message:
                self._report(message["lost"], message["why"], failed=False)

    def _report(self, index: int, why: str, failed: bool) -> None:
        """Pass it on, say it and end this process: no collective could finish without the lost one."""
        with self._lock:
            if self._leaving:
                return
            self._leaving = True
        self._tell({"failed" if failed else "lost": index, "why": why})
        if failed:
            time.sleep(GRACE)
            text = f"{self.name(index)} ended with an error: {why}"
        else:
            text = f"{self.name(index)} was lost: {why}"
        self.die(f"{text}. {self.name(self.index).capitalize()} stops with status {LOST_STATUS}. {self.note}".strip())

    def die(self, text: str) -> None:
        try:
            print(f"error: {text}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:  # also where nobody reads what is printed
            os._exit(LOST_STATUS)


def meet(
    address: tuple[str, int], index: int, count: int, facts: Mapping[str, Any], timeout: float, lost_after: float
) -> Peers:
    """Wait until all processes are there, compare their `facts`, and return them (not yet watched).

    Process 0 listens at `address` (on all interfaces); the others connect to it.
    Raises TimeoutError with the address, or with the processes that are missing, after `timeout` seconds; ValueError
    when two processes claim one index, expect other numbers of processes, or give other facts.
    """
    hello = {"index": index, "count": count, "host": socket.gethostname(), "facts": dict(facts)}
    return _host(address, hello, timeout, lost_after) if index == 0 else _guest(address, hello, timeout, lost_after)


def _host(address: tuple[str, int], mine: dict[str, Any], timeout: float, lost_after: float) -> Peers:
    count = mine["count"]
    peers = Peers(0, count, {0: mine["host"]}, lost_after)
    hellos: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + timeout
    try:
        listener = socket.create_server(("", address[1]), backlog=count + 8)
    except OSError as error:
        raise OSError(
            error.errno,
            f"process 0 cannot listen on port {address[1]} ({error.strerror}); another run may use it: choose another "
            "port with --config.system.coordinator=HOST:PORT",
        ) from None
    with listener:
        while len(peers._connections) < count - 1:
            left = deadline - time.monotonic()
            listener.settimeout(max(left, 0.01))
            try:
                if left <= 0:
                    raise TimeoutError
                sock, _ = listener.accept()
                connection = Connection(sock)
                theirs = connection.receive(max(left, 1.0))
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in peers._connections)
                problem = (
                    f"of {count} processes {len(peers._connections) + 1} arrived at {address[0]}:{address[1]} within "
                    f"{timeout:g} s; missing: {missing}. Start them all, with the same coordinator and number of "
                    "processes, and look at their logs."
                )
                _refuse(peers, problem)
                raise TimeoutError(problem) from None
            except (OSError, ValueError):
                continue  # a port scanner, or a process that died while it connected
            other = theirs.get("index", -1)
            problem = _objection(mine, theirs, other in peers._connections)
            if problem:
                with contextlib.suppress(OSError):
                    connection.send({"refused": problem})
                connection.close()
                _refuse(peers, problem)
                raise ValueError(problem)
            peers._connections[other], peers.names[other], hellos[other] = connection, theirs["host"], theirs
    # Compared when all are there, so that everybody hears it.
    for other in sorted(peers._connections):
        changed = differences(mine["facts"], hellos[other]["facts"])
        if changed:
            problem = (
                f"{peers.name(other)} runs something else than process 0 (first on process 0: "
                f"{'; '.join(changed[:8])}). Start all processes with the same version, configuration and flags."
            )
            _refuse(peers, problem)
            raise ValueError(problem)
    peers._tell({"names": peers.names})
    return peers


def _objection(mine: Mapping[str, Any], theirs: Mapping[str, Any], taken: bool) -> str:
    """Why `theirs` cannot take part, or ''."""
    other = theirs.get("index", -1)
    who = f"process {other} (host {theirs.get('host')})"
    if theirs.get("count") != mine["count"]:
        return f"{who} expects {theirs.get('count')} processes, process 0 expects {mine['count']}; give all the same"
    if taken or not 0 < other < mine["count"]:
        return f"{who} arrived twice or has no place among {mine['count']}; give every process its own index from 0"
    return ""


def _refuse(peers: Peers, problem: str) -> None:
    peers._tell({"refused": problem})
    peers.close()


def _guest(address: tuple[str, int], mine: dict[str, Any], timeout: float, lost_after: float) -> Peers:
    deadline = time.monotonic() + timeout
    while True:
        try:
            sock = socket.create_connection(address, timeout=max(1.0, min(10.0, deadline - time.monotonic())))
            break
        except OSError as error:
            if time.monotonic() + 0.2 >= deadline:
                raise TimeoutError(
                    f"the coordinator {address[0]}:{address[1]} did not answer within {timeout:g} s ({error}). Is "
                    "process 0 running there, is its name known here, and is the port open between the hosts?"
                ) from None
            time.sleep(0.2)
    connection = Connection(sock)
    connection.send(mine)
    try:
        answer = connection.receive(max(deadline - time.monotonic(), 1.0) + 5.0)
    except OSError:
        connection.close()
        raise TimeoutError(
            f"process 0 at {address[0]}:{address[1]} gave up or was lost while the processes gathered; look at its log"
        ) from None
    if "refused" in answer:
        connection.close()
        raise ValueError(answer["refused"])
    peers = Peers(mine["index"], mine["count"], {int(k): v for k, v in answer["names"].items()}, lost_after)
    peers._connections[0] = connection
    return peers
