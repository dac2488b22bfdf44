"""Our PPO and TRL's on the same work: CPU-seconds on a CPU, tokens per second on a GPU.

    python benchmarks/ppo_vs_trl.py                  # 3 rounds, a minute or two
    python benchmarks/ppo_vs_trl.py --profile        # where ours spends its time
    python benchmarks/ppo_vs_trl.py --json FILE      # the numbers, for a table elsewhere
    python benchmarks/ppo_vs_trl.py --size pythia_410m    # on a GPU; also pythia_1.4b

TRL has had no PPO since 1.12.0 (`trl.experimental.ppo`), so that version is installed into a
folder of its own (`--trl-dir`), which only TRL's process sees. Both sides start from the same
weights and do the same work: 512 episodes of 16 prompt and 32 response tokens in batches of 64,
4 epochs of one minibatch each (TRL's defaults), a 2-layer GPT-2 of width 64 over 512 tokens, the
same sequence classifier as reward, 1 thread, fp32. End-of-text and padding lie beyond the policy's
vocabulary, so every response is full. Every run is a fresh process, the sides take turns, and what
counts is user + system time of the training loop alone: not imports, not building models.

On a GPU: policies and reward models with random weights in the shapes of Pythia, over 40,000
tokens, 256 prompt and 256 response tokens, batches of 64 in micro-batches of 16, 128 episodes, bf16
products over float32 weights (the reward model in bf16), and what counts is wall time.

What differs is each side's own way. TRL trains a value model with a trunk of its own and clips no
gradients. Ours has a value head on the policy's trunk, clips, and hands its reward text,
which is tokenized again.

Left out: evaluation and checkpoints (on both sides), memory, several GPUs, and whether the two
learn equally well.
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
from dataclasses import dataclass
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
BATCH, EPOCHS = 64, 4
LR, BETAS = 1e-4, (0.9, 0.95)


@dataclass(frozen=True)
class Size:
    """The work of both sides."""

    architecture: dict[str, Any]  # of the policy and, with a head, of the reward model
    vocabulary: int
    prompt: int  # tokens
    response: int
    episodes: int
    micro: int  # rows of a forward pass that is learned from
    gpu: bool = True

    @property
    def dtype(self) -> str:
        """Of the reward model."""
        return "bfloat16" if self.gpu else "float32"


def pythia(width: int, layers: int, heads: int) -> Size:
    """As in Biderman et al. 2023."""
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"model_type": "gpt_neox", "intermediate_size": 4 * width}
    return Size(shape | {"max_position_embeddings": 512}, 40_000, 256, 256, 128, 16)


SIZES = {
    "tiny": Size(
        {"model_type": "gpt2", "n_positions": PROMPT + RESPONSE} | SHAPE,
        VOCABULARY,
        PROMPT,
        RESPONSE,
        512,
        BATCH,
        gpu=False,
    ),
    "pythia_410m": pythia(1024, 24, 16),
    "pythia_1.4b": pythia(2048, 24, 16),
}


# ------------------------------------------------------------------------------ what both sides get


def build_world(folder: Path, size: Size) -> None:
    """Save tokenizers, policy, reward classifier and prompts below `folder` for both sides."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    end, pad = {"eos_token": "<end>"}, {"pad_token": "<pad>"}
    count = size.vocabulary
    for name, specials in (("policy", end | pad), ("classifier", pad)):
        make_tokenizer(count, **specials).save_pretrained(folder / name)
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    policy = AutoConfig.for_model(**size.architecture, **ends, vocab_size=count)
    AutoModelForCausalLM.from_config(policy).save_pretrained(folder / "policy")
    # the classifier knows its pad token: without one transformers refuses to score batches
    more = {"vocab_size": count + 2, "num_labels": 1, "pad_token_id": count}
    classifier = AutoConfig.for_model(**size.architecture, **ends, **more)
    model = AutoModelForSequenceClassification.from_config(classifier)
    model.to(getattr(torch, size.dtype)).save_pretrained(folder / "classifier")
    (folder / "prompts.json").write_text(json.dumps(texts(size.episodes, size.prompt, count)))


# ------------------------------------------------------------------------------------ the two sides


def prepare_ours(world: Path, size: Size) -> Callable[[], int]:
    """All that precedes the loop; returns the loop, which tells how many tokens it drew."""
    from rlhf_exp.algorithms.ppo import PPO
    from rlhf_exp.data.rows import Dataset
    from rlhf_exp.hardware import Hardware
    from rlhf_exp.policy import Policy
    from rlhf_exp.precision import Autocast
    from rlhf_exp.rewards.pairwise import Pairwise

    device = "cuda" if size.gpu else "cpu"
    hardware = Hardware(device=device, threads=1, mixed_precision="bf16" if size.gpu else "no")
    policy = Policy(path=str(world / "policy"), max_new_tokens=size.response)
    policy.precision = Autocast(hardware.mixed_precision, device)
    policy.load(world / "policy", trainable=True, device=device)
    policy.model.resize_token_embeddings(size.vocabulary)  # end and padding cannot be drawn
    reward = Pairwise(
        path=str(world / "classifier"), train=False, normalise="none", dtype=size.dtype
    )
    reward.load(device)
    algorithm = PPO(
        steps=size.episodes // BATCH,
        batch=BATCH,
        epochs=EPOCHS,
        minibatch=BATCH,
        token_budget=size.micro * (size.prompt + size.response),
        lr=LR,
        betas=list(BETAS),
    )
    data = Dataset(prompts=json.loads((world / "prompts.json").read_text()), held_out=[])
    folder = Path(tempfile.mkdtemp(dir=world))
    trial = bare_trial(folder, policy, reward, hardware)

    def loop() -> int:
        algorithm.run(policy, reward, data, trial)
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return round(sum(row["length/mean"] * BATCH for row in rows))

    return loop


def prepare_trl(world: Path, size: Size) -> Callable[[], int]:
    """As `prepare_ours`."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    assert trl.__version__ == TRL_VERSION, f"found trl {trl.__version__} in place of {TRL_VERSION}"
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(world / "policy", padding_side="left")
    prompts = json.loads((world / "prompts.json").read_text())
    rows = Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]})
    value = AutoModelForSequenceClassification.from_pretrained(world / "policy", num_labels=1)
    torch.nn.init.zeros_(value.score.weight)
    config = PPOConfig(
        output_dir=str(world / "trl"),
        total_episodes=size.episodes,
        per_device_train_batch_size=size.micro,
        gradient_accumulation_steps=BATCH // size.micro,
        local_rollout_forward_batch_size=size.micro,
        num_ppo_epochs=EPOCHS,
        num_mini_batches=1,
        response_length=size.response,
        temperature=1.0,
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        use_cpu=not size.gpu,
        bf16=size.gpu,
        save_strategy="no",
        num_sample_generations=0,
        report_to=[],
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(world / "policy"),
        ref_model=None,  # copied from the model
        reward_model=AutoModelForSequenceClassification.from_pretrained(
            world / "classifier", dtype=getattr(torch, size.dtype)
        ),
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


def work(side: str, world: Path, size: Size, profile: bool) -> None:
    """What a child process does: one run, its numbers on the last line of standard output."""
    loop = SIDES[side](world, size)
    profiler = cProfile.Profile(time.process_time)
    times, tokens = timed(lambda: profiler.runcall(loop) if profile else loop())
    expected = size.episodes * size.response
    assert tokens == expected, f"{side} drew {tokens} tokens, not {expected}"
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


def run(side: str, world: Path, trl: Path, size: str, *more: str) -> tuple[dict[str, Any], str]:
    """One run in a fresh process: its numbers, and what it printed before them."""
    path = {"ours": ROOT, "trl": trl}[side]
    told = ["--side", side, "--world", str(world), "--size", size]
    return child(__file__, *told, *more, path=path)


def compare(rounds: int, world: Path, trl: Path, name: str) -> dict[str, Any]:
    """`rounds` runs of each side in turn, printed as they end, and their medians."""
    size = SIZES[name]
    about = describe(TRL_VERSION) | {"size": name}
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    print(f"{'round':>5} {'side':>5} {'CPU s':>8} {'wall s':>8} {'tokens/s':>9}")
    drawn = size.episodes * size.response
    runs = []
    for number in range(1, rounds + 1):
        for side in SIDES:
            result, _ = run(side, world, trl, name)
            cpu, wall = result["cpu"], result["wall"]
            print(f"{number:5d} {side:>5} {cpu:8.2f} {wall:8.2f} {drawn / wall:9.0f}", flush=True)
            runs.append({"round": number, **result})
    counts = "wall" if size.gpu else "cpu"
    median = {
        side: statistics.median(r[counts] for r in runs if r["side"] == side) for side in SIDES
    }
    ratio = median["trl"] / median["ours"]
    print(f"median {counts} seconds: ours {median['ours']:.2f}, TRL {median['trl']:.2f}")
    print(f"ratio TRL / ours: {ratio:.2f}")
    return about | {"runs": runs, f"median_{counts}": median, "ratio": ratio}


def require_gpu(name: str) -> None:
    """Say plainly that nothing was measured."""
    import torch

    if SIZES[name].gpu and not torch.cuda.is_available():
        sys.exit(f"--size {name} needs a GPU and torch sees none: nothing was measured")


def arguments() -> Namespace:
    """The command line."""
    found = parser(__doc__)
    found.add_argument(
        "--trl-dir",
        type=Path,
        default=ROOT / "build" / f"trl-{TRL_VERSION}",
        help=f"where TRL {TRL_VERSION} is, or will be installed (default: build/trl-{TRL_VERSION})",
    )
    found.add_argument("--size", choices=SIZES, default="tiny", help="(default: tiny, on a CPU)")
    found.add_argument("--profile", action="store_true", help="show where ours spends its time")
    return found.parse_args()


def main() -> None:
    """Parent or child, as the arguments say."""
    asked = arguments()
    if asked.side:
        work(asked.side, asked.world, SIZES[asked.size], asked.profile)
        return
    require_gpu(asked.size)
    if asked.rounds < 1:
        sys.exit(f"--rounds {asked.rounds} must be at least 1")
    trl = asked.trl_dir.resolve()
    if not asked.profile:
        install_trl(trl)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        build_world(world, SIZES[asked.size])
        if asked.profile:
            print(run("ours", world, trl, asked.size, "--profile")[1])
            return
        found = compare(asked.rounds, world, trl, asked.size)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
