"""Who a process is, from what its environment says, and what two of them tell each other."""

import os
import socket
from pathlib import Path

import group
import pytest
from runs import the_error

from rlhf_exp import processes

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004,7]",
}


def test_alone_everything_is_the_identity() -> None:
    assert (processes.rank(), processes.count(), processes.main()) == (0, 1, True)
    assert not processes.joined()
    assert processes.agreed([1]) == [1]
    assert processes.gather("a") == ["a"]
    assert processes.first(lambda: 5) == 5
    assert processes.share(3) == slice(0, 3)
    processes.barrier()
    assert processes.first_to_fail()
    assert not processes.failed()


@pytest.mark.parametrize(("items", "count"), [(7, 3), (2, 4), (0, 2), (8, 4)])
def test_shares_are_balanced(items: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = []
    for rank in range(count):
        me = processes.Group(rank, count, rank, None, {}, keeps_store=False)
        monkeypatch.setattr(processes, "_group", me)
        parts.append(list(range(items))[processes.share(items)])
    assert [item for part in parts for item in part] == list(range(items))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_torchrun_describes_a_group() -> None:
    assert processes.described(TORCHRUN | {"HOME": "/"}) == TORCHRUN


def test_srun_describes_a_group() -> None:
    assert processes.described(SLURM) == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu003",
        "MASTER_PORT": str(20_000 + 1234567 % 20_000),
    }
    told = processes.described(SLURM | {"MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert told is not None
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("a", "1")


def test_a_batch_script_of_slurm_describes_none() -> None:
    assert processes.described({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}) is None
    assert processes.described({}) is None


def test_half_a_description_is_refused() -> None:
    with pytest.raises(ValueError, match="MASTER_PORT is missing: start with torchrun or srun"):
        processes.described({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[07,9]", "n07"), ("login-1,n[1-2]", "login-1")],
)
def test_the_first_host(nodes: str, host: str) -> None:
    assert processes.first_host(nodes) == host


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in (TORCHRUN | {"RANK": "0", "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(ValueError, match=rf"meet at 127\.0\.0\.1:{port} .*a free MASTER_PORT"):
            processes.join()
    assert not processes.joined()
    assert os.environ["RANK"] == "0"


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    done = group.of(2, "together", tmp_path)
    assert [process.returncode for process in done] == [1, 1], done
    # both raise it, one says it
    assert the_error("".join(p.stderr for p in done)) == "error: both find this wrong: change it"
    assert (tmp_path / "shared.json").read_text() == "0\n"


@pytest.mark.slow
def test_waiting_ends_when_another_process_fails(tmp_path: Path) -> None:
    done = group.of(2, "vanishing", tmp_path)
    assert [process.returncode for process in done] == [1, 1]
    assert [process.stderr for process in done] == ["", "error: rank 1 misses a file\n"]


def test_a_port_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (told | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        where = rf"cannot meet at 127\.0\.0\.1:{port} .*give a reachable MASTER_ADDR and a free"
        with pytest.raises(ValueError, match=where):
            processes.join()
    assert not processes.joined()
