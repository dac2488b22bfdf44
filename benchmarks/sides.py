"""What the benchmarks against TRL share: a world of one-character tokens, a trial without
evaluation and checkpoints, and runs of each side in a process of its own.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT, RESPONSE, VOCABULARY = 16, 32, 512
WIDTH, LAYERS, HEADS = 64, 2, 4
SHAPE = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS} | {
    f"{k}_pdrop": 0.0 for k in ("resid", "embd", "attn")
}


def characters(count: int) -> list[str]:
    """Every token is one character."""
    first = 0x4E00 if count <= VOCABULARY else 0x20000
    return [chr(first + i) for i in range(count)]


def tokenizer(count: int = VOCABULARY, **specials: str) -> Any:
    """Of `count` characters, and the special tokens named."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(characters(count))}, []))
    bpe.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left", **specials)


def texts(count: int, length: int, vocabulary: int = VOCABULARY) -> list[str]:
    """Random ones, of `length` tokens each."""
    import torch

    known = characters(vocabulary)
    rows = torch.randint(vocabulary, (count, length)).tolist()
    return ["".join(known[i] for i in row) for row in rows]


def bare_trial(folder: Path, policy: Any, reward: Any = None, hardware: Any = None) -> Any:
    """A trial that logs, but neither evaluates nor saves, as TRL is asked not to; it finds pairs in
    the folder above.
    """
    from rlhf_exp.checkpoints import Checkpoints
    from rlhf_exp.evaluation.scoring import Evaluation, Evaluator
    from rlhf_exp.hardware import Hardware
    from rlhf_exp.reference import Reference
    from rlhf_exp.tracking import Log, NoTracker
    from rlhf_exp.trial import Trial, seed_everything

    class BareTrial(Trial):
        def begin(self, policy: Any, algorithm: Any, steps: int) -> int:
            self.steps = steps
            self.speed, self.sampler = lambda rollouts, seconds: {}, policy.sampler
            self.log.begin(0, steps)
            seed_everything(self.seed)
            return 0

        def end_step(self, step: int, policy: Any, algorithm: Any) -> None:
            pass

    evaluator = Evaluator(Evaluation(), [], reward, reward, folder)
    evaluator.due = lambda step, last: False  # type: ignore[method-assign]
    return BareTrial(
        directory=folder,
        seed=0,
        accelerator=(hardware or Hardware(threads=1)).accelerator(),
        reference=Reference(policy),
        pairs=lambda: folder.parent,
        labeller=lambda: None,
        log=Log(folder, NoTracker(), show_every=10**6),
        checkpoints=Checkpoints(),
        evaluator=evaluator,
    )


# ---------------------------------------------------------------------------------------- processes


def timed(do: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """CPU (user + system) and wall seconds of `do`, which prints nothing, and what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = do()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}, result


def child(script: str, *arguments: str, path: Path = ROOT) -> tuple[dict[str, Any], str]:
    """`script` in a fresh process that imports from `path` first: the JSON of its last line, and
    what it printed before.
    """
    environment = os.environ | {
        "PYTHONPATH": str(path),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    *said, numbers = done.stdout.splitlines()
    return json.loads(numbers), "\n".join(said)


def describe(trl: str) -> dict[str, str]:
    """Machine, date and versions."""
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "trl": trl,
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line; `--side` and `--world` are what a parent tells its children."""
    found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    found.add_argument("--rounds", type=int, default=3, help="runs of each side (default: 3)")
    found.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    found.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)
    found.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    return found
