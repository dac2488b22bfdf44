"""CPU-seconds of our PPO and of TRL's on the same work.

    python benchmarks/ppo_vs_trl.py                  # 3 rounds, a minute or two
    python benchmarks/ppo_vs_trl.py --profile        # where ours spends its time
    python benchmarks/ppo_vs_trl.py --json FILE      # the numbers, for a table elsewhere

TRL has had no PPO since 1.12.0 (`trl.experimental.ppo`), so that version is installed into a
folder of its own (`--trl-dir`), which only TRL's process sees. Both sides start from the same
weights and do the same work: 512 episodes of 16 prompt and 32 response tokens in batches of 64,
4 epochs of one minibatch each (TRL's defaults), a 2-layer GPT-2 of width 64 over 512 tokens, the
same sequence classifier as reward, 1 thread, fp32. End-of-text and padding lie beyond the policy's
vocabulary, so every response is full. Every run is a fresh process, the sides take turns, and what
counts is user + system time of the training loop alone: not imports, not building models.

What differs is each side's own way. TRL trains a value model with a trunk of its own and clips no
gradients. Ours has a value head on the policy's trunk, clips, and hands its reward text,
which is tokenized again.

Left out: evaluation and checkpoints (on both sides), memory, GPUs, larger models, and whether the
two learn equally well.
"""

import cProfile
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sides import (
    PROMPT,
    RESPONSE,
    ROOT,
    SHAPE,
    VOCABULARY,
    bare_trial,
    child,
    describe,
    parser,
    texts,
    timed,
)
from sides import tokenizer as make_tokenizer

TRL_VERSION = "1.12.0"
EPISODES, BATCH, EPOCHS = 512, 64, 4
LR, BETAS = 1e-4, (0.9, 0.95)


# ------------------------------------------------------------------------------ what both sides get


def build_world(folder: Path) -> None:
    """Save tokenizers, policy, reward classifier and prompts below `folder` for both sides."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    end, pad = {"eos_token": "<end>"}, {"pad_token": "<pad>"}
    for name, specials in (("policy", end | pad), ("classifier", pad)):
        make_tokenizer(**specials).save_pretrained(folder / name)
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    shape = {"vocab_size": VOCABULARY, "n_positions": PROMPT + RESPONSE, **ends, **SHAPE}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder / "policy")
    # the classifier knows its pad token: without one transformers refuses to score batches
    shape |= {"vocab_size": VOCABULARY + 2, "num_labels": 1, "pad_token_id": VOCABULARY}
    GPT2ForSequenceClassification(GPT2Config(**shape)).save_pretrained(folder / "classifier")
    (folder / "prompts.json").write_text(json.dumps(texts(EPISODES, PROMPT)))


# ------------------------------------------------------------------------------------ the two sides


def prepare_ours(world: Path) -> Callable[[], int]:
    """All that precedes the loop; returns the loop, which tells how many tokens it drew."""
    from rlhf_exp.algorithms.ppo import PPO
    from rlhf_exp.data.rows import Dataset
    from rlhf_exp.policy import Policy
    from rlhf_exp.rewards.pairwise import Pairwise

    policy = Policy(path=str(world / "policy"), max_new_tokens=RESPONSE)
    policy.load(world / "policy", trainable=True)
    policy.model.resize_token_embeddings(VOCABULARY)  # end and padding cannot be drawn
    reward = Pairwise(path=str(world / "classifier"), train=False, normalise="none")
    reward.load("cpu")
    algorithm = PPO(
        steps=EPISODES // BATCH,
        batch=BATCH,
        epochs=EPOCHS,
        minibatch=BATCH,
        lr=LR,
        betas=list(BETAS),
    )
    data = Dataset(prompts=json.loads((world / "prompts.json").read_text()), held_out=[])
    folder = Path(tempfile.mkdtemp(dir=world))
    trial = bare_trial(folder, policy, reward)

    def loop() -> int:
        algorithm.run(policy, reward, data, trial)
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return round(sum(row["length/mean"] * BATCH for row in rows))

    return loop


def prepare_trl(world: Path) -> Callable[[], int]:
    """As `prepare_ours`."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        GPT2ForSequenceClassification,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    assert trl.__version__ == TRL_VERSION, f"found trl {trl.__version__} in place of {TRL_VERSION}"
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(world / "policy", padding_side="left")
    prompts = json.loads((world / "prompts.json").read_text())
    rows = Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]})
    value = GPT2ForSequenceClassification.from_pretrained(world / "policy", num_labels=1)
    torch.nn.init.zeros_(value.score.weight)
    config = PPOConfig(
        output_dir=str(world / "trl"),
        total_episodes=EPISODES,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        num_ppo_epochs=EPOCHS,
        num_mini_batches=1,
        response_length=RESPONSE,
        temperature=1.0,
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        num_sample_generations=0,
        report_to=[],
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(world / "policy"),
        ref_model=None,  # copied from the model
        reward_model=AutoModelForSequenceClassification.from_pretrained(world / "classifier"),
        value_model=value,
        train_dataset=rows,
    )

    drawn = []
    generate = ppo_trainer.batch_generation

    def counted(model: Any, queries: Any, *settings: Any) -> Any:
        sequences, logits = generate(model, queries, *settings)
        drawn.append(sequences[:, queries.shape[1] :].numel())
        return sequences, logits

    def loop() -> int:
        ppo_trainer.batch_generation = counted
        trainer.train()
        return sum(drawn)

    return loop


SIDES = {"ours": prepare_ours, "trl": prepare_trl}


def work(side: str, world: Path, profile: bool) -> None:
    """What a child process does: one run, its numbers on the last line of standard output."""
    loop = SIDES[side](world)
    profiler = cProfile.Profile(time.process_time)
    times, tokens = timed(lambda: profiler.runcall(loop) if profile else loop())
    assert tokens == EPISODES * RESPONSE, f"{side} drew {tokens} tokens, not {EPISODES * RESPONSE}"
    if profile:
        print_profile(profiler)
    print(json.dumps({"side": side} | times))


def print_profile(profiler: cProfile.Profile, count: int = 15) -> None:
    """The functions that take longest by themselves, and the share of their callees with them."""
    stats = pstats.Stats(profiler)
    rows: dict[tuple[str, int, str], tuple] = stats.stats  # type: ignore[attr-defined]
    total = stats.total_tt  # type: ignore[attr-defined]
    print(f"{'own %':>6} {'with callees %':>15} {'calls':>8}  function")
    slowest = sorted(rows.items(), key=lambda row: -row[1][2])[:count]
    for place, (_, calls, own, cumulative, _) in slowest:
        name = pstats.func_std_string(place).replace(str(ROOT) + "/", "").split("site-packages/")
        print(f"{100 * own / total:6.1f} {100 * cumulative / total:15.1f} {calls:8d}  {name[-1]}")


# ------------------------------------------------------------------------------------ the benchmark


def install_trl(folder: Path) -> None:
    """Put TRL 1.12.0, and nothing it depends on, into `folder`, once."""
    if (folder / f"trl-{TRL_VERSION}.dist-info" / "RECORD").exists():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-deps", "--upgrade", "--target", folder, f"trl=={TRL_VERSION}"], check=True
    )
    (folder / ".gitignore").write_text("*\n")


def run(side: str, world: Path, trl: Path, *more: str) -> tuple[dict[str, Any], str]:
    """One run in a fresh process: its numbers, and what it printed before them."""
    path = {"ours": ROOT, "trl": trl}[side]
    return child(__file__, "--side", side, "--world", str(world), *more, path=path)


def compare(rounds: int, world: Path, trl: Path) -> dict[str, Any]:
    """`rounds` runs of each side in turn, printed as they end, and their medians."""
    about = describe(TRL_VERSION)
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'round':>5} {'side':>5} {'CPU s':>8} {'wall s':>8}")
    runs = []
    for number in range(1, rounds + 1):
        for side in SIDES:
            result, _ = run(side, world, trl)
            print(f"{number:5d} {side:>5} {result['cpu']:8.2f} {result['wall']:8.2f}", flush=True)
            runs.append({"round": number, **result})
    median = {
        side: statistics.median(r["cpu"] for r in runs if r["side"] == side) for side in SIDES
    }
    ratio = median["trl"] / median["ours"]
    print(f"median CPU seconds: ours {median['ours']:.2f}, TRL {median['trl']:.2f}")
    print(f"ratio TRL / ours: {ratio:.2f}")
    return about | {"runs": runs, "median_cpu": median, "ratio": ratio}


def arguments() -> Namespace:
    """The command line."""
    found = parser(__doc__)
    found.add_argument(
        "--trl-dir",
        type=Path,
        default=ROOT / "build" / f"trl-{TRL_VERSION}",
        help=f"where TRL {TRL_VERSION} is, or will be installed (default: build/trl-{TRL_VERSION})",
    )
    found.add_argument("--profile", action="store_true", help="show where ours spends its time")
    return found.parse_args()


def main() -> None:
    """Parent or child, as the arguments say."""
    asked = arguments()
    if asked.side:
        work(asked.side, asked.world, asked.profile)
        return
    if asked.rounds < 1:
        sys.exit(f"--rounds {asked.rounds} must be at least 1")
    trl = asked.trl_dir.resolve()
    if not asked.profile:
        install_trl(trl)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        build_world(world)
        if asked.profile:
            print(run("ours", world, trl, "--profile")[1])
            return
        found = compare(asked.rounds, world, trl)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
