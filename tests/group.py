"""A few real processes that meet, as torchrun would start them: `python tests/group.py <part>` is
one of them, `of` starts them all. What a part asserts is asserted in every process.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from runs import environment

PATIENCE = 120  # seconds; one takes about ten


def of(count: int, part: str, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Do `part` in `count` processes, and wait for them."""
    from rlhf_exp.hardware.launch import _described, _store

    store = _store()
    command = [sys.executable, __file__, part, *map(str, arguments)]
    started = [
        subprocess.Popen(
            command,
            env=environment(**_described(rank, count, store, None)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        told = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(command, process.returncode, *texts)
        for process, texts in zip(started, told, strict=True)
    ]


def together(folder: Path) -> None:
    """What the processes tell each other, and who says why they fail."""
    import os
    import time

    from rlhf_exp import processes
    from rlhf_exp.artifacts import Store, write_json
    from rlhf_exp.hardware import Hardware

    assert "RANK" not in os.environ  # libraries see one process
    me = processes.rank()
    assert (processes.count(), processes.local_rank(), processes.main()) == (2, me, me == 0)
    assert processes.agreed({"rank": me}) == {"rank": 0}
    with processes.alone():
        assert (processes.rank(), processes.count()) == (0, 1)
        processes.barrier()  # nobody else comes

    def slow(place: Path) -> None:
        assert processes.count() == 1
        time.sleep(0.5)
        write_json(place / "by.json", me)

    made = Store(folder / "store").get("kind", "thing", {"drawn": 1}, slow)
    assert (made / "by.json").read_text() == "0\n"
    assert processes.first(lambda: 7 + me) == 7
    write_json(folder / "shared.json", me)
    (folder / f"came-{me}").touch()
    processes.barrier()
    assert sorted(p.name for p in folder.glob("came-*")) == ["came-0", "came-1"]

    hardware = Hardware(processes=2, timeout=60)
    accelerator = hardware.accelerator()
    assert processes.gather({"rank": me, "part": processes.share(5)}) == [
        {"rank": 0, "part": slice(0, 2)},
        {"rank": 1, "part": slice(2, 5)},
    ]
    from divided import shards

    shards(folder)
    hardware.release(accelerator)
    raise ValueError("both find this wrong: change it")


def vanishing(folder: Path) -> None:
    """One process dies with an error of its own while the other waits without a deadline."""
    from rlhf_exp import processes

    if not processes.main():
        raise FileNotFoundError("rank 1 misses a file")
    processes.barrier()


def engine(folder: Path, hardware: str) -> None:
    """Engines take the steps of one process, whatever the shares; see test_engine.py."""
    from engine_steps import compare

    compare(hardware)


def sharded(folder: Path, what: str) -> None:
    """FSDP takes the steps of plain AdamW, and its state is anybody's; see test_fsdp.py."""
    import sharded_steps

    {"compare": sharded_steps.compare, "go_on": sharded_steps.go_on}[what](folder)


def divided(folder: Path, algorithm: str, hardware: str, policy: str = "whole") -> None:
    """Algorithms learn what they learn in one process; see test_divided.py."""
    from divided import compare

    compare(folder, algorithm, hardware, policy)


PARTS: dict[str, Any] = {
    "together": together,
    "vanishing": vanishing,
    "engine": engine,
    "sharded": sharded,
    "divided": divided,
}

if __name__ == "__main__":
    from rlhf_exp import processes
    from rlhf_exp.worker import guarded

    def part() -> None:
        processes.join()
        PARTS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])

    processes.leave(guarded(part))
