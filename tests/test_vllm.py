"""Sampling by a vLLM server, against a stand-in that speaks its protocol (vllm_standin.py)."""

import json
import logging
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import PROMPTS, Lab, MakeLab
from runs import command_line, inside, logged, rewound, rows, same_outcome, says, the_error
from vllm_standin import StandIn

from rlhf_exp import web
from rlhf_exp.algorithms.ppo import PPO
from rlhf_exp.rewards import scored
from rlhf_exp.runs import config_fingerprint
from rlhf_exp.samplers.vllm import VLLM, version_of
from rlhf_exp.worker import resume

pytest_plugins = ["lab_fixtures", "runs_fixtures"]

LORA = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
EXACT = 1e-4  # nats between two float32 forward passes


@pytest.fixture
def server(base: Path) -> Iterator[StandIn]:
    with StandIn(base, room=64) as standin:
        yield standin


def served(server: StandIn, room: Lab, **settings: Any) -> VLLM:
    """The sampler of the lab's policy from here on, checked as a run checks it."""
    sampler = VLLM(url=server.url, backoff=0.01, **settings)
    sampler.check(room.policy, None, PROMPTS)
    sampler.open(room.directory)
    room.policy.sampler = sampler
    return sampler


def shake(room: Lab, by: float = 0.02) -> None:
    """What a step of training does to the weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in room.policy.model.parameters():
            if p.requires_grad:
                p += by * torch.randn(p.shape, generator=generator)


# ---- what comes back


@pytest.mark.parametrize(
    "settings", [{}, {"min_new_tokens": 3}, {"lora": LORA}], ids=["full", "min", "lora"]
)
def test_rollouts_are_those_of_local_sampling(server, lab: MakeLab, settings: dict) -> None:
    room = lab(temperature=1e-4, **settings)  # as good as greedy
    shake(room, 0.1)
    ours = room.policy.sample(PROMPTS, 2)
    if "lora" not in settings:  # the token that comes most often ends the text
        room.policy.tokenizer.eos_token_id = int(ours.response_ids.flatten().mode().values)
        ours = room.policy.sample(PROMPTS, 2)
        assert ours.ended.any()
    sampler = served(server, room)
    theirs = room.policy.sample(PROMPTS, 2)
    assert theirs.prompts == [p for p in PROMPTS for _ in range(2)]
    assert theirs.completions == ours.completions
    for name in ("ids", "mask", "response", "ended"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
    assert sampler.metrics()["sampler/age"] == 0


def test_what_is_asked_for(server, lab: MakeLab) -> None:
    room = lab(temperature=0.7, top_k=5, top_p=0.9, min_new_tokens=2)
    room.policy.control = [7]
    served(server, room)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = room.policy.sample(PROMPTS, 2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        again = room.policy.sample(PROMPTS, 2)
    bodies = server.asked("/v1/completions")[1:]  # after the probe
    assert [len(server.asked(p)) for p in ("/collective_rpc", "/reset_prefix_cache")] == [1, 1]
    ids = room.policy.encode(PROMPTS)
    assert sorted(b["prompt"] for b in bodies) == sorted(ids + ids)  # as they are
    seeds = {(tuple(b["prompt"]), b["seed"]) for b in bodies}
    assert len(seeds) == len(PROMPTS)  # the same the second time
    assert len({seed for _, seed in seeds}) == len(PROMPTS)
    assert torch.equal(first.ids, again.ids)
    asked = {k: bodies[0][k] for k in ("n", "max_tokens", "min_tokens", "top_k", "logit_bias")}
    assert asked == {
        "n": 2,
        "max_tokens": 8,
        "min_tokens": 2,
        "top_k": 5,
        "logit_bias": {"7": -100.0},
    }
    told = {k: bodies[0][k] for k in ("temperature", "top_p", "ignore_eos", "stop_token_ids")}
    end = room.policy.tokenizer.eos_token_id
    assert told == {"temperature": 0.7, "top_p": 0.9, "ignore_eos": True, "stop_token_ids": [end]}
    unlike = [not torch.equal(a, b) for a, b in zip(first.ids[::2], first.ids[1::2], strict=True)]
    assert sum(unlike) >= 5  # copies of a prompt have seeds of their own


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 20},
        {"top_p": 0.7},
        {"min_new_tokens": 4},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.9},
    ],
    ids=str,
)
def test_gap_is_that_of_two_passes_whatever_the_transforms(
    server, lab: MakeLab, settings: dict
) -> None:
    room = lab(**settings)
    room.policy.control = [5, 6, 7]
    sampler = served(server, room)
    rollouts = room.policy.sample(PROMPTS, 4)
    found = sampler.metrics()
    assert 0 < found["sampler/logprob_gap"] <= found["sampler/logprob_gap_max"] < EXACT
    assert abs(found["sampler/kl_k3"]) < EXACT
    assert not {5, 6, 7} & {i for ids in rollouts.responses() for i in ids}


def test_tokens_are_weighed_by_what_the_policy_makes_of_them(server, lab: MakeLab) -> None:
    room = lab()
    sampler = served(server, room, refresh_every=9)
    sampler.max_importance = 1.05
    fresh = room.policy.sample(PROMPTS, 2, fresh=False)
    assert fresh.importance is not None
    assert (fresh.importance - 1).abs().max() < EXACT
    assert sampler.metrics()["sampler/importance_cut"] == 0
    shake(room, 0.02)
    stale = room.policy.sample(PROMPTS, 2, fresh=False)
    assert stale.importance is not None
    found, cut = sampler.metrics(), stale.importance == torch.tensor(1.05)
    assert found["sampler/importance_cut"] == pytest.approx(float(cut.sum() / stale.response.sum()))
    assert 0.05 < found["sampler/importance_cut"] < 0.95
    assert 0 < float(stale.importance.min()) < 0.99
    assert (stale.importance[stale.response == 0] == 1).all()
    assert stale.select(torch.tensor([1])).importance.tolist() == [stale.importance[1].tolist()]


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_ppo_weighs_the_loss_of_tokens(lab: MakeLab, weight: float) -> None:
    found = []
    for given in (None, weight):
        room = lab()
        algorithm = PPO(steps=1, batch=9, minibatch=9, epochs=1, whiten="none")
        algorithm.setup(room.policy, room.reward, None, room.trial)
        rollouts = scored(room.policy.sample(PROMPTS), room.reward)
        if given is not None:
            rollouts.importance = torch.full_like(rollouts.response, given)
        found.append(algorithm.learn(rollouts, 0)["ppo/policy_loss"])
    assert abs(found[0]) > 0.1
    assert found[1] == pytest.approx(weight * found[0])


# ---- weights


@pytest.mark.parametrize("settings", [{}, {"lora": LORA}, {"train_top": 1}], ids=str)
def test_server_gets_the_weights_when_they_change(
    server, lab: MakeLab, settings: dict, caplog
) -> None:
    room = lab(**settings)
    sampler = served(server, room, refresh_every=3)
    route = "/v1/load_lora_adapter" if "lora" in settings else "/collective_rpc"
    found, versions = [], []
    with caplog.at_level(logging.INFO, logger="rlhf_exp"):
        for step in range(5):
            versions.append(version_of(room.policy))
            room.policy.sample(PROMPTS, 2, fresh=step == 4)
            found.append(sampler.metrics())
            if step < 4:
                shake(room, 0.05)
    assert len(set(versions)) == 5
    assert [m["sampler/age"] for m in found] == [0, 1, 2, 0, 0]
    expected = [versions[i] for i in (0, 0, 0, 3, 4)]
    assert [m["sampler/version"] for m in found] == expected
    gaps = [m["sampler/logprob_gap"] for m in found]
    assert max(gaps[0], gaps[3], gaps[4]) < EXACT
    assert min(gaps[1], gaps[2]) > 100 * EXACT
    assert found[1]["sampler/kl_k3"] > EXACT
    assert len(server.asked(route)) == 3
    assert [p.name for p in sampler.place.iterdir()] == [f"weights-{versions[4]}"]
    assert [str(versions[i]) in caplog.text for i in range(5)] == [True, False, False, True, True]
    if "lora" in settings:
        assert list(server.adapters) == [f"rlhf_exp-{versions[4]}"]
    else:
        assert server.version == str(versions[4])


def test_unchanged_weights_are_sent_once(server, lab: MakeLab) -> None:
    room = lab()
    served(server, room)
    for _ in range(3):
        room.policy.sample(PROMPTS[:2])
    assert len(server.asked("/collective_rpc")) == 1
    room.policy.sampler = VLLM(url=server.url)  # what a resumed run starts with
    room.policy.sampler.check(room.policy, None, PROMPTS)
    room.policy.sampler.open(room.directory)
    room.policy.sample(PROMPTS[:2])
    assert len(server.asked("/collective_rpc")) == 2


@pytest.mark.parametrize("settings", [{}, {"lora": LORA}], ids=str)
def test_server_that_lost_its_weights_is_found_out(server, lab: MakeLab, settings: dict) -> None:
    room = lab(**settings)
    served(server, room)
    room.policy.sample(PROMPTS[:2])
    server.restart()
    with pytest.raises(ConnectionError, match=r"no longer holds|does not exist") as caught:
        room.policy.sample(PROMPTS[:2])
    says(str(caught.value), server.url, "esume")


def test_gap_tells_where_the_server_keeps_no_version(server, lab: MakeLab) -> None:
    room = lab()
    server.versions = False
    sampler = served(server, room)
    shake(room, 0.05)
    room.policy.sample(PROMPTS)
    assert sampler.metrics()["sampler/logprob_gap"] < EXACT
    server.restart()
    room.policy.sample(PROMPTS)
    assert sampler.metrics()["sampler/logprob_gap"] > 100 * EXACT


def test_adapter_on_other_weights_is_refused(server, lab: MakeLab) -> None:
    room = lab(lora=LORA)
    served(server, room)
    room.policy.source = "owner/another"
    with pytest.raises(ValueError, match="but the adapter is trained on owner/another") as caught:
        room.policy.sample(PROMPTS)
    says(str(caught.value), "vllm serve owner/another --enable-lora --max-lora-rank 4")


def test_adapter_with_tokens_of_its_own_is_refused(server, lab: MakeLab) -> None:
    room = lab(lora=LORA)
    served(server, room)
    room.policy.control = [7]
    with pytest.raises(ValueError, match=r"1 control tokens: use sampler=local"):
        room.policy.sample(PROMPTS)


@pytest.mark.parametrize("settings", [{}, {"lora": LORA}], ids=str)
def test_weights_that_cannot_be_loaded_are_refused(server, lab: MakeLab, settings: dict) -> None:
    room = lab(**settings)
    served(server, room)
    if settings:
        server.enable_lora = False
    else:
        room.policy.model.resize_token_embeddings(400)
    with pytest.raises(ValueError, match="cannot load the policy's weights") as caught:
        room.policy.sample(PROMPTS)
    fragment = "LoRA is not enabled" if settings else "AssertionError"
    says(str(caught.value), fragment, "sampler.folder", "vllm serve")


# ---- a server that does not do


def test_busy_server_is_asked_again(server, lab: MakeLab) -> None:
    room = lab()
    served(server, room, requests=4)
    server.down = 3
    assert len(room.policy.sample(PROMPTS)) == len(PROMPTS)
    assert server.down == 0


def test_server_that_dies_ends_the_run(server, lab: MakeLab) -> None:
    room = lab()
    served(server, room, requests=2, concurrency=2)
    server.dead_after = 3
    with pytest.raises(ConnectionError, match="does not answer as it did") as caught:
        room.policy.sample(PROMPTS)
    says(str(caught.value), server.url, "resume")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: [], "no completion"),
        (lambda a: a | {"choices": a["choices"][:1]}, "no completion"),
        (lambda a: a | {"model": "another"}, "no completion"),
        (lambda a: changed(a, token_ids=None), "returns no token ids .*vLLM 0.33"),
        (lambda a: changed(a, prompt_token_ids=[1]), "another prompt"),
        (lambda a: changed(a, token_ids=[]), "no tokens"),
        (lambda a: changed(a, token_ids=[3] * 9), "too many tokens"),
        (lambda a: changed(a, finish_reason="abort"), "no end|finish_reason=abort"),
        (lambda a: changed(a, logprobs={"token_logprobs": [None]}), "log-probability missing"),
        (lambda a: changed(a, logprobs=None), "no completion"),
    ],
)
def test_malformed_answer_ends_the_run(server, lab: MakeLab, spoil, message: str) -> None:
    room = lab()
    served(server, room)
    server.spoil = spoil
    with pytest.raises(ValueError, match=message) as caught:
        room.policy.sample(PROMPTS, 2)
    says(str(caught.value), server.url)


def changed(answer: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return answer | {"choices": [choice | fields for choice in answer["choices"]]}


# ---- before the run


@pytest.mark.parametrize(
    ("switch", "policy", "fragments"),
    [
        ({"dev_mode": False}, {}, ["takes no weights", "VLLM_SERVER_DEV_MODE=1 vllm serve"]),
        (
            {"runtime_lora": False},
            {"lora": LORA},
            ["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve", "--enable-lora"],
        ),
        ({"processed": False}, {}, ["--logprobs-mode processed_logprobs"]),
        ({"token_ids": False}, {}, ["too old"]),
        ({"room": 8}, {}, ["has room for 8 tokens", "--max-model-len"]),
    ],
    ids=str,
)
def test_server_that_does_not_fit_is_refused(
    server, lab: MakeLab, switch: dict, policy: dict, fragments: list[str]
) -> None:
    for name, value in switch.items():
        setattr(server, name, value)
    room = lab(**policy)
    with pytest.raises(ValueError, match=server.url) as caught:
        served(server, room)
    says(str(caught.value), *fragments)


def test_server_with_another_vocabulary_is_refused(server, lab: MakeLab) -> None:
    room = lab()
    room.policy.tokenizer.add_tokens(["<|more|>"])
    with pytest.raises(ValueError, match="another model than the policy's: it cannot sample"):
        served(server, room)


def test_key_is_sent_and_missed(server, lab: MakeLab, monkeypatch) -> None:
    room = lab()
    server.key = "secret"
    monkeypatch.setenv("SERVER_KEY", "secret")
    served(server, room, key_variable="SERVER_KEY")
    assert len(room.policy.sample(PROMPTS)) == len(PROMPTS)
    with pytest.raises(ValueError, match=r"wants its --api-key: .* sampler\.key_variable=None"):
        served(server, room)


def test_what_is_no_vllm_server_is_refused(server, lab: MakeLab, monkeypatch) -> None:
    monkeypatch.setattr(StandIn, "models", lambda *_: {"data": []})
    with pytest.raises(ValueError, match="lists no models, so it is no vLLM server"):
        served(server, lab())


def test_adapter_merged_here_alone_is_refused(server) -> None:
    from rlhf_exp.policy import Policy

    policy = Policy(path="owner/model", sft=False, adapter="folder", lora=LORA)
    with pytest.raises(ValueError, match=r"policy\.adapter=folder .* use sampler=local"):
        VLLM(url=server.url).check(policy, None, PROMPTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "sampler.url must be http"),
        ({"key_variable": "sk-1"}, "sampler.key_variable must be the name"),
        ({"refresh_every": 0}, "sampler.refresh_every=0 must be positive"),
        ({"concurrency": 0}, "sampler.concurrency=0 must be positive"),
        ({"max_importance": 0.5}, "sampler.max_importance=0.5 must be at least 1"),
        ({"backoff": -1.0}, "sampler.backoff=-1.0 must be at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLLM(**settings)


def test_no_server_is_one_sentence(refused) -> None:
    said = refused("experiment=debug", "sampler=vllm", "sampler.url=http://127.0.0.1:9")
    says(said, "sampler.url=http://127.0.0.1:9", "VLLM_SERVER_DEV_MODE=1 vllm serve")


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["algo=grpo"], ["algo=grpo", "sampler=local", "ppo"]),
        (["algo=rloo"], ["algo=rloo", "sampler=local", "ppo"]),
        (["algo=quark"], ["algo.tokens=", "sampler=local", "algo.tokens=[]"]),
        (["algo=rest", "sampler.max_importance=2"], ["sampler.max_importance=2", "algo=ppo"]),
    ],
    ids=str,
)
def test_algorithms_that_it_cannot_serve_are_refused(refused, overrides, fragments) -> None:
    says(refused("experiment=debug", *overrides, "sampler=vllm"), *fragments)


def test_proxy_of_the_environment_does_not_come_between(server, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    web._opener.cache_clear()
    assert urllib.request.getproxies()["http"] == "http://127.0.0.1:9"
    assert web.send(f"{server.url}/health", None, timeout=5) == b""


# ---- whole runs


@pytest.fixture(scope="module")
def start(artifacts: Path) -> Path:
    """The start policy that debug runs share."""
    return next(p for p in (artifacts / "sft").glob("policy-*"))


def asked(server: StandIn, artifacts: Path) -> list[str]:
    where = [f"sampler.url={server.url}", "sampler.backoff=0.01", f"artifacts={artifacts}"]
    return ["experiment=debug", "sampler=vllm", *where]


def samplings(directory: Path) -> list[dict[str, Any]]:
    return [r for r in rows(directory / "metrics.jsonl") if "sampler/version" in r]


@pytest.mark.slow
def test_run_learns_from_a_server_and_resumes_to_the_same_bytes(
    start: Path, artifacts: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    with StandIn(start) as server:
        wanted = asked(server, artifacts)
        done = command_line(*wanted, f"hydra.run.dir={directory}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = samplings(directory)
        assert [r["step"] for r in found] == [0, 1, 2, 3]
        assert len({r["sampler/version"] for r in found}) == 4
        assert all(r["sampler/logprob_gap"] < EXACT and r["sampler/age"] == 0 for r in found)
        assert len(server.asked("/collective_rpc")) == 5  # steps, and the last evaluation
        about = json.loads((directory / "run.json").read_text())
        assert about["config"]["sampler"]["url"] == server.url
        local = about["config"] | {"sampler": {"_target_": "rlhf_exp.samplers.local.Local"}}
        assert config_fingerprint(local) != about["fingerprint"]

        halfway = rewound(directory, tmp_path / "halfway", 2)
        assert logged(lambda: resume(halfway)) == 0
        same_outcome(halfway, directory)
        assert len(server.asked("/collective_rpc")) == 8


@pytest.mark.slow
def test_run_that_loses_its_server_keeps_a_checkpoint(
    start: Path, artifacts: Path, tmp_path: Path, capsys
) -> None:
    with StandIn(start) as server:
        server.dead_after = 70  # a probe, 16 evaluated, 2 steps and 16 evaluated, and some more
        wanted = [*asked(server, artifacts), "sampler.requests=2"]
        assert inside(tmp_path / "run", *wanted) == 1
        says(the_error(capsys.readouterr().err), server.url, "resume")
        assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")]
        server.dead_after = None
        assert logged(lambda: resume(tmp_path / "run")) == 0
    assert [r["step"] for r in samplings(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.slow
def test_run_trains_an_adapter_through_a_server(
    start: Path, artifacts: Path, tmp_path: Path
) -> None:
    lora = "policy.lora={r: 4, target_modules: [c_attn], fan_in_fan_out: true}"
    policy = [f"policy.path={start}", "policy.architecture=null", "policy.sft=false", lora]
    with StandIn(start) as server:
        assert inside(tmp_path / "run", *asked(server, artifacts), *policy, "reward=lexicon") == 0
        found = samplings(tmp_path / "run")
        assert [r["step"] for r in found] == [0, 1, 2, 3]
        assert all(r["sampler/logprob_gap"] < EXACT for r in found)
        assert len(server.asked("/v1/load_lora_adapter")) == 5
        assert not server.asked("/collective_rpc")
        assert len(server.adapters) == 1


@pytest.mark.slow
def test_one_of_two_processes_talks_to_the_server(
    start: Path, artifacts: Path, tmp_path: Path
) -> None:
    whole = "hardware.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    where = ["hardware=zero3", "hardware.processes=2", whole, f"hydra.run.dir={tmp_path / 'run'}"]
    with StandIn(start) as server:
        done = command_line(*asked(server, artifacts), *where, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(server.asked("/collective_rpc")) == 5
        prompts = 1 + 4 * 16 + 3 * 16  # a probe, the steps and the evaluations
        assert len(server.asked("/v1/completions")) == prompts
    found = samplings(tmp_path / "run")
    assert [r["step"] for r in found] == [0, 1, 2, 3]
    assert all(r["sampler/logprob_gap"] < EXACT for r in found)
