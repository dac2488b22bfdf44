"""ReST: what passes a threshold, what an Improve step learns from, and that rewards rise."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import DATA, PROMPTS, Lab, MakeLab

from rlhf_exp.algorithms.rest import ReST, passing, set_aside
from rlhf_exp.data.local import write_jsonl
from rlhf_exp.data.rows import Dataset, Demonstration
from rlhf_exp.policy import Rollouts

pytest_plugins = ["lab_fixtures"]
CASE = json.loads((Path(__file__).parent / "vectors" / "conditional.json").read_text())[
    "rest_filter"
]
REWARDS = np.array(CASE["inputs"]["rewards"])
ONE = np.zeros(len(REWARDS), dtype=np.int64)


def rest(**changes: Any) -> ReST:
    settings: dict[str, Any] = {
        "steps": 2,
        "batch": 9,
        "samples": 12,
        "levels": [0.0, 0.5, 0.8],
        "demonstrations": 0,
        "epochs": 3.0,
        "minibatch": 16,
        "lr": 3e-3,
        "lr_decay": 0.7,
        "validation": 0,
    }
    return ReST(**settings | changes)


def ready(room: Lab, algorithm: ReST, data: Dataset = DATA) -> ReST:
    algorithm.setup(room.policy, room.reward, data, room.trial)
    algorithm.prepare()
    return algorithm


def scored(room: Lab, n: int) -> Rollouts:
    rollouts = room.policy.sample(PROMPTS, n)
    rollouts.scores = room.reward(rollouts.prompts, rollouts.completions)
    return rollouts


# ---- thresholds


def test_absolute_thresholds_keep_what_lies_strictly_above() -> None:
    for tau, kept in zip(CASE["inputs"]["taus"], CASE["expected"]["kept_fixed"], strict=True):
        assert np.flatnonzero(passing("absolute", tau, REWARDS, ONE)).tolist() == kept
    assert not passing("absolute", 0.95, REWARDS, ONE).any()


def test_quantile_thresholds_interpolate() -> None:
    levels = CASE["inputs"]["quantiles"]
    for level, tau, kept in zip(
        levels, CASE["expected"]["tau_quantile"], CASE["expected"]["kept_quantile"], strict=True
    ):
        assert np.quantile(REWARDS, level) == pytest.approx(tau, abs=1e-6)
        assert np.flatnonzero(passing("quantile", level, REWARDS, ONE)).tolist() == kept


def test_thresholds_of_each_prompt_are_its_own() -> None:
    rewards = np.array([0.0, 10.0, 1.0, 12.0, 2.0, 20.0, 3.0])
    prompts = np.array([0, 1, 0, 1, 0, 1, 0])  # of 0: 0, 1, 2, 3; of 1: 10, 12, 20
    assert passing("prompt_quantile", 0.5, rewards, prompts).nonzero()[0].tolist() == [4, 5, 6]
    # 0.5 * max + 0.5 * mean: 2.25 and 17
    assert passing("gamma", 0.5, rewards, prompts).nonzero()[0].tolist() == [5, 6]
    # the mean: 1.5 and 14
    assert passing("gamma", 0.0, rewards, prompts).nonzero()[0].tolist() == [4, 5, 6]
    assert not passing("gamma", 1.0, rewards, prompts).any()
    assert passing("top_k", 1, rewards, prompts).nonzero()[0].tolist() == [5, 6]
    assert passing("top_k", 2, rewards, prompts).nonzero()[0].tolist() == [3, 4, 5, 6]


def test_top_k_takes_the_first_of_equals() -> None:
    prompts = np.zeros(4, dtype=np.int64)
    assert passing("top_k", 2, np.ones(4), prompts).tolist() == [True, True, False, False]


# ---- learning


def test_reward_rises_along_improve_steps(lab: MakeLab) -> None:
    room = lab()
    before = room.scores()
    rows = room.run(rest(validation=3, validation_samples=40, samples=24, steps=3))
    assert room.scores().mean() > 2 * before.mean()
    for row in rows:
        along = [row[f"rest/validation/{i}"] for i in range(4)]
        assert row["rest/improved"] > 0
        assert max(along) == along[int(row["rest/improved"])] > along[0]
        assert [row[f"rest/lr/{i}"] for i in (1, 2, 3)] == pytest.approx([3e-3, 2.1e-3, 1.47e-3])
        assert row["rest/kept/1"] >= row["rest/kept/2"] >= row["rest/kept/3"] > 0
    assert rows[-1]["rest/validation/0"] > rows[0]["rest/validation/0"]


def test_weights_that_do_no_better_on_validation_are_not_kept(
    lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = lab()
    algorithm = ready(room, rest(validation=3))
    falling = iter([3.0, 2.0, 1.0, 0.0])
    algorithm.aside = PROMPTS[6:]
    monkeypatch.setattr(algorithm, "look", lambda prompts, samples: next(falling))
    start = room.weights()
    metrics = algorithm.learn(scored(room, 12), 0)
    assert metrics["rest/improved"] == 0
    assert torch.equal(room.weights(), start)


def test_prompts_set_aside_are_neither_sampled_nor_learned_from(
    lab: MakeLab, tmp_path: Path
) -> None:
    room = lab()
    told = [Demonstration(p, " aaaa") for p in PROMPTS]
    data = Dataset(prompts=[*PROMPTS, *PROMPTS], held_out=PROMPTS, demonstrations=told)
    start = tmp_path / "start.jsonl"
    write_jsonl(start, [{"prompt": p, "generations": [" eeee"]} for p in PROMPTS])
    algorithm = rest(validation=4, demonstrations=None, start=str(start), steps=1)
    algorithm.check(room.policy, data)
    with room.trial.listening():
        algorithm.run(room.policy, room.reward, data, room.trial)
    assert len(algorithm.aside) == 4
    assert set(algorithm.pool.prompts) == set(PROMPTS) - set(algorithm.aside)
    assert algorithm.pool.completions.count(" aaaa") == 5
    assert algorithm.pool.completions.count(" eeee") == 5


def test_the_same_prompts_are_set_aside_whenever_the_seed_is_the_same() -> None:
    aside, others = set_aside(DATA, 3, seed=1)
    assert set_aside(DATA, 3, seed=1) == (aside, others)
    assert set_aside(DATA, 3, seed=2)[0] != aside
    assert sorted(aside + others.prompts) == sorted(PROMPTS)
    with pytest.raises(ValueError, match=r"algo\.validation=9 .* the 9 of the data"):
        set_aside(DATA, 9, seed=1)


def test_the_learning_rate_falls_with_every_improve_step(
    lab: MakeLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = lab()
    algorithm = ready(room, rest())
    scales: list[float] = []
    told = {"imitation/lr": 0.0, "imitation/nll": 0.0}
    monkeypatch.setattr(algorithm, "imitate", lambda e, u, scale: scales.append(scale) or told)
    algorithm.learn(scored(room, 12), 0)
    assert scales == pytest.approx([1.0, 0.7, 0.49])


@pytest.mark.parametrize("loss", ["bc", "reward_weighted", "advantage_weighted"])
def test_weights_have_mean_one_and_grow_with_reward(loss: str, lab: MakeLab) -> None:
    room = lab()
    algorithm = ready(room, rest(loss=loss, deduplicate=False))
    algorithm._grow(scored(room, 12))
    weights = algorithm._weights(np.arange(len(algorithm.pool)))
    assert weights.mean() == pytest.approx(1.0)
    first = algorithm.groups == 0
    order = np.argsort(algorithm.rewards[first], kind="stable")
    gaps = np.diff(weights[first][order])[np.diff(algorithm.rewards[first][order]) > 0]
    assert (gaps > 0).all() if loss != "bc" else (weights == 1).all()


def test_a_kl_to_the_behavior_policy_holds_back(lab: MakeLab) -> None:
    found = []
    for coef in (1e-9, 5.0):
        room = lab()
        rows = room.run(rest(kl_coef=coef, steps=1, epochs=6.0, kl_direction="reference_to_policy"))
        found.append(rows[0]["imitation/kl"])
    assert found[1] < 0.5 * found[0]


def test_the_behavior_policy_is_the_one_that_sampled_not_the_first(lab: MakeLab) -> None:
    room = lab(lora={"r": 2, "fan_in_fan_out": True})
    algorithm = ready(room, rest(kl_coef=0.1, lr=3e-2))
    algorithm.learn(scored(room, 12), 0)
    moved = algorithm.policy.trainable_state()
    again = algorithm.learn(scored(room, 12), 1)
    assert 0 < again["imitation/kl"] < 1
    held = dict(algorithm.reference.kind.model.named_parameters())
    for name, tensor in moved.items():
        assert torch.equal(held[name], tensor), "the adapter as it was when the second Grow began"


# ---- the mixture


TOLD = [
    Demonstration("big cat:", " aaaa"),
    Demonstration("big cat:", " aaaa"),
    Demonstration("far:", " b"),
]


def test_demonstrations_are_scored_and_have_to_pass_too(lab: MakeLab) -> None:
    room = lab()
    data = Dataset(prompts=PROMPTS, held_out=PROMPTS, demonstrations=TOLD)
    algorithm = ready(room, rest(demonstrations=None, normalise=False), data)
    algorithm._grow(scored(room, 12))
    told = [i for i, c in enumerate(algorithm.pool.completions) if c in (" aaaa", " b")]
    assert [algorithm.pool.scores[i] for i in told] == [4.0, 0.0]  # equal ones count once
    assert algorithm.pool.responses[told[0]][-1] == room.policy.tokenizer.eos_token_id
    kept = algorithm._passing(0.8)
    assert told[0] in kept
    assert told[1] not in kept


def test_equal_completions_count_once_unless_told_otherwise(lab: MakeLab) -> None:
    room = lab()
    rollouts = scored(room, 2)
    rollouts.scores = torch.arange(len(rollouts)).float()
    doubled = rollouts.select(torch.tensor([0, 0, 1, 1, 1]))
    sizes = []
    for once in (True, False):
        algorithm = ready(lab(), rest(deduplicate=once))
        algorithm._grow(doubled)
        sizes.append(len(algorithm.pool))
    assert sizes == [2, 5]


def test_rewards_are_normalised_to_the_unit_interval(lab: MakeLab) -> None:
    room = lab()
    algorithm = ready(room, rest(threshold="absolute", levels=[0.5]))
    algorithm._grow(scored(room, 12))
    assert (algorithm.rewards.min(), algorithm.rewards.max()) == (0.0, 1.0)
    raw = np.array(algorithm.pool.scores)
    assert algorithm.rewards == pytest.approx((raw - raw.min()) / (raw.max() - raw.min()))


def test_earlier_grow_steps_stay_only_if_told_to(lab: MakeLab) -> None:
    for accumulate, grows in ((True, True), (False, False)):
        room = lab()
        algorithm = ready(room, rest(accumulate=accumulate, deduplicate=False))
        sizes = []
        for step in range(2):
            algorithm.learn(scored(room, 12), step)
            sizes.append(len(algorithm.pool))
        assert sizes == ([108, 216] if grows else [108, 108])
        assert bool(algorithm.state()["pool"]) == accumulate


# ---- bad input


def test_nothing_above_the_first_threshold_is_an_error(lab: MakeLab) -> None:
    room = lab()
    algorithm = ready(room, rest(threshold="absolute", levels=[99.0], normalise=False))
    with pytest.raises(
        ValueError, match=r"no completion of \d+ .* Improve step 1 .* rewards go from 0 to \d"
    ):
        algorithm.learn(scored(room, 12), 0)


def test_equal_rewards_pass_no_threshold(lab: MakeLab) -> None:
    room = lab()
    algorithm = ready(room, rest())
    rollouts = scored(room, 12)
    rollouts.scores = torch.ones(len(rollouts))
    with pytest.raises(ValueError, match=r"all .* completions of this Grow 1, so none is better"):
        algorithm.learn(rollouts, 0)


def test_nothing_above_a_later_threshold_ends_the_grow_and_is_told(
    lab: MakeLab, caplog: pytest.LogCaptureFixture
) -> None:
    room = lab()
    algorithm = ready(room, rest(threshold="absolute", levels=[0.5, 1.0]))
    with caplog.at_level(logging.WARNING):
        metrics = algorithm.learn(scored(room, 12), 0)
    assert (metrics["rest/improved"], metrics["rest/kept/2"]) == (1, 0)
    assert "Improve step 2" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": [0.8, 0.5]}, r"algo\.levels=\[0\.8, 0\.5\] .* let them rise"),
        ({"threshold": "top_k", "levels": [2.0, 4.0]}, r"let them fall"),
        ({"levels": []}, r"algo\.levels=\[\]"),
        ({"levels": [0.5, 1.5]}, r"shares between 0 and 1"),
        ({"threshold": "top_k", "levels": [20.0]}, r"algo\.samples=12"),
        ({"threshold": "percentile"}, r"algo\.threshold.*quantile"),
        ({"loss": "mse"}, r"algo\.loss"),
        ({"lr_decay": -1.0}, r"algo\.lr_decay=-1\.0"),
        ({"temperature": 0.0}, r"algo\.temperature=0\.0 must be positive"),
        ({"demonstrations": -5}, r"algo\.demonstrations=-5"),
        ({"validation_samples": 0}, r"algo\.validation_samples=0"),
        ({"validation": -1}, r"algo\.validation=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rest(**settings)


def test_negative_rewards_are_no_weights(lab: MakeLab) -> None:
    room = lab()
    algorithm = ready(room, rest(loss="reward_weighted", normalise=False))
    rollouts = scored(room, 12)
    assert rollouts.scores is not None
    rollouts.scores -= 5
    with pytest.raises(ValueError, match=r"algo\.normalise=true"):
        algorithm.learn(rollouts, 0)
