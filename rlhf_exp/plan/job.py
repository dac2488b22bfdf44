"""From a config to what a plan needs to know: its objects, its models' configs, the lengths of its
texts.
"""

from pathlib import Path
from typing import Any

from rlhf_exp import weights
from rlhf_exp.artifacts import fingerprint
from rlhf_exp.config import build
from rlhf_exp.plan.memory import Job
from rlhf_exp.plan.scorers import Given, scorers
from rlhf_exp.plan.skeleton import of_policy
from rlhf_exp.policy import Policy
from rlhf_exp.precision import Autocast

SEEN = 2000  # texts whose length is measured, spread over all


def describe(config: dict[str, Any], known: dict[str, Any]) -> Job:
    """The job of a plain config. ValueError or FileNotFoundError, of one sentence, for what cannot
    be: data or a model's config that is not there, settings that exclude each other.
    """
    names = ("policy", "algo", "sft", "reward", "gold", "labeller", "preferences", "evaluation")
    built = {name: build(config[name], name) for name in (*names, "hardware")}
    # refits of the reward are left out
    built["algo"] = getattr(built["algo"], "learner", built["algo"])
    policy: Policy = built["policy"]
    policy.precision = Autocast(built["hardware"].mixed_precision)  # passes are traced on a CPU
    prompts, held_out, told = _lengths(config, policy, known)
    skeleton = of_policy(policy, policy.tokenizer)
    given = Given(skeleton, prompts[-1] + policy.max_new_tokens + 1)
    found = [*scorers(built["reward"], "reward", "reward", given)]
    found += scorers(built["gold"], "gold", "gold", given)
    rest = {k: built[k] for k in ("algo", "sft", "labeller", "preferences", "evaluation")}
    return Job(
        stages=config["stages"],
        skeleton=skeleton,
        policy=policy,
        hardware=built["hardware"],
        scorers=found,
        prompts=prompts,
        held_out=held_out,
        demonstrations=told,
        known=known.setdefault("passes", {}),
        **rest,
    )


def _lengths(
    config: dict[str, Any], policy: Policy, known: dict[str, Any]
) -> tuple[list[int], list[int], list[int]]:
    """Tokens of prompts, held-out prompts and demonstrations with their prompts, each sorted; the
    policy gets its tokenizer.
    """
    names = ("path", "package", "architecture", "vocabulary", "chat", "prefix")
    key = fingerprint([config["data"], {k: config["policy"][k] for k in names}])
    if key not in known:
        data = build(config["data"], "data").load()
        told = data.demonstrations
        open_tokenizer(policy, data.prompts + [d.completion for d in told])
        asked = [d.prompt + d.completion for d in _spread(told)]
        found = [
            sorted(map(len, policy.encode(texts))) if texts else [1]
            for texts in (_spread(data.prompts), _spread(data.held_out), asked)
        ]
        known[key] = (policy.tokenizer, policy.prefix, found)
    policy.tokenizer, policy.prefix, found = known[key]
    return found[0], found[1], [length + 1 for length in found[2]]


def _spread(texts: list[Any]) -> list[Any]:
    return texts[:: max(1, len(texts) // SEEN)]


def open_tokenizer(policy: Policy, texts: list[str]) -> None:
    """Give `policy` the tokenizer it would have, nothing written."""
    if policy.path is None:
        policy.tokenizer = weights.scratch_tokenizer(policy, texts)
        policy.prefix = policy.prefix or ""
        return
    source = weights.locate(policy.path, policy.package)
    if isinstance(source, Path) and source.suffix == ".gguf":
        from transformers import AutoTokenizer

        policy.tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        weights.set_distinct_pad(policy.tokenizer)
        policy.prefix = policy.prefix or ""
        return
    policy.open(source)
