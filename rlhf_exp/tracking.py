"""What a run leaves behind and what a person sees while it works.

Local files always: metrics.jsonl (one object per step, flat keys), samples.jsonl. A tracker gets
the same numbers on top. Of several processes, the main one writes and speaks.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rlhf_exp import processes
from rlhf_exp.policy import Rollouts

logger = logging.getLogger(__name__)

# metric: (lowest healthy, highest healthy, what to do). README shows this table.
HEALTHY: dict[str, tuple[float, float, str]] = {
    "kl/k1": (-0.5, 100.0, "the policy has left its start: raise algo.kl_coef, or lower algo.lr"),
    "ppo/clip_fraction": (0.0, 0.4, "updates are too large: lower algo.lr or algo.epochs"),
    "ppo/approx_kl": (0.0, 0.1, "updates are too large: lower algo.lr or algo.epochs"),
    "ppo/entropy": (
        0.05,
        float("inf"),
        "the policy has collapsed onto few completions: raise algo.kl_coef or algo.entropy_coef",
    ),
    "ppo/explained_variance": (
        -1.0,
        1.0,
        "the value function is worse than a constant: lower algo.value_lr or algo.vf_coef",
    ),
    "ppo/grad_norm": (0.0, 50.0, "gradients explode: lower algo.lr"),
    "dpo/accuracy": (0.4, 1.0, "rejected completions gain on chosen ones: lower algo.lr"),
    "grpo/flat_groups": (
        0.0,
        0.8,
        "most prompts teach nothing, as all their completions score alike: raise algo.samples or "
        "policy.temperature",
    ),
    "length/ended": (
        0.1,
        1.0,
        "completions hit policy.max_new_tokens: raise it, or set algo.missing_eos=subtract",
    ),
    "sampler/logprob_gap": (
        0.0,
        0.1,
        "the server samples from other numbers than are trained: let it serve in policy.dtype, "
        "without quantization, and lower sampler.refresh_every",
    ),
    "reward/valid": (
        0.5,
        1.0,
        "the format has collapsed: raise algo.kl_coef, lower algo.lr, or go back to "
        "checkpoints/best.json",
    ),
}


class NoTracker:
    """Local files only."""

    def start(self, config: dict[str, Any], directory: Path) -> None:
        pass

    def log(self, metrics: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass(kw_only=True)
class Tensorboard(NoTracker):
    """Event files under <run>/tensorboard."""

    def start(self, config: dict[str, Any], directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "tracker=tensorboard needs the package tensorboard: pip install tensorboard"
            ) from None
        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


@dataclass(kw_only=True)
class Wandb(NoTracker):
    """Weights & Biases; the key is read from WANDB_API_KEY and written nowhere."""

    project: str = "rlhf_exp"
    entity: str | None = None
    group: str | None = None
    name: str | None = None  # null: wandb's own
    mode: str = "online"  # online, offline or disabled

    def start(self, config: dict[str, Any], directory: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("tracker=wandb needs the package wandb: pip install wandb") from None
        try:
            self.run = wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group,
                name=self.name,
                mode=self.mode,  # type: ignore[arg-type]
                dir=str(directory),
                config=config,
            )
        except wandb.Error as error:
            raise ValueError(
                f"wandb refused to start ({error}): log in, or set tracker.mode=offline"
            ) from None

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()


class Log:
    """metrics.jsonl, samples.jsonl, the progress bar, and warnings when a metric leaves its healthy
    range.
    """

    def __init__(
        self,
        directory: Path,
        tracker: Any,
        *,
        show_every: int | None,  # null: a sixth of the run
    ) -> None:
        self.directory, self.show_every = directory, show_every
        self.tracker = tracker if processes.main() else NoTracker()
        self.bar: tqdm | None = None
        self.shown: dict[str, float] = {}  # what the bar says beside the step
        self.warned: set[str] = set()

    def begin(self, step: int, steps: int) -> None:
        """Start at `step`; what an interrupted attempt wrote beyond it is dropped, because it will
        be done again.
        """
        self.show_every = self.show_every or max(1, steps // 6)
        for name in ("metrics.jsonl", "samples.jsonl"):
            _truncate(self.directory / name, step)
        self.bar = tqdm(
            total=steps,
            initial=step,
            desc="align",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 30,
            disable=not processes.main(),
        )

    def step(
        self, step: int, rollouts: Rollouts, metrics: dict[str, float], seconds: dict[str, float]
    ) -> None:
        """Record step `step` (from 0) of the loop."""
        assert rollouts.scores is not None
        members = rollouts.members or {}
        row = {
            "reward/proxy": float(rollouts.scores.mean()),
            "reward/std": float(rollouts.scores.std(correction=0)),
        }
        row |= {f"reward/proxy/{k}": float(v.mean()) for k, v in members.items()}
        row |= {f"reward/{k}": float(v.mean()) for k, v in (rollouts.facets or {}).items()}
        row |= {
            "length/mean": float(rollouts.response.sum(1).mean()),
            "length/ended": float(rollouts.ended.float().mean()),
            **metrics,
            **{f"time/{k}": v for k, v in seconds.items()},
            "tokens_per_second": float(rollouts.response.sum()) / sum(seconds.values()),
        }
        if step % (self.show_every or 1) == 0:
            self._append("samples.jsonl", _samples(step, rollouts))
            self.say(
                f"[step {step}] {rollouts.prompts[0]!r} -> {rollouts.completions[0]!r} "
                f"({float(rollouts.scores[0]):+.2f})"
            )
        self.metrics(step, row)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Record the numbers of step `step`, warn of unhealthy ones, move the bar."""
        assert self.bar is not None
        self._append("metrics.jsonl", [{"step": step, **metrics}])
        self.tracker.log(metrics, step)
        self._warn(step, metrics)
        names = {"proxy": "reward/proxy", "KL": "kl/k1", "tok/s": "tokens_per_second"}
        self.shown |= {k: metrics[name] for k, name in names.items() if name in metrics}
        self.bar.set_postfix(
            {k: f"{v:.0f}" if k == "tok/s" else f"{v:.2f}" for k, v in self.shown.items()},
            refresh=False,
        )
        self.bar.update()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record the means of an evaluation after `step` steps."""
        self._append(
            "metrics.jsonl", [{"step": step} | {f"evaluation/{k}": v for k, v in metrics.items()}]
        )
        self.tracker.log({f"evaluation/{k}": v for k, v in metrics.items()}, step)
        if "reward/gold" in metrics:  # unless it is asked later
            self.shown["gold"] = metrics["reward/gold"]

    def say(self, text: str) -> None:
        """A line for the person watching, above the progress bar."""
        if processes.main():
            tqdm.write(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _warn(self, step: int, row: dict[str, float]) -> None:
        for name, (low, high, cure) in HEALTHY.items():
            if name in row and not low <= row[name] <= high and name not in self.warned:
                self.warned.add(name)
                logger.warning(
                    "step %d: %s = %.3g is outside %g..%g: %s",
                    step,
                    name,
                    row[name],
                    low,
                    high,
                    cure,
                )

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not processes.main():
            return
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _samples(step: int, rollouts: Rollouts, count: int = 4) -> list[dict[str, Any]]:
    assert rollouts.scores is not None
    members = rollouts.members or {}
    return [
        {
            "step": step,
            "prompt": rollouts.prompts[i],
            "completion": rollouts.completions[i],
            "proxy": float(rollouts.scores[i]),
            "members": {k: float(v[i]) for k, v in members.items()},
        }
        for i in range(min(count, len(rollouts)))
    ]


def _truncate(path: Path, step: int) -> None:
    """Keep the rows of the steps before `step`, and the evaluation made after it."""
    if not path.exists() or not processes.main():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # the last line of a killed process may be cut short
        if row["step"] < step or (
            0 < row["step"] == step and any(k.startswith("evaluation/") for k in row)
        ):
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
