"""The formulas against worked numbers (tests/vectors/), and properties that hold for any input."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_exp import losses
from rlhf_exp.algorithms.scaling import RunningMoments, ScoreScaling, apply_missing_eos

VECTORS = Path(__file__).parent / "vectors"
ENSEMBLES = json.loads((VECTORS / "ensembles.json").read_text())
RLAIF = json.loads((VECTORS / "rlaif.json").read_text())
PPO = json.loads((VECTORS / "ppo.json").read_text())


def t(values) -> Tensor:
    """Double precision, so that what is compared is the formula."""
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor | float, expected, tolerance: float = 1e-6) -> None:
    """Fail unless every number agrees within `tolerance` absolutely."""
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), t(expected), atol=tolerance, rtol=0
    )


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the response tokens, as the algorithm forms it from the losses per token."""
    return (x * mask).sum() / mask.sum()


# --------------------------------------------------------------------------------------- ensembles

OBJECTIVES = {
    "mean": ("mean", 0.5),
    "WCO": ("wco", 0.5),
    "UWO_lambda_0.1": ("uwo", 0.1),
    "UWO_lambda_0.5": ("uwo", 0.5),
    "UWO_lambda_1.0": ("uwo", 1.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("variance", ["population", "unbiased"])
def test_ensemble_objective_matches_vector(name: str, variance: str) -> None:
    vector = ENSEMBLES["ensemble_objectives"]
    objective, weight = OBJECTIVES[name]
    combined = losses.combine(t(vector["scores"]), objective, weight, variance)
    close(combined, vector[f"{variance}_variance"][name])


@pytest.mark.parametrize("variance", ["population", "unbiased"])
def test_ensemble_variance_matches_vector(variance: str) -> None:
    vector = ENSEMBLES["ensemble_objectives"]
    found = losses.ensemble_variance(t(vector["scores"]), variance)
    close(found, vector[f"{variance}_var_per_sample"])


def test_ensemble_of_normalised_members_matches_vector() -> None:
    vector = ENSEMBLES["ensemble_objectives"]["normalised"]
    z = t(vector["z"])
    close(losses.combine(z, "mean", 0.5, "population"), vector["mean"])
    close(losses.combine(z, "wco", 0.5, "population"), vector["WCO"])
    uwo = losses.combine(z, "uwo", 0.5, "population")
    close(uwo, vector["UWO_lambda_0.5_population"])


def test_ensemble_objectives_choose_different_completions() -> None:
    vector = ENSEMBLES["ensemble_objectives"]
    expected = vector["decision_flip_example"]["argmax"]
    scores = t(vector["scores"])
    chosen = {
        "mean": losses.combine(scores, "mean", 0.5, "population"),
        "WCO": losses.combine(scores, "wco", 0.5, "population"),
        "UWO_0.5_population": losses.combine(scores, "uwo", 0.5, "population"),
    }
    assert {k: int(v.argmax()) for k, v in chosen.items()} == expected


@pytest.mark.parametrize("variance", ["population", "unbiased"])
@pytest.mark.parametrize("objective", ["mean", "wco", "uwo"])
def test_one_member_is_its_own_ensemble(objective: str, variance: str) -> None:
    scores = t([[1.5, -2.0, 0.0]])
    assert torch.equal(losses.ensemble_variance(scores, variance), torch.zeros_like(scores[0]))
    assert torch.equal(losses.combine(scores, objective, 3.0, variance), scores[0])


@pytest.mark.parametrize("variance", ["population", "unbiased"])
def test_uwo_of_weight_zero_is_the_mean(variance: str) -> None:
    scores = t(ENSEMBLES["ensemble_objectives"]["scores"])
    assert torch.equal(losses.combine(scores, "uwo", 0.0, variance), scores.mean(0))


@pytest.mark.parametrize(
    ("objective", "variance", "message"),
    [
        ("uow", "population", "reward.objective=uow .* mean, wco, uwo; did you mean uwo"),
        ("uwo", "populaton", "reward.variance=populaton .* did you mean population"),
    ],
)
def test_unknown_ensemble_choice_names_the_setting(objective, variance, message) -> None:
    with pytest.raises(ValueError, match=message):
        losses.combine(torch.zeros(2, 3), objective, 0.5, variance)


# ----------------------------------------------------------------------------------- reward models


def test_preference_loss_matches_vector() -> None:
    vector = ENSEMBLES["reward_model_loss"]
    logits, ends = vector["logits"], vector["cu_lengths"]
    for start, end, expected in zip(ends, ends[1:], vector["per_prompt"], strict=False):
        ranked = t(logits[start:end])  # the best reply first
        better, worse = torch.combinations(ranked).unbind(1)
        close(losses.preference_loss(better, worse, 0.001).mean(), expected)
    close(sum(vector["per_prompt"]) / len(vector["per_prompt"]), vector["loss"])


def test_preference_loss_without_pull_is_bradley_terry() -> None:
    loss = losses.preference_loss(t([2.0, 0.0, -1.0]), t([0.0, 0.0, 1.0]))
    close(loss, [math.log(1 + math.exp(-2)), math.log(2), math.log(1 + math.exp(2))])


def test_soft_labels_match_vector() -> None:
    better, worse = RLAIF["rm_scores"]
    label = t([RLAIF["soft_label_A"]])
    close(losses.preference_loss(t([better]), t([worse]), 0.0, label), [RLAIF["rm_soft_ce"]])


def test_label_smoothing_takes_some_labels_for_wrong() -> None:
    close(losses.smoothed(t([1.0, 0.5, 0.8]), 0.1), [0.9, 0.5, 0.74])


# ------------------------------------------------------------------------------ KL, shaped rewards


def test_shaped_rewards_match_released_ppo() -> None:
    vector = ENSEMBLES["ppo_reward_shaping"]
    log_ratio = t([[0.3, -0.1, 0.25], [0.05, 0.4, 7.0]])  # the last number is padding
    mask = t([[1, 1, 1], [1, 1, 0]])
    clip = vector["cliprange_reward"]
    scores = t(vector["scores"]).clamp(-clip, clip)
    shaped = losses.shape_rewards(log_ratio, scores, mask, vector["coef"])
    close(shaped[0], vector["shaped"][0])
    close(shaped[1], [*vector["shaped"][1], 0.0])


@pytest.mark.parametrize(
    ("name", "estimator"), [("kl", "k1"), ("abs", "abs"), ("mse", "k2"), ("k3", "k3")]
)
def test_kl_reward_shaping_matches_vector(name: str, estimator: str) -> None:
    vector = PPO["kl_reward_shaping"]
    inputs, expected = vector["inputs"], vector["expected"][name]
    mask = t(inputs["mask"])
    kl = losses.kl_estimate(t(inputs["logprobs"]), t(inputs["ref_logprobs"]), estimator)
    shaped = losses.shape_rewards(kl, t(inputs["scores"]), mask, inputs["beta"])
    close(shaped, expected["rewards"])
    if "per_token" in expected:
        close(kl * mask, expected["per_token"])
    if "sequence_kl" in expected:
        close((kl * mask).sum(1), expected["sequence_kl"])
        close((kl * mask).sum(1).mean(), expected["mean_kl"])


def test_response_of_no_tokens_gets_no_reward() -> None:
    mask = t([[0, 0], [1, 0], [1, 1]])
    shaped = losses.shape_rewards(torch.ones(3, 2), t([5.0, 5.0, 5.0]).float(), mask.float(), 0.5)
    close(shaped, [[0, 0], [4.5, 0], [-0.5, 4.5]])


def test_full_kl_matches_vector() -> None:
    vector = PPO["kl_full"]
    policy, reference = (t(vector["inputs"][k]).log() for k in ("policy_probs", "ref_probs"))
    kl = losses.full_kl(policy + 3.0, reference - 1.0)  # logits are known up to a constant
    close(kl, vector["expected"]["kl_per_position"])
    close(kl.mean(), vector["expected"]["mean"])


def test_kl_estimators_match_released_ppo() -> None:
    vector = ENSEMBLES["ppo"]["kl_estimators"]
    log_ratio = t(vector["log_ratio"])
    zero = torch.zeros_like(log_ratio)
    k1, k2 = (losses.kl_estimate(log_ratio, zero, k).sum(1).mean() for k in ("k1", "k2"))
    close(k1, vector["k1"])
    close(k2, vector["k2_recorded_by_llm_optimization"])
    # trlx writes the ratio the other way round: its number is k3 of the reversed KL
    reversed_k3 = losses.kl_estimate(zero, log_ratio, "k3").sum(1).mean()
    close(reversed_k3, vector["k3_trlx_mean_kl"])


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    policy, reference = t([0.7, 0.2, 0.1]).log(), t([0.5, 0.1, 0.4]).log()
    exact = losses.full_kl(policy, reference)
    for estimator in ("k1", "k3"):
        expectation = (policy.exp() * losses.kl_estimate(policy, reference, estimator)).sum()
        close(expectation, float(exact))
    assert (losses.kl_estimate(torch.randn(1000), torch.randn(1000), "k3") >= 0).all()


def test_unknown_kl_estimator_lists_the_options() -> None:
    with pytest.raises(ValueError, match=r"algo.kl_estimator=k4 .* k1, abs, k2, k3"):
        losses.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_adaptive_kl_matches_released_ppo() -> None:
    vector = ENSEMBLES["ppo"]["adaptive_kl"]
    coef, found = vector["init"], []
    for kl in vector["observed_kl"]:
        coef = losses.adapt_kl_coef(
            coef,
            kl,
            target=vector["target"],
            horizon=vector["horizon"],
            samples=vector["n_steps"],
        )
        found.append(coef)
    close(torch.tensor(found, dtype=torch.float64), vector["coef_after_each"], 1e-11)


# -------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("setting", PPO["gae"]["expected"])
def test_gae_matches_vector(setting: str) -> None:
    vector = PPO["gae"]
    gamma, lam = (float(part.split("=")[1]) for part in setting.split(","))
    rewards, values, mask = (t(vector["inputs"][k]) for k in ("rewards", "values", "mask"))
    advantages, returns = losses.gae(rewards, values, mask, gamma, lam)
    close(advantages, vector["expected"][setting]["advantages"])
    close(returns, vector["expected"][setting]["returns"])


def test_gae_matches_released_ppo() -> None:
    vector = ENSEMBLES["ppo"]
    rewards, values = t(vector["rewards"]), t(vector["values"])
    advantages, returns = losses.gae(rewards, values, torch.ones_like(rewards), 1.0, 0.95)
    close(advantages, vector["advantages_raw"])
    close(returns, vector["returns"])


def test_gae_of_padding_does_not_leak_into_the_response() -> None:
    rewards, values, mask = (t(PPO["gae"]["inputs"][k]) for k in ("rewards", "values", "mask"))
    clean = losses.gae(rewards, values, mask, 0.9, 0.8)
    noise = 100 * (1 - mask)
    dirty = losses.gae(rewards + noise, values - noise, mask, 0.9, 0.8)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_arena_advantages_are_gae_with_lambda_zero() -> None:
    vector = PPO["arena_advantages"]
    inputs = vector["inputs"]
    values = t(inputs["values"])[
        :, inputs["prefix_len"] - 1 : -1
    ]  # of the states before each token
    mask = torch.ones_like(values)
    rewards = losses.shape_rewards(torch.zeros_like(values), t(inputs["reward"]), mask, 0.0)
    advantages, returns = losses.gae(rewards, values, mask, 1.0, 0.0)
    close(advantages, vector["expected"]["advantages"])
    close(returns, vector["expected"]["returns"])


def test_whitening_matches_vector() -> None:
    vector = PPO["advantage_whitening"]
    advantages, mask = (t(vector["inputs"][k]) for k in ("advantages", "mask"))
    close(losses.whiten(advantages, mask), vector["expected"]["whitened"])


def test_whitening_matches_released_ppo() -> None:
    raw = t(ENSEMBLES["ppo"]["advantages_raw"])
    whitened = losses.whiten(raw, torch.ones_like(raw))  # trlx whitens over padding as well
    close(whitened, ENSEMBLES["ppo"]["advantages_whitened"])


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("lengths", [[0], [1], [2], [0, 1], [0, 0, 0], [1, 1], [2, 0, 1]], ids=str)
def test_whitening_is_finite_for_short_responses(lengths: list[int], shift_mean: bool) -> None:
    mask = (torch.arange(3) < torch.tensor(lengths).unsqueeze(1)).float()
    x = torch.arange(mask.numel(), dtype=torch.float32).view_as(mask) + 5.0
    whitened = losses.whiten(x, mask, shift_mean=shift_mean)
    assert whitened.isfinite().all()
    assert (whitened[mask == 0] == 0).all()
    if sum(lengths) == 1:
        assert float(whitened.sum()) == (0.0 if shift_mean else float((x * mask).sum()))
    if sum(lengths) >= 2 and shift_mean:
        kept = whitened[mask == 1]
        close(kept.mean(), 0.0)
        close(kept.var(), 1.0, 1e-5)


def test_whitening_keeps_the_mean_when_told_to() -> None:
    x, mask = t([[4.0, 6.0, 99.0]]), t([[1, 1, 0]])
    scale = 1 / math.sqrt(2 + 1e-8)
    close(losses.whiten(x, mask, shift_mean=False), [[5 - scale, 5 + scale, 0]])


def test_whitening_of_equal_numbers_is_zero() -> None:
    close(losses.whiten(torch.full((2, 3), 7.0), torch.ones(2, 3)), [[0.0] * 3] * 2)


def test_masked_mean_of_nothing_is_zero() -> None:
    assert float(losses.masked_mean(torch.full((1, 2), 7.0), torch.zeros(1, 2))) == 0.0


# -------------------------------------------------------------------------------------- PPO losses


def test_ppo_losses_match_vector() -> None:
    inputs, expected = PPO["ppo_losses"]["inputs"], PPO["ppo_losses"]["expected"]
    mask = t(inputs["mask"])
    new, old = t(inputs["new_logprobs"]), t(inputs["old_logprobs"])
    policy, clipped = losses.policy_loss(
        new, old, t(inputs["advantages_whitened"]), inputs["cliprange"]
    )
    value, value_clipped = losses.value_loss(
        t(inputs["new_values"]),
        t(inputs["old_values"]),
        t(inputs["returns"]),
        inputs["cliprange_value"],
    )
    close((new - old).exp() * mask, expected["ratio"])
    close(token_mean((new - old).exp(), mask), expected["mean_ratio"])
    close(token_mean(policy, mask), expected["policy_loss"])
    close(token_mean(value, mask), expected["value_loss"])
    for coef, name in ((1.0, "total_vf_coef_1_0"), (0.1, "total_vf_coef_0_1")):
        close(token_mean(policy + coef * value, mask), expected[name])
    close(token_mean(clipped.double(), mask), expected["policy_clipfrac"])
    close(token_mean(value_clipped.double(), mask), expected["value_clipfrac"])
    for estimator, name in (
        ("k2", "approx_kl_half_sq"),
        ("k1", "policy_kl_signed"),
        ("k3", "kl_k3"),
    ):
        close(token_mean(losses.kl_estimate(old, new, estimator), mask), expected[name])


def test_ppo_losses_match_released_ppo() -> None:
    vector = ENSEMBLES["ppo"]
    loss = vector["loss"]
    mask = t(loss["mask"])
    new, old = t(loss["new_logprobs"]), t(loss["old_logprobs"])
    policy, clipped = losses.policy_loss(new, old, t(vector["advantages_whitened"]), 0.2)
    value, value_clipped = losses.value_loss(
        t(loss["new_values"]), t(loss["old_values"]), t(vector["returns"]), 0.2
    )
    close(token_mean(policy, mask), loss["policy"])
    close(token_mean(value, mask), loss["value"])
    close(token_mean(policy + value, mask), loss["total"])
    close(token_mean(clipped.double(), mask), loss["pg_clipfrac"])
    close(token_mean(value_clipped.double(), mask), loss["v_clipfrac"])
    k3 = losses.kl_estimate(old, new, "k3") * mask  # trlx divides by the padded size
    close(k3.mean(), loss["approx_kl_k3_unmasked_mean"])


def test_value_loss_without_clip_is_half_the_squared_error() -> None:
    loss, clipped = losses.value_loss(t([[3.0]]), t([[0.0]]), t([[1.0]]), None)
    close(loss, [[2.0]])
    assert not clipped.any()


@pytest.mark.parametrize(
    ("advantage", "change", "flows"),
    [
        (1.0, 0.5, False),
        (1.0, -0.5, True),
        (-1.0, 0.5, True),
        (-1.0, -0.5, False),
        (1.0, 0.0, True),
    ],
)
def test_clip_stops_the_gradient_only_where_it_would_go_further(advantage, change, flows) -> None:
    old = t([[-1.0]])
    new = (old + change).requires_grad_()
    losses.policy_loss(new, old, t([[advantage]]), 0.2)[0].sum().backward()
    assert new.grad is not None
    assert bool(new.grad.abs().sum() > 0) == flows


def test_arena_objective_from_the_same_parts() -> None:
    inputs, expected = PPO["arena_objective"]["inputs"], PPO["arena_objective"]["expected"]
    advantages = t(inputs["advantages"])
    whitened = losses.whiten(advantages, torch.ones_like(advantages))
    surrogate = losses.policy_loss(
        t(inputs["new_logprobs"]), t(inputs["old_logprobs"]), whitened, inputs["clip_coef"]
    )[0].mean()
    value = losses.value_loss(t(inputs["values"]), t(inputs["values"]), t(inputs["returns"]), None)
    value_term = inputs["vf_coef"] * value[0].mean()
    logits, ref_logits = t(inputs["policy_probs"]).log(), t(inputs["ref_probs"]).log()
    kl_term = inputs["kl_coef"] * losses.full_kl(logits, ref_logits).mean()
    entropy_term = inputs["ent_coef"] * losses.entropy(logits).mean()
    close(-surrogate, expected["clipped_surrogate"])
    close(value_term, expected["value_loss"])
    close(kl_term, expected["kl_penalty"])
    close(entropy_term, expected["entropy_bonus"])
    close(-(surrogate + value_term + kl_term - entropy_term), expected["total"])


def test_arena_learning_rate_matches_vector() -> None:
    inputs = PPO["arena_lr_schedule"]["inputs"]
    found = [
        losses.lr_scale(
            step,
            total=inputs["total"],
            warmup=inputs["warmup"],
            schedule="linear",
            floor=inputs["final_scale"],
        )
        for step in inputs["steps"]
    ]
    close(torch.tensor(found), PPO["arena_lr_schedule"]["expected"]["multiplier"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.55, 0.1, 0.1]),
        ("cosine", [1.0, 0.55, 0.1, 0.1]),
    ],
)
def test_schedules_end_at_the_floor(schedule: str, expected: list[float]) -> None:
    found = [
        losses.lr_scale(step, total=100, warmup=0, schedule=schedule, floor=0.1)
        for step in (0, 50, 100, 1000)
    ]
    close(torch.tensor(found), expected)


def test_cosine_is_above_the_line_first_and_below_it_later() -> None:
    early, late = (
        losses.lr_scale(s, total=100, warmup=0, schedule="cosine", floor=0.0) for s in (25, 75)
    )
    close(early, 0.5 + 0.5 * math.sqrt(0.5))
    close(late, 0.5 - 0.5 * math.sqrt(0.5))


# ------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("temperature", "key"), [(1.0, "logprobs"), (0.7, "logprobs_temperature_0_7")]
)
def test_log_probabilities_match_vector(temperature: float, key: str) -> None:
    vector = PPO["logprob_entropy"]
    logits = torch.tensor([vector["inputs"]["logits"]])
    ids = torch.tensor([vector["inputs"]["labels"]])
    found = losses.selective_log_softmax(logits, ids, temperature)
    close(found, [vector["expected"][key]])


def test_entropy_matches_vector() -> None:
    vector = PPO["logprob_entropy"]
    close(losses.entropy(t(vector["inputs"]["logits"])), vector["expected"]["entropy"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_log_softmax_is_log_softmax_then_gather(dtype, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(3, 5, 40, generator=generator)).to(dtype).requires_grad_()
    ids = torch.randint(40, (3, 5), generator=generator)
    upstream = torch.randn(3, 5, generator=generator)

    found = losses.selective_log_softmax(logits, ids, temperature)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), logits)
    naive = (logits.float() / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    (expected,) = torch.autograd.grad((naive * upstream).sum(), logits)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, naive, atol=2e-5, rtol=0)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2  # gradients of bfloat16 logits are bfloat16
    torch.testing.assert_close(gradient, expected, atol=rounding, rtol=rounding)


# ----------------------------------------------------------------------------------------- scaling


def test_running_moments_match_released_ppo() -> None:
    moments = RunningMoments()
    for step in ENSEMBLES["ppo"]["running_moments"]:
        batch = torch.tensor(step["batch"])
        moments.update(batch)
        close(moments.mean, step["running_mean"], 1e-9)
        close(moments.std, step["running_std"], 1e-9)
        alone = RunningMoments()
        alone.update(batch)
        close(alone.mean, step["batch_mean"], 1e-9)
        close(alone.std, step["batch_std_unbiased"], 1e-9)


def test_score_scaling_by_method() -> None:
    first, second = (torch.tensor(s["batch"]) for s in ENSEMBLES["ppo"]["running_moments"])
    stds = [s["running_std"] for s in ENSEMBLES["ppo"]["running_moments"]]
    scaled = {}
    for method in ("none", "running", "first_batch", "batch"):
        scaling = ScoreScaling(method)
        scaling(first)
        scaled[method] = scaling(second)
    close(scaled["none"], [0.0, 10.0])
    close(scaled["running"], [0.0, 10.0 / stds[1]])
    close(scaled["first_batch"], [0.0, 10.0 / stds[0]])
    close(scaled["batch"], [-math.sqrt(0.5), math.sqrt(0.5)], 1e-5)


@pytest.mark.parametrize("method", ["running", "first_batch", "batch"])
@pytest.mark.parametrize("scores", [[3.0], [3.0, 3.0]], ids=str)
def test_score_scaling_is_finite_without_spread(method: str, scores: list[float]) -> None:
    assert ScoreScaling(method)(torch.tensor(scores)).isfinite().all()


def test_score_scaling_continues_from_its_state() -> None:
    first, second = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 10.0])
    scaling, resumed = ScoreScaling("running"), ScoreScaling("running")
    scaling(first)
    resumed.load_state(json.loads(json.dumps(scaling.state())))
    assert torch.equal(scaling(second), resumed(second))


@pytest.mark.parametrize(
    ("rule", "expected"), [("keep", [2.0, 3.0]), ("subtract", [2.0, 1.5]), ("replace", [2.0, -1.5])]
)
def test_missing_eos_rule_touches_unended_completions_only(rule: str, expected) -> None:
    scores = apply_missing_eos(
        torch.tensor([2.0, 3.0]), torch.tensor([True, False]), rule, value=1.5
    )
    close(scores, expected)


def test_unknown_scaling_and_rule_name_the_setting() -> None:
    with pytest.raises(ValueError, match=r"algo.score_scaling=runing .* did you mean running"):
        ScoreScaling("runing")
    with pytest.raises(ValueError, match=r"algo.missing_eos=drop .* keep, subtract, replace"):
        apply_missing_eos(torch.zeros(1), torch.zeros(1).bool(), "drop", 1.0)
