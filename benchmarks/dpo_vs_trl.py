"""CPU-seconds of DPO and of reward model training here and by bare TRL, on the same pairs.

    python benchmarks/dpo_vs_trl.py                  # 3 rounds, two minutes
    python benchmarks/dpo_vs_trl.py --json FILE      # the numbers, for a table elsewhere

Both sides are TRL's trainers in the end, so this measures what is put around them. They start from
the same weights (2 layers, width 64, 512 tokens) and learn once from the same 1,024 pairs of 16
prompt and 32 completion tokens, in batches of 64, 1 thread, fp32. Every run is a fresh process, the
sides take turns, and what counts is user + system time from pairs as text to trained weights, not
imports and loading.

What differs is each side's own way. Bare TRL runs its reference beside the policy in every step;
ours is asked once before training, in batches of equal length. Ours logs every step, writes the
pairs it used, and saves the reward model.

Left out: evaluation and checkpoints (on both sides), memory, GPUs, larger models.
"""

import json
import statistics
import sys
import tempfile
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sides import PROMPT, RESPONSE, SHAPE, bare_trial, child, describe, parser, texts, timed
from sides import tokenizer as make_tokenizer

PAIRS, BATCH, LR, BETA = 1024, 64, 1e-4, 0.1


# ------------------------------------------------------------------------------ what both sides get


def build_world(folder: Path) -> None:
    """Save a policy with its tokenizer, and pairs, below `folder`."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer(eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "policy")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "policy")
    lengths = {"prompt": PROMPT, "chosen": RESPONSE, "rejected": RESPONSE}
    columns = {k: texts(PAIRS, n) for k, n in lengths.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for name, part in (("train", rows), ("evaluation", rows[:2])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def pairs_in(world: Path) -> list[dict[str, str]]:
    """The training pairs."""
    return [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------ the two sides


def our_dpo(world: Path) -> Callable[[], Any]:
    """All that precedes the work; returns the work."""
    import trl.trainer.dpo_trainer  # noqa: F401  # imports are not what is measured

    from rlhf_exp.algorithms.dpo import DPO
    from rlhf_exp.data.rows import Dataset
    from rlhf_exp.policy import Policy

    policy = Policy(path=str(world / "policy"))
    policy.load(world / "policy", trainable=True)
    trial = bare_trial(Path(tempfile.mkdtemp(dir=world)), policy)
    algorithm = DPO(lr=LR, batch=BATCH, micro_batch=BATCH, beta=BETA)
    return lambda: algorithm.run(policy, None, Dataset(prompts=[], held_out=[]), trial)


def bare_settings(world: Path) -> dict[str, Any]:
    """What TRL is told for either trainer."""
    return {
        "output_dir": str(world / "trl"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LR,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def trl_dpo(world: Path) -> Callable[[], Any]:
    """As `our_dpo`."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    policy, reference = (AutoModelForCausalLM.from_pretrained(world / "policy") for _ in range(2))

    def work() -> None:
        DPOTrainer(
            model=policy,
            ref_model=reference,
            args=DPOConfig(beta=BETA, **bare_settings(world)),
            train_dataset=Dataset.from_list(pairs_in(world)),
            processing_class=tokenizer,
        ).train()

    return work


def our_reward(world: Path) -> Callable[[], Any]:
    """As `our_dpo`."""
    import rlhf_exp.rewards.training  # noqa: F401
    from rlhf_exp.rewards.pairwise import Pairwise

    reward = Pairwise(path=str(world / "policy"), epochs=1, batch=BATCH, micro_batch=BATCH, lr=LR)
    fitting: Any = SimpleNamespace(device="cpu")
    folder = Path(tempfile.mkdtemp(dir=world))
    return lambda: reward._train(world / "policy", pairs_in(world), folder, fitting)


def trl_reward(world: Path) -> Callable[[], Any]:
    """As `our_dpo`; the classifier is loaded in the work, as ours is."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(world / "policy")

    def work() -> None:
        model = AutoModelForSequenceClassification.from_pretrained(world / "policy", num_labels=1)
        texts = [
            {side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")}
            for pair in pairs_in(world)
        ]
        RewardTrainer(
            model=model,
            args=RewardConfig(**bare_settings(world)),
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
        ).train()

    return work


WORK = {
    "dpo": {"ours": our_dpo, "trl": trl_dpo},
    "reward": {"ours": our_reward, "trl": trl_reward},
}


def work(task: str, side: str, world: Path) -> None:
    """What a child process does: one run, its numbers on the last line of standard output."""
    import torch

    torch.set_num_threads(1)
    times, _ = timed(WORK[task][side](world))
    print(json.dumps({"task": task, "side": side} | times))


# ------------------------------------------------------------------------------------ the benchmark


def compare(rounds: int, world: Path) -> dict[str, Any]:
    """`rounds` runs of each side in turn, printed as they end, and pairs per CPU-second."""
    from importlib.metadata import version

    found: dict[str, Any] = describe(version("trl")) | {"runs": []}
    print(", ".join(f"{k} {v}" for k, v in found.items() if k != "runs"))
    print(f"{'round':>5} {'task':>7} {'side':>5} {'CPU s':>8} {'wall s':>8}")
    for number in range(1, rounds + 1):
        for task, sides in WORK.items():
            for side in sides:
                asked = ("--task", task, "--side", side, "--world", str(world))
                result, _ = child(__file__, *asked)
                times = f"{result['cpu']:8.2f} {result['wall']:8.2f}"
                print(f"{number:5d} {task:>7} {side:>5} {times}", flush=True)
                found["runs"].append({"round": number, **result})
    for task, sides in WORK.items():
        median = {
            side: statistics.median(
                r["cpu"] for r in found["runs"] if (r["task"], r["side"]) == (task, side)
            )
            for side in sides
        }
        speed = {side: PAIRS / seconds for side, seconds in median.items()}
        ratio = median["trl"] / median["ours"]
        print(
            f"{task}: {speed['ours']:.0f} pairs per CPU-second here, {speed['trl']:.0f} by TRL, "
            f"ratio {ratio:.2f}"
        )
        found[task] = {"median_cpu": median, "pairs_per_cpu_second": speed, "ratio": ratio}
    return found


def arguments() -> Namespace:
    """The command line."""
    found = parser(__doc__)
    found.add_argument("--task", choices=list(WORK), help=SUPPRESS)
    return found.parse_args()


def main() -> None:
    """Parent or child, as the arguments say."""
    asked = arguments()
    if asked.side:
        work(asked.task, asked.side, asked.world)
        return
    if asked.rounds < 1:
        sys.exit(f"--rounds {asked.rounds} must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        build_world(Path(folder))
        found = compare(asked.rounds, Path(folder))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
