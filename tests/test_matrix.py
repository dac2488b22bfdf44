"""Every algorithm with every reward: each pair trains on the embedded world, evaluates and saves,
and an algorithm that learns from the run's reward raises it.

docs/support-matrix.md is made from the runs of these tests:

    python -m pytest tests/test_matrix.py --basetemp=matrix
    python -m rlhf_exp.report.matrix reward matrix > docs/support-matrix.md
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import inside

# Small steps that are large enough to see a reward rise. Those not named here learn from
# demonstrations or from a judge, so that nothing says that the run's reward should rise.
RAISES = {
    "ppo": "steps=8 batch=64 minibatch=64 lr=2e-3 kl_coef=0.02",
    "grpo": "steps=6 batch=8 samples=8 micro_batch=64 lr=2e-3 kl_coef=0.02",
    "rloo": "steps=6 batch=8 samples=8 micro_batch=64 lr=2e-3 kl_coef=0.02",
    "dpo": "pairs=sampled pairs_per_round=192 steps=10 batch=32 micro_batch=32 lr=2e-3",
    "rest": "steps=1 batch=40 samples=8 levels=[0.6,0.8] epochs=2 lr=3e-3 validation=0",
    "raft": "steps=2 batch=32 samples=8 epochs=3 lr=3e-3",
    "quark": "steps=3 batch=128 updates=30 minibatch=32 lr=3e-3 kl_coef=0 entropy_coef=0 compare=0",
    "alt_rm": "steps=3 batch=20 samples=10 per_prompt=10 epochs=6 minibatch=20 lr=3e-3 compare=0 "
    "entropy_coef=0",
    "best_of_n": "samples=8 prompts=128",
}
# A start that writes sentences, and enough of them to tell.
START = ["sft.epochs=1", "evaluation.prompts=128", "evaluation.every=99", "checkpoints.every=99"]
# Where scores lie close together, it takes more to see them rise.
LONGER = {
    "grpo": "steps=20 lr=5e-4",
    "rloo": "steps=20",
    "dpo": "pairs_per_round=640 steps=60 lr=5e-4",
    "quark": "steps=5 batch=256 updates=80",
    "raft": "steps=3 batch=64 lr=1e-3 threshold=top_k levels=[1]",
}
CLOSE = ("probe", "lexicon")
# Where so large steps overshoot.
SMALLER = {("dpo", "function"): "steps=12 lr=3e-4"}
OTHERS = ("sft", "alt_lmc", "alt_lmu", "steerlm")
REWARDS = {
    "pairwise": ["reward=pairwise", "reward.epochs=1"],
    "ensemble_mean": ["reward.objective=mean"],
    "ensemble_wco": ["reward.objective=wco"],
    "ensemble_uwo": ["reward.objective=uwo"],
    "probe": ["reward=probe", "data=facts", "reward.compare=[]", "evaluation.prompts=256"],
    "lexicon": ["reward=lexicon"],
    "function": ["reward=function", f"reward.function={__name__}:short"],
    "mix": ["reward=mix", "reward@reward.parts.proxy.reward=ensemble_small"],
}
CELLS = [(a, r) for r in REWARDS for a in (*RAISES, *OTHERS)]


def short(prompts: list[str], completions: list[str]) -> list[float]:
    """A function of a user's: the shorter the better."""
    return [-len(c) / 20 for c in completions]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds <algorithm>/<reward>/ for each pair that ran."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return shared / "cells"


@pytest.mark.parametrize(("algorithm", "reward"), CELLS, ids=[f"{a}-{r}" for a, r in CELLS])
def test_cell(algorithm: str, reward: str, cells: Path) -> None:
    run = cells / algorithm / reward
    more = LONGER.get(algorithm, "") if reward in CLOSE else SMALLER.get((algorithm, reward), "")
    settings = [f"algo.{s}" for s in f"{RAISES.get(algorithm, '')} {more}".split()]
    asked = ["experiment=debug", f"algo={algorithm}", *START, *REWARDS[reward], *settings]
    assert inside(run, *asked, f"artifacts={cells}/artifacts") == 0
    table = json.loads((run / "summary.json").read_text())
    if algorithm in RAISES:
        assert table["proxy"]["change"]["interval"][0] > 0, table["proxy"]
    assert table["prompts"] >= 128
    assert (run / "policy" / "model.safetensors").exists()
    assert saved_policy_is_the_trained_one(run, moved=algorithm != "best_of_n")


def saved_policy_is_the_trained_one(run: Path, *, moved: bool) -> bool:
    """Whether policy/ holds the weights of the last checkpoint, and they differ from the start's
    where anything was trained.
    """
    from safetensors.torch import load_file

    saved: dict[str, Any] = load_file(run / "policy" / "model.safetensors")
    for newest in sorted((run / "checkpoints").glob("step-*"))[-1:]:
        kept = torch.load(newest / "state.pt", weights_only=True)["policy"]
        assert all(torch.equal(kept[name], tensor) for name, tensor in saved.items())
    start = json.loads((run / "policy" / "policy.json").read_text())["base"]
    before = load_file(Path(start) / "model.safetensors")
    same = [torch.equal(before[k][: len(v)], v[: len(before[k])]) for k, v in saved.items()]
    return all(same) != moved
