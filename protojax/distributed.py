"""Several processes as one run: the only place that calls `jax.distributed.initialize`.

`detect` reads who takes part from flags, SLURM, Open MPI, a Kubernetes JobSet or Cloud TPU; `join` gathers them,
refuses other configurations, starts JAX's runtime and watches for lost processes; `agree`, `share` and
`StopFlag` are what the loop needs while they run together. With one process they do nothing (or little).
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from protojax import peers as peers_lib

PORT = 8476  # of the coordinator, where the service names none; the port after it serves `peers`
KINDS = ("auto", "one", "flags", "slurm", "openmpi", "jobset", "tpu")


class Cluster(NamedTuple):
    """kind: which of KINDS. coordinator: HOST:PORT of process 0. process: this one's number. local_devices: ids on this
    host, None: all."""

    kind: str
    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


ONE = Cluster("one", "", 1, 0)
_peers: peers_lib.Peers | None = None


# ------------------------------------------------------------------------------------------------------ who
def detect(
    kind: str = "auto",
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Cluster:
    """The cluster that this process belongs to; ONE when it is alone.

    Explicit flags win; 'auto' then asks SLURM, Open MPI, JobSet and Cloud TPU, in this order. Several processes a host
    (SLURM, Open MPI) get one local device each. Raises ValueError for an unknown kind, half of the flags, or a service
    that does not say enough.
    """
    environ = os.environ if environ is None else environ
    if kind not in KINDS:
        from protojax.config import suggest

        raise ValueError(f"config.system.cluster: expected one of {KINDS}, got {kind!r}{suggest(kind, KINDS)}.")
    if kind == "one":
        return ONE
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if kind == "flags" or (kind == "auto" and any(v is not None for v in given.values())):
        missing = [k for k, v in given.items() if v is None]
        if missing:
            raise ValueError(
                f"config.system: {', '.join(missing)} missing; explicit processes need "
                "--config.system.coordinator=HOST:PORT --config.system.processes=N --config.system.process=I "
                "(0 to N-1, each once)."
            )
        assert coordinator is not None
        assert processes is not None
        assert process is not None
        return _checked(Cluster("flags", coordinator, processes, process))
    readers: dict[str, Callable[[Mapping[str, str]], Cluster | None]] = {
        "slurm": _slurm, "openmpi": _openmpi, "jobset": _jobset, "tpu": _tpu,
    }  # fmt: skip
    for name, read in readers.items():
        if kind in ("auto", name):
            found = read(environ)
            if found is not None:
                found = found if coordinator is None else found._replace(coordinator=coordinator)
                return _checked(found)
    if kind == "auto":
        return ONE
    raise ValueError(f"config.system.cluster = {kind!r}, but its environment variables are not set in this process.")


def _checked(cluster: Cluster) -> Cluster:
    host, _, port = cluster.coordinator.rpartition(":")
    if not host and port and not port.isdigit():
        cluster = cluster._replace(coordinator=f"{port}:{PORT}")
    elif not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ValueError(f"config.system.coordinator: expected HOST or HOST:PORT, got {cluster.coordinator!r}.")
    if cluster.processes < 1 or not 0 <= cluster.process < cluster.processes:
        raise ValueError(
            f"config.system: expected 0 <= process < processes, got process {cluster.process} of {cluster.processes}."
        )
    return cluster if cluster.processes > 1 else ONE


def first_host(nodes: str) -> str:
    """'node[003-007,9],other' -> 'node003': the first of a SLURM node list."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST {nodes!r} is not a list of hosts; give --config.system.coordinator.")
    return match[1] + (match[2] or "") + (match[3] or "")


def _slurm(env: Mapping[str, str]) -> Cluster | None:
    if not all(k in env for k in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")):
        return None  # not inside srun: a batch script's own shell counts as one process
    tasks, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_STEP_NUM_NODES", "1"))
    port = 20_000 + 2 * (int(env["SLURM_JOB_ID"]) % 10_000)
    local = (int(env.get("SLURM_LOCALID", "0")),) if tasks > nodes else None
    return Cluster("slurm", f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}", tasks, int(env["SLURM_PROCID"]), local)


def _openmpi(env: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in env or "OMPI_COMM_WORLD_RANK" not in env:
        return None
    size, rank = int(env["OMPI_COMM_WORLD_SIZE"]), int(env["OMPI_COMM_WORLD_RANK"])
    here = int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    local = (int(env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")),) if here > 1 else None
    uri = re.search(r"tcp6?://\[?([^,:\]]+)", env.get("OMPI_MCA_orte_hnp_uri", ""))
    host = env.get("PROTOJAX_COORDINATOR") or ("127.0.0.1" if here == size else uri[1] if uri else "")
    if not host:
        raise ValueError(
            "Open MPI 5 does not tell processes where rank 0 runs: give it with "
            "mpirun -x PROTOJAX_COORDINATOR=HOST:PORT"
        )
    return Cluster("openmpi", host if ":" in host else f"{host}:{PORT}", size, rank, local)


def _jobset(env: Mapping[str, str]) -> Cluster | None:
    """The manifest (launch/gke_jobset.yaml) gives PROTOJAX_COORDINATOR and PROTOJAX_PROCESSES; the index is Kubernetes'
    own."""
    if "JOB_COMPLETION_INDEX" not in env or "PROTOJAX_PROCESSES" not in env:
        return None
    if "PROTOJAX_COORDINATOR" not in env:
        raise ValueError("PROTOJAX_PROCESSES is set but not PROTOJAX_COORDINATOR: both come from the JobSet manifest.")
    return Cluster(
        "jobset", env["PROTOJAX_COORDINATOR"], int(env["PROTOJAX_PROCESSES"]), int(env["JOB_COMPLETION_INDEX"])
    )


def _tpu(env: Mapping[str, str], metadata: Callable[[str], str] | None = None) -> Cluster | None:
    """Hosts of a pod slice from the variables that GKE and TPU VMs set, else from the metadata server of a TPU VM."""
    hosts, index = env.get("TPU_WORKER_HOSTNAMES", ""), env.get("TPU_WORKER_ID", "")
    if not hosts and env.get("PROTOJAX_TPU_POD") == "1":  # set by launch/tpu_pod.sh: asking takes seconds elsewhere
        read = metadata or _metadata
        hosts = ",".join(part.split(":")[2] for part in read("worker-network-endpoints").split(","))
        index = read("agent-worker-number")
    if not hosts or not index:
        return None
    names = hosts.split(",")
    slices, which = int(env.get("MEGASCALE_NUM_SLICES", "1")), int(env.get("MEGASCALE_SLICE_ID", "0"))
    first = env.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or names[0]
    return Cluster("tpu", f"{first}:{PORT}", len(names) * slices, which * len(names) + int(index))


def _metadata(key: str) -> str:
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}"
    with urllib.request.urlopen(
        urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=20
    ) as reply:
        return reply.read().decode()


# ----------------------------------------------------------------------------------------------------- join
def join(cluster: Cluster, facts: Mapping[str, Any], timeout: float = 300, lost_after: float = 60) -> None:
    """Take part in the cluster: call once, before anything touches a device.

    facts: what must be equal everywhere (configuration, versions). timeout: seconds to wait for all processes.
    lost_after: seconds without a sign of life after which a process counts as lost; a killed one is noticed at once.
    The survivors then name it and end with status 75.
    Raises TimeoutError with the address, ValueError when the processes differ; see `peers.meet`.
    """
    global _peers
    if cluster.processes == 1 or _peers is not None:
        return
    host, _, port = cluster.coordinator.rpartition(":")
    found = peers_lib.meet((host, int(port) + 1), cluster.process, cluster.processes, facts, timeout, lost_after)
    _gloo()
    local = None if cluster.local_devices is None or _cpu() else list(cluster.local_devices)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.processes,
        cluster.process,
        local_device_ids=local,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(timeout), 1),
        # Ours comes first and says more; JAX's own ends the process when ours could not.
        heartbeat_timeout_seconds=int(2 * lost_after) + 10,
    )
    found.watch()
    _peers = found


def _cpu() -> bool:
    return str(getattr(jax.config, "jax_platforms", None) or "").startswith("cpu")


def _gloo() -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")


def leave(status: int, reason: str = "") -> int:
    """Before the process ends: 0 in good order, else tell the others and end at once (no barrier could be met)."""
    if _peers is None:
        return status
    if status == 0:
        _peers.leave()
        return 0
    _peers.fail(reason or f"status {status}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def several() -> bool:
    """Whether this process takes part in a run of several."""
    return _peers is not None


def note(text: str) -> None:
    """Where things stand (the last checkpoint): part of the message should a process be lost."""
    if _peers is not None:
        _peers.note = text


# -------------------------------------------------------------------------------------------- while it runs
def gather(text: str) -> list[str]:
    """The text of every process, by index. All processes must call it."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(int(sizes.max()) + 1, np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [rows[i, : sizes[i]].tobytes().decode() for i in range(len(sizes))]


def share(text: str) -> str:
    """Process 0's text, on all processes."""
    return gather(text if jax.process_index() == 0 else "")[0]


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Raise ValueError on every process unless `facts` (JSON values) are the same on all."""
    everyone = [json.loads(t) for t in gather(json.dumps(facts, sort_keys=True, default=str))]
    for index, theirs in enumerate(everyone):
        changed = peers_lib.differences(everyone[0], theirs)
        if changed:
            who = _peers.name(index) if _peers else f"process {index}"
            raise ValueError(
                f"{what} differs between hosts, first on process 0 then on {who}: {'; '.join(changed[:8])}. "
                "All hosts must see the same files and run the same command."
            )


def all_ok(ok: bool) -> bool:
    """Whether `ok` holds on every process."""
    return all(t == "1" for t in gather("1" if ok else "0"))


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


class StopFlag:
    """Ctrl-C and SIGTERM raise a flag; the loop saves and leaves at the next step. A second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.raised, self.name, self._passed_on = False, "", False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            # With several processes JAX's own handler of SIGTERM makes all of them agree on the last step.
            for number in (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else (signal.SIGINT,):
                self._old[number] = signal.signal(number, self._raise)
        return self

    def due(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer on every process at the same step.

        One process: the flag. Several: a SIGTERM at any of them (pre-emption) makes all agree on one coming step; a
        local Ctrl-C becomes such a SIGTERM. To be called at every step of every process.
        """
        if jax.process_count() == 1:
            return self.raised
        from jax.experimental import multihost_utils

        if self.raised and not self._passed_on:
            self._passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _raise(self, number: int, frame: Any) -> None:
        if self.raised and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.raised, self.name = True, signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
