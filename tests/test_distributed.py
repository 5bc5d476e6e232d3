"""Who takes part, who is refused, and who is missed: all without starting JAX's own runtime."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from protojax import distributed, peers
from protojax.distributed import ONE, Cluster, detect

SLURM = {"SLURM_JOB_ID": "12345", "SLURM_STEP_NODELIST": "n[03-05,9],m1", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}
OPENMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
JOBSET = {"JOB_COMPLETION_INDEX": "3", "PROTOJAX_PROCESSES": "4", "PROTOJAX_COORDINATOR": "run-w-0-0.run:8476"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, ONE),
        (SLURM | {"SLURM_STEP_NUM_NODES": "4"}, Cluster("slurm", "n03:24690", 4, 2)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1"}, Cluster("slurm", "n03:24690", 4, 2, (1,))),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, ONE),  # the batch script itself, outside srun
        (OPENMPI | URI, Cluster("openmpi", "10.96.0.1:8476", 2, 1)),
        (
            OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Cluster("openmpi", "127.0.0.1:8476", 2, 1, (1,)),
        ),
        (JOBSET, Cluster("jobset", "run-w-0-0.run:8476", 4, 3)),
        (TPU, Cluster("tpu", "t0:8476", 2, 1)),
        (
            TPU | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a0:1"},
            Cluster("tpu", "a0:8476", 4, 3),
        ),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, ONE),
    ],
)
def test_each_service_says_who_takes_part(environ, expected):
    assert detect(environ=environ) == expected


def test_flags_win_and_a_tpu_vm_is_asked():
    assert detect("auto", "h:99", 3, 1, environ=SLURM) == Cluster("flags", "h:99", 3, 1)
    assert detect("one", environ=SLURM) == ONE
    assert (
        detect("slurm", coordinator="other:7", environ=SLURM | {"SLURM_STEP_NUM_NODES": "4"}).coordinator == "other:7"
    )
    answers = {"worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2", "agent-worker-number": "1"}
    assert distributed._tpu({"PROTOJAX_TPU_POD": "1"}, answers.__getitem__) == Cluster("tpu", "10.0.0.1:8476", 2, 1)


def test_what_cannot_be_a_cluster_is_named():
    with pytest.raises(ValueError, match=r"expected one of .*, got 'slrum' \(did you mean 'slurm'"):
        detect("slrum", environ={})
    with pytest.raises(ValueError, match=r"processes, process missing; explicit processes need .*system.coordinator="):
        detect("auto", coordinator="h:1", environ={})
    with pytest.raises(ValueError, match=r"expected 0 <= process < processes, got process 2 of 2"):
        detect("flags", "h:1", 2, 2, environ={})
    with pytest.raises(ValueError, match=r"expected HOST or HOST:PORT, got 'h:x'"):
        detect("flags", "h:x", 2, 0, environ={})
    with pytest.raises(ValueError, match=r"Open MPI 5 .*PROTOJAX_COORDINATOR=HOST:PORT"):
        detect(environ=OPENMPI)
    with pytest.raises(ValueError, match=r"'slurm', but its environment variables are not set"):
        detect("slurm", environ={})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def gathered(count: int, facts=None, timeout: float = 5, lost_after: float = 1.0, indices=None) -> list:
    """What `meet` gives (or raises) in each of `count` threads that play processes."""
    port, out = free_port(), {}

    def one(slot: int, index: int) -> None:
        try:
            mine = facts[slot] if facts else {"version": 1}
            out[slot] = peers.meet(("127.0.0.1", port), index, count, mine, timeout, lost_after)
        except Exception as error:
            out[slot] = error

    threads = [threading.Thread(target=one, args=(s, i)) for s, i in enumerate(indices or range(count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [out[i] for i in range(len(threads))]


def test_other_configurations_are_refused_everywhere_with_the_key():
    found = gathered(3, [{"lr": 0.1, "v": 1}, {"lr": 0.1, "v": 1}, {"lr": 0.2, "v": 1}])
    for error in found:
        assert isinstance(error, ValueError)
        assert "process 2" in str(error)
        assert "lr: 0.1 and 0.2" in str(error)


def test_missing_and_doubled_processes_are_named():
    (alone,) = gathered(3, timeout=0.3, indices=[0])
    assert isinstance(alone, TimeoutError)
    assert "of 3 processes 1 arrived" in str(alone)
    assert "missing: 1, 2" in str(alone)
    (lost,) = gathered(2, timeout=0.5, indices=[1])
    assert isinstance(lost, TimeoutError)
    assert "the coordinator 127.0.0.1:" in str(lost)
    assert "did not answer within 0.5 s" in str(lost)
    twice = gathered(3, indices=[0, 1, 1])
    assert "process 1 (host" in str(twice[0])
    assert "arrived twice" in str(twice[0])


@pytest.mark.parametrize("how", ["killed", "silent", "failed", "clean"])
@pytest.mark.parametrize("victim", [0, 2])
def test_the_survivors_name_the_lost_process(monkeypatch, how, victim):
    monkeypatch.setattr(peers, "GRACE", 0.0)
    monkeypatch.setattr(peers, "SETTLE", 0.0)
    everyone = gathered(3, lost_after=0.6)
    said: dict[int, str] = {}
    for p in everyone:
        p.note = "The last checkpoint is step 7."
        p.die = lambda text, p=p: said.setdefault(p.index, text)
        if not (how == "silent" and p.index == victim):
            p.watch()
    lost, began = everyone[victim], time.monotonic()
    if how == "killed":
        lost._leaving = True
        for connection in lost._connections.values():
            connection.close()
    elif how == "failed":
        lost.fail("ValueError: no such file")
    elif how == "clean":
        lost.leave()
        time.sleep(0.1)
        for connection in lost._connections.values():
            connection.close()
    survivors = {0, 1, 2} - {victim}
    while set(said) < survivors and time.monotonic() - began < (0.8 if how == "clean" else 5):
        time.sleep(0.02)
    heard = dict(said)  # before the test itself closes everything
    for p in everyone:
        p.close()
    if how == "clean":
        assert not heard
        return
    reason = {"killed": "its connection closed", "silent": "no sign of life for 0.6 s", "failed": "no such file"}[how]
    for index in survivors:
        assert f"process {victim} of 3 (host {socket.gethostname()})" in heard[index]
        assert reason in heard[index]
        assert "The last checkpoint is step 7." in heard[index]
        assert "status 75" in heard[index]
