"""Tokens per second and MFU, from numbers one can check by hand."""

import pytest
import torch
from lab import PROMPTS, MakeLab

from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.plan.skeleton import count
from rlhf_exp.plan.work import Texts, step_flops
from rlhf_exp.speed import Speed

pytest_plugins = ["lab_fixtures"]
SECONDS = {"sample": 2.0, "score": 1.0, "learn": 4.0}


def test_tokens_and_useful_operations_are_told_per_second(lab: MakeLab) -> None:
    room = lab()
    rollouts = room.policy.sample(PROMPTS, 2)
    tokens = float(rollouts.response.sum())
    algorithm = PPO(steps=1, batch=18, minibatch=18)
    slow = Speed(algorithm=algorithm, policy=room.policy, peak_tflops=None)(rollouts, SECONDS)
    assert slow == {
        "tokens_per_second/sample": tokens / 2,
        "tokens_per_second/learn": tokens / 4,
    }
    found = Speed(algorithm=algorithm, policy=room.policy, peak_tflops=1e-3)(rollouts, SECONDS)
    prompt = float(rollouts.mask[:, : rollouts.width].sum()) / 18
    flops = step_flops(algorithm, count(room.policy.model), [], Texts(18, prompt, tokens / 18))
    assert found["mfu/learn"] == pytest.approx(flops["learn"] / (4.0 * 1e9))
    assert found["mfu/sample"] == pytest.approx(flops["sample"] / (2.0 * 1e9))
    assert 0 < found["mfu/sample"] < found["mfu/learn"]


def test_phases_that_were_not_timed_are_not_told_of(lab: MakeLab) -> None:
    room = lab()
    rollouts = room.policy.sample(PROMPTS)
    rollouts.scores = torch.zeros(len(PROMPTS))
    speed = Speed(algorithm=None, policy=room.policy, peak_tflops=1.0)
    assert speed(rollouts, {"step": 1.0}) == {}
