"""Completions by a vLLM server that was started apart, under the policy's weights of this moment.

Weights are told by their content. Before it samples, the main process takes a digest of them; if
it is not the one the server got last, they are saved where the server can read them and loaded
there: the adapter, where that is what is trained, else all of them. An adapter is served under a
name that holds its digest, so no server can answer with another one. All of them are, where the
server keeps a version, marked with the digest, which is asked for after sampling.

The server's log-probabilities are compared with those of the policy's own forward pass on the same
tokens. What an algorithm learns from are its own; PPO may weigh tokens by their ratio, truncated
(Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"). One
process talks to the server, the others get what it got.

Left out: weights sent over NCCL, several servers, and adapters with tokens of their own.
"""

import hashlib
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlhf_exp import processes, web
from rlhf_exp.samplers.mismatch import compared, own_logprobs, served_logprobs
from rlhf_exp.samplers.server import Completion, Server, request

if TYPE_CHECKING:
    from rlhf_exp.policy import Policy, Rollouts

logger = logging.getLogger(__name__)

PREFIX = "rlhf_exp-"  # of the names of our adapters


@dataclass(kw_only=True)
class VLLM:
    """Asks for one prompt at a time, for many at once."""

    url: str = "http://127.0.0.1:8000"  # of the server, without /v1
    # where weights lie for the server, under the same path for both; null: <run directory>/sampler
    folder: str | None = None
    key_variable: str | None = None  # environment variable with the server's --api-key; null: none
    refresh_every: int = 1  # changes of the weights after which the server gets them
    # PPO weighs each token by policy / server, at most this (Yao et al. 2025); null: off
    max_importance: float | None = None
    concurrency: int = 64  # prompts asked for at a time
    timeout: float = 600.0  # seconds without a byte before a request has failed
    requests: int = 5  # for one answer, before the run stops
    backoff: float = 1.0  # seconds before the second one, doubled before each further one

    def __post_init__(self) -> None:
        web.require_url(self.url, "sampler.url", "http://127.0.0.1:8000")
        web.require_variable(self.key_variable, "sampler.key_variable", "VLLM_API_KEY")
        for name in ("refresh_every", "concurrency", "requests", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"sampler.{name}={getattr(self, name)} must be positive")
        if self.backoff < 0:
            raise ValueError(f"sampler.backoff={self.backoff} must be at least 0")
        if self.max_importance is not None and self.max_importance < 1:
            raise ValueError(
                f"sampler.max_importance={self.max_importance} must be at least 1, or null for none"
            )
        self.server = Server(self.url, self.key_variable, self.timeout, self.requests, self.backoff)
        self.saved: Path | None = None  # where those lie that it got last
        self.held: int | None = None  # version of the weights that the server has
        self.seen: int | None = None  # version of the policy's weights, when it last sampled
        self.behind = 0  # changes of the policy's weights since the server got any
        self.marked = False  # the server tells which version it has
        self.base = self.model = ""  # names of the base model and of what is sampled from
        self.found: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """Of the last sampling: version of the weights, their age, and how far the server's
        log-probabilities are from ours.
        """
        return self.found

    # ---- before the run

    def check(self, policy: "Policy", algorithm: Any, prompts: list[str]) -> None:
        """The server is there, fits the policy (whose tokenizer is loaded), and can be given
        weights.
        """
        if getattr(algorithm, "samples_itself", False):
            raise ValueError(
                f"sampler=vllm cannot serve algo={algorithm.name}, whose trainer of TRL samples by "
                "itself: use sampler=local, or another algorithm, such as ppo"
            )
        if grown := getattr(algorithm, "tokens", None):
            raise ValueError(
                f"algo.tokens={grown} make the model grow, which a vLLM server cannot follow: use "
                "sampler=local, or algo.tokens=[] to condition in words"
            )
        if self.max_importance is not None and not hasattr(algorithm, "weighs_importance"):
            raise ValueError(
                f"sampler.max_importance={self.max_importance} is for algo=ppo alone: set it to "
                "null"
            )
        if policy.lora is not None and policy.adapter is not None and not policy.sft:
            raise ValueError(
                f"policy.adapter={policy.adapter} would be merged into the policy but not into "
                "what sampler=vllm serves: use sampler=local"
            )
        processes.first(lambda: self._check(policy, max(map(len, policy.encode(prompts)))))

    def _check(self, policy: "Policy", longest: int) -> None:
        start = f"start one with: {how_to_serve(policy)}"
        try:
            self.server.ask("/health", patient=False)
            card = self.server.models()[0]
            route = "/collective_rpc" if policy.lora is None else "/v1/load_lora_adapter"
            refreshes = self.server.offers(route)
        except web.Failure as failure:
            if failure.status in (401, 403):
                raise ValueError(
                    f"the server at sampler.url={self.url} wants its --api-key: export it, and "
                    f"name the variable in sampler.key_variable={self.key_variable}"
                ) from None
            raise ConnectionError(
                f"no vLLM server answers at sampler.url={self.url} ({failure}): {start}"
            ) from None
        if not refreshes:
            raise ValueError(
                f"the server at sampler.url={self.url} takes no weights, as it has no {route}: "
                f"{start}"
            )
        self.base = card["id"]
        room = card.get("max_model_len")
        if room is not None and longest + policy.max_new_tokens > room:
            raise ValueError(
                f"the server at sampler.url={self.url} has room for {room} tokens, but a prompt "
                f"has {longest} and policy.max_new_tokens={policy.max_new_tokens}: start it with a "
                "longer --max-model-len"
            )
        self._probe(policy)

    def _probe(self, policy: "Policy") -> None:
        """Let the server sample where one token is possible: it knows the token, and says that
        its log-probability is 0, if they are of what is sampled from.
        """
        end, pad = policy.tokenizer.eos_token_id, policy.tokenizer.pad_token_id
        last = len(policy.tokenizer) - 1
        if policy.lora is not None or last == pad:  # which may be ours alone
            last = end if policy.lora is not None else last - 1
        body = request(policy, self.base, [end], 1, 0)
        body |= {"max_tokens": 1, "min_tokens": 0, "allowed_token_ids": [last], "logit_bias": {}}
        try:
            (only,) = self.server.complete(body)
        except web.Failure as failure:
            raise ValueError(
                f"the server at sampler.url={self.url} serves {self.base}, which is another model "
                f"than the policy's: it cannot sample token {last} ({failure}); start it with: "
                f"{how_to_serve(policy)}"
            ) from None
        if abs(only.logprobs[0]) > 1e-3:
            raise ValueError(
                f"the server at sampler.url={self.url} tells log-probabilities of other logits "
                "than it samples from: start it with --logprobs-mode processed_logprobs"
            )

    def open(self, directory: Path) -> None:
        """Weights lie in `folder`, or in the run's directory."""
        self.place = Path(self.folder).expanduser() if self.folder else directory / "sampler"
        self.place = self.place.absolute()
        if processes.main():
            self.place.mkdir(parents=True, exist_ok=True)

    # ---- sampling

    def sample(self, policy: "Policy", prompts: list[str], n: int, *, fresh: bool) -> "Rollouts":
        """As `Policy.sample`; seeds come from torch's generator, one for each prompt."""
        seeds = torch.randint(2**62, (len(prompts),)).tolist()
        encoded = policy.encode(prompts)
        with policy.whole():
            version, age = processes.first(lambda: self._keep_up(policy, fresh))
        drawn = processes.first(lambda: self._draw(policy, encoded, n, seeds))
        repeated = [p for p in prompts for _ in range(n)]
        rollouts = policy.assemble(repeated, [completion.ids for completion in drawn])
        self.found = {"sampler/version": float(version), "sampler/age": float(age)}
        own, served = own_logprobs(policy, rollouts), served_logprobs(rollouts, drawn)
        self.found |= compared(rollouts, own, served)
        if self.max_importance is not None:
            ratio = (own - served).exp()  # 1 where there is no token
            rollouts.importance = ratio.clamp(max=self.max_importance)
            cut = (ratio > self.max_importance).sum() / rollouts.response.sum()
            self.found["sampler/importance_cut"] = float(cut)
        return rollouts

    def _draw(
        self, policy: "Policy", encoded: list[list[int]], n: int, seeds: list[int]
    ) -> list[Completion]:
        """`n` completions of every prompt, in order."""
        bodies = [
            request(policy, self.model, ids, n, seed)
            for ids, seed in zip(encoded, seeds, strict=True)
        ]
        try:
            with ThreadPoolExecutor(self.concurrency) as pool:
                asked = [pool.submit(self.server.complete, body) for body in bodies]
                try:
                    drawn = [completion for answer in asked for completion in answer.result()]
                finally:  # after a failure, those not begun yet are not asked for
                    pool.shutdown(wait=False, cancel_futures=True)
            kept = not self.marked or self.server.holds(self.held or 0)
        except web.Failure as failure:
            raise self._lost(failure) from None
        if not kept:
            raise ConnectionError(
                f"the server at sampler.url={self.url} no longer holds the weights it was given: "
                "was it started again, or does another run use it? Resume when it is free"
            )
        return drawn

    def _lost(self, failure: web.Failure) -> ConnectionError:
        return ConnectionError(
            f"the vLLM server at sampler.url={self.url} does not answer as it did ({failure}): see "
            "to it, then resume"
        )

    # ---- weights

    def _keep_up(self, policy: "Policy", fresh: bool) -> tuple[int, int]:
        """Give the server the weights if they are due; which it has then, and how many changes old
        they are.
        """
        now = version_of(policy)
        if now != self.seen:
            self.seen, self.behind = now, self.behind + 1
        if now == self.held:
            self.behind = 0
        elif self.held is None or fresh or self.behind >= self.refresh_every:
            self._refresh(policy, now)
            self.held, self.behind = now, 0
        assert self.held is not None
        return self.held, self.behind

    def _refresh(self, policy: "Policy", version: int) -> None:
        path = self.place / f"weights-{version}"
        self._save(policy, path)
        try:
            if policy.lora is not None:
                self._require_base(policy)
                self.model = f"{PREFIX}{version}"
                self.server.load_adapter(self.model, str(path), PREFIX)
            else:
                self.model = self.base
                self.marked = self.server.load_weights(str(path), version)
        except web.Failure as failure:
            if failure.status is None:
                raise self._lost(failure) from None
            command = how_to_serve(policy, None if policy.lora is not None else str(path))
            raise ValueError(
                f"the server at sampler.url={self.url} cannot load the policy's weights from "
                f"{path} ({failure}): it must see that path (sampler.folder) and fit it, as when "
                f"started with: {command}"
            ) from None
        if self.saved not in (None, path):
            shutil.rmtree(self.saved)
        self.saved = path
        logger.info("the server holds weights %d", version)

    def _save(self, policy: "Policy", path: Path) -> None:
        """Whole or not at all."""
        if policy.lora is not None and policy.control:
            raise ValueError(
                "vLLM serves no adapter with tokens of its own, and this policy has "
                f"{len(policy.control)} control tokens: use sampler=local, or policy.lora=null"
            )
        temporary = path.with_name(f".{path.name}")
        for stale in (temporary, path):
            shutil.rmtree(stale, ignore_errors=True)
        settings = {} if policy.lora is None else {"save_embedding_layers": False}
        policy.model.save_pretrained(temporary, **settings)
        policy.tokenizer.save_pretrained(temporary)  # so that it can be served as it is
        temporary.rename(path)

    def _require_base(self, policy: "Policy") -> None:
        """An adapter is nothing without the weights it was trained on."""
        root = str(self.server.models()[0].get("root") or self.base)
        if Path(root).name != Path(policy.source).name:
            raise ValueError(
                f"the server at sampler.url={self.url} serves {root}, but the adapter is trained "
                f"on {policy.source}: start it with: {how_to_serve(policy)}"
            )


def how_to_serve(policy: "Policy", model: str | None = None) -> str:
    """The command that starts a server for `policy`, by default with the weights it starts from."""
    if model is None:
        known = policy.path if not policy.sft else None
        model = getattr(policy, "source", known) or "<the start policy that stages=[sft] names>"
    if policy.lora is None:
        prefix, adapters = "VLLM_SERVER_DEV_MODE=1", ""
    else:
        prefix = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        adapters = f" --enable-lora --max-lora-rank {policy.lora.get('r', 8)}"
    return f"{prefix} vllm serve {model}{adapters} --logprobs-mode processed_logprobs"


@torch.no_grad()
def version_of(policy: "Policy") -> int:
    """48 bits that change with any weight that the server is given: a digest of the sum and the
    norm of each parameter.
    """
    adapter = policy.lora is not None
    given = [p for p in policy.model.parameters() if p.requires_grad or not adapter]
    sums = [p.sum(dtype=torch.float64) for p in given]
    norms = [torch.linalg.vector_norm(p, dtype=torch.float64) for p in given]
    told = torch.stack([*sums, *norms]).cpu().numpy().tobytes()
    return int(hashlib.sha256(told).hexdigest()[:12], 16)
