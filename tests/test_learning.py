"""PPO learns a toy beyond doubt, its knobs pull the way they say, and NaNs end nowhere else."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from lab import DATA, PROMPTS, Lab, MakeLab, Vowels
from torch import Tensor

from rlhf_exp.algorithms.ppo import PPO, Experience
from rlhf_exp.policy import Policy, Rollouts

pytest_plugins = ["lab_fixtures"]


def ready(room: Lab, algorithm: PPO, samples: int = 4) -> tuple[Rollouts, Experience]:
    """Set up the algorithm; scored rollouts with random advantages, as `update` takes them."""
    algorithm.setup(room.policy, room.reward, DATA, room.trial)
    rollouts = room.policy.sample(PROMPTS, samples)
    experience = algorithm.look_back(rollouts)
    noise = torch.randn(rollouts.response.shape) * rollouts.response
    experience.advantages, experience.returns = noise, noise + 1.0 * rollouts.response
    return rollouts, experience


def ppo(**changes: Any) -> PPO:
    settings: dict[str, Any] = {
        "steps": 12,
        "batch": 32,
        "minibatch": 32,
        "epochs": 2,
        "lr": 3e-3,
        "kl_coef": 0.0,
    }
    return PPO(**settings | changes)


def disturb(policy: Policy) -> None:
    """Another policy than a moment ago."""
    with torch.no_grad():
        weight = policy.model.transformer.h[0].mlp.c_fc.weight
        weight += torch.randn_like(weight)


# ---- learning


@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_learns_to_write_vowels(seed: int, lab: MakeLab) -> None:
    room = lab(seed=seed)
    before = room.scores()
    metrics = room.run(ppo(steps=30, batch=64, minibatch=64))
    after = room.scores()
    error = (before.var() / len(before) + after.var() / len(after)).sqrt()
    assert after.mean() - before.mean() > 10 * error
    assert after.mean() > 4 * before.mean()
    assert metrics[-1]["kl/k1"] > 1  # and it had to move for that


def test_nothing_is_learned_from_a_constant_score(lab: MakeLab) -> None:
    """The control: what rises above is the reward's doing."""

    class Constant(Vowels):
        def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
            return torch.ones(len(completions))

    room = lab(reward=Constant())
    room.run(ppo(steps=30, batch=64, minibatch=64))
    room.reward = Vowels()
    assert room.scores().mean() < 1


# ---- knobs, and their way

# With a large eps, Adam's step is in proportion to the gradient: weights compare as gradients do.
in_proportion = {"eps": 1.0, "lr": 1.0, "max_grad_norm": 1e9}


def test_the_kl_penalty_holds_the_policy_back(lab: MakeLab) -> None:
    free = lab().run(ppo())[-1]
    held = lab().run(ppo(kl_coef=2.0))[-1]
    assert held["kl/k1"] < 0.5 * free["kl/k1"]
    assert held["reward/proxy"] < free["reward/proxy"]


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3", "full"])
def test_every_kl_estimate_is_taken_off_the_score(estimator: str, lab: MakeLab) -> None:
    rows = lab().run(ppo(steps=6, kl_coef=0.5, kl_estimator=estimator, score_scaling="none"))
    taken = [row["reward/proxy"] - row["reward/shaped"] for row in rows]
    assert taken[0] == pytest.approx(0, abs=1e-4)
    assert taken[-1] > 0.01
    if estimator in ("k1", "k2", "k3"):
        measured = [0.5 * row[f"kl/{estimator}"] for row in rows]
        assert taken == pytest.approx(measured, abs=1e-4)


def test_the_full_kl_is_what_its_estimates_estimate(lab: MakeLab) -> None:
    room = lab()
    disturb(room.policy)
    rollouts, full = ready(room, ppo(kl_estimator="full"), samples=60)
    mask = rollouts.response.bool()
    assert (full.kl[mask] > 0).all()
    assert (full.kl[~mask] == 0).all()
    sampled = full.log_ratio[mask]
    error = sampled.std() / sampled.numel() ** 0.5
    assert abs(float(sampled.mean() - full.kl[mask].mean())) < 5 * float(error)


def test_the_full_kl_in_the_loss_holds_the_policy_back(lab: MakeLab) -> None:
    free = lab().run(ppo())[-1]
    held = lab().run(ppo(kl_loss_coef=5.0))
    assert held[-1]["kl/k1"] < 0.5 * free["kl/k1"]
    assert all(row["ppo/kl_loss"] >= 0 for row in held)


def test_the_adaptive_coefficient_steers_to_its_target(lab: MakeLab) -> None:
    rows = lab().run(ppo(steps=30, kl_coef=0.1, kl_target=0.5, kl_horizon=100.0))
    rising = [row for row in rows if row["kl/k1"] > 0.5]
    assert rising
    for row, following in pairwise(rows):
        change = following["kl/coef"] - row["kl/coef"]
        assert (change > 0) == (row["kl/k1"] > 0.5)


def test_the_entropy_bonus_keeps_completions_varied(lab: MakeLab) -> None:
    plain, varied = (
        lab().run(ppo(steps=25, batch=64, minibatch=64, entropy_coef=coef)) for coef in (0.0, 1.0)
    )
    assert plain[-1]["ppo/entropy"] < plain[0]["ppo/entropy"] - 0.5
    assert varied[-1]["ppo/entropy"] > plain[-1]["ppo/entropy"] + 0.3


@pytest.mark.parametrize("hidden", [None, 16])
def test_the_value_head_learns_the_returns(hidden: int | None, lab: MakeLab) -> None:
    room, algorithm = (
        lab(),
        ppo(value_hidden=hidden, vf_coef=1.0, value_clip=None, lr=0.0, value_lr=3e-2),
    )
    rollouts, experience = ready(room, algorithm)
    experience.returns = 3.0 * rollouts.response
    rows = torch.arange(len(rollouts))
    start = room.weights()
    losses = [algorithm.update(rollouts, experience, rows)["ppo/value_loss"] for _ in range(80)]
    assert losses[0] == pytest.approx(4.5)  # 0.5 * (0 - 3)^2: the head starts at zero
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(room.weights(), start)  # value_lr is the head's alone


def test_an_update_moves_probability_to_what_was_better(lab: MakeLab) -> None:
    room, algorithm = lab(), ppo(clip=10.0, vf_coef=0.0)
    rollouts, experience = ready(room, algorithm)
    sign = torch.ones(len(rollouts), 1)
    sign[1::2] = -1
    experience.advantages = sign * rollouts.response
    algorithm.update(rollouts, experience, torch.arange(len(rollouts)))
    change = (
        (algorithm.look_back(rollouts).logprobs - experience.logprobs) * rollouts.response
    ).sum(1)
    assert change[0::2].mean() > change[1::2].mean() + 0.1


def test_whitening_per_minibatch_is_whitening_per_batch_when_they_are_one(lab: MakeLab) -> None:
    def trained(**changes: Any) -> Tensor:
        room = lab()
        room.run(ppo(steps=2, **in_proportion, **changes))
        return room.weights()

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max())

    assert apart(trained(whiten="minibatch"), trained(whiten="batch")) < 1e-5
    small = [trained(whiten=w, minibatch=8) for w in ("minibatch", "batch")]
    assert apart(*small) > 1e-3
    assert apart(trained(whiten="none"), trained(whiten="batch")) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"whiten": "batch"},
        {"whiten": "minibatch", "entropy_coef": 0.1, "kl_loss_coef": 0.5, "value_hidden": 16},
    ],
)
def test_micro_batches_do_not_change_the_gradient(changes: dict[str, Any], lab: MakeLab) -> None:
    def updated(token_budget: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        room, algorithm = lab(), ppo(token_budget=token_budget, **in_proportion, **changes)
        rollouts, experience = ready(room, algorithm)
        start = room.weights()
        stats = algorithm.update(rollouts, experience, torch.arange(len(rollouts)))
        return start, room.weights(), stats

    start, whole, stats = updated(10**9)
    _, pieces, pieced = updated(20)  # one or two rollouts each
    assert (whole - start).abs().max() > 1e-3
    assert torch.allclose(whole, pieces, rtol=0, atol=1e-5)
    assert pieced == pytest.approx(stats, rel=1e-3, abs=1e-5)


# ---- numbers that are none


def test_a_score_that_is_no_number_is_refused(lab: MakeLab) -> None:
    class Broken(Vowels):
        calls = 0

        def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
            self.calls += 1
            scores = super().__call__(prompts, completions)
            if self.calls > 4:  # two evaluations at the start, proxy and gold, and two steps
                scores[3] = float("nan")
            return scores

    room = lab(reward=Broken())
    with pytest.raises(ValueError, match=r"reward gave nan for the completion .*must be finite"):
        room.run(ppo())
    assert (room.directory / "metrics.jsonl").read_text().count('"reward/proxy":') == 2


def break_gradients(room: Lab, when: Callable[[int], bool]) -> None:
    """Make the gradient of one weight infinite in the backward passes that `when` picks, from 0."""
    passes = iter(range(10**6))
    parameter = next(p for p in room.policy.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda g: g * float("inf") if when(next(passes)) else g)


def test_an_update_without_a_finite_gradient_is_skipped_and_counted(lab: MakeLab) -> None:
    room, algorithm = lab(), ppo(minibatch=32)
    rollouts, experience = ready(room, algorithm)
    break_gradients(room, lambda number: number == 0)
    start, rows = room.weights(), torch.arange(len(rollouts))
    skipped = algorithm.update(rollouts, experience, rows)
    assert torch.equal(room.weights(), start)
    assert skipped["applied"] == 0
    assert algorithm.descent.skipped == 1
    applied = algorithm.update(rollouts, experience, rows)
    assert applied["applied"] == 1
    assert algorithm.descent.skipped == 1
    assert not torch.equal(room.weights(), start)
    assert room.weights().isfinite().all()


def test_skipped_updates_show_in_the_metrics(lab: MakeLab) -> None:
    room = lab()
    break_gradients(
        room, lambda number: number in (1, 2)
    )  # the second epoch of step 0, the first of step 1
    rows = room.run(ppo(steps=3))
    assert [row["ppo/skipped_updates"] for row in rows] == [1, 2, 2]


def test_a_step_without_any_finite_gradient_ends_the_run(lab: MakeLab) -> None:
    room = lab()
    break_gradients(room, lambda number: number >= 4)
    with pytest.raises(ValueError, match=r"no update of this step .* lower algo\.lr"):
        room.run(ppo(steps=5))
    assert room.weights().isfinite().all()


def test_a_guarded_ratio_skips_the_update(lab: MakeLab) -> None:
    room, algorithm = lab(), ppo(ratio_guard=2.0)
    rollouts, experience = ready(room, algorithm)
    experience.logprobs = experience.logprobs - 2.0 * rollouts.response  # ratios of e^2
    start = room.weights()
    algorithm.update(rollouts, experience, torch.arange(len(rollouts)))
    assert torch.equal(room.weights(), start)
    assert algorithm.descent.skipped == 1


@pytest.mark.parametrize(("limit", "updates"), [(None, 6), (1e9, 6), (-1e9, 2)])
def test_stop_kl_ends_the_epochs(limit: float | None, updates: int, lab: MakeLab) -> None:
    row = lab().run(ppo(steps=1, epochs=3, minibatch=16, stop_kl=limit))[0]
    assert (
        row["ppo/updates"] == updates
    )  # two minibatches an epoch; a stop waits for the epoch's end


# ---- invariants at step 0


def test_kl_and_ratio_start_where_they_must(lab: MakeLab) -> None:
    first = lab().run(ppo(steps=1, epochs=1))[0]
    for name in ("kl/k1", "kl/k2", "kl/k3"):
        assert first[name] == pytest.approx(0, abs=1e-5)
    assert first["ppo/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["ppo/clip_fraction"] == 0


def test_a_policy_that_is_not_its_reference_is_caught(lab: MakeLab) -> None:
    room = lab()
    disturb(room.policy)
    with pytest.raises(AssertionError, match="differs from its reference"):
        room.run(ppo())
