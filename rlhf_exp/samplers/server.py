"""What is said to a vLLM server, and checked of what it answers. vLLM itself is never imported.

The protocol is that of vLLM 0.33, read in the sources of the project's main branch around it
(entrypoints/openai/completion/{protocol,serving}.py, openai/models/serving.py, serve/lora and, in
development mode, serve/dev/{rpc,rlhf,cache}); no vLLM has been asked yet. What matters of it:

- `/v1/completions` takes a prompt as token ids and returns the ids it read and those it sampled
  (`return_token_ids`), a stop token included. With `ignore_eos` nothing but `stop_token_ids` ends a
  completion. `logprobs: 0` is the log-probability of the sampled token alone. What a request leaves
  out may come from the model's generation_config.json, so nothing is left out.
- All prompts of a request share its seed, and the `n` copies of a prompt get seed, seed + 1, ...:
  hence one request per prompt.
- `top_k: 0` is off, as here. `logit_bias` of -100 stands in for suppression (it is cut there).
- `/v1/load_lora_adapter` exists with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True only, `/collective_rpc`
  and the like with VLLM_SERVER_DEV_MODE=1 only. A route that exists answers a wrong method with
  405, one that does not with 404.
- `reload_weights` leaves the prefix cache as it is: it must be reset.
"""

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_exp import tokens, web

if TYPE_CHECKING:
    from rlhf_exp.policy import Policy

LOST = (None, *web.BUSY, 502, 503, 504)  # statuses (None: no answer) after which it asks again
SUPPRESSED = -100.0


class Malformed(ValueError):
    """An answer that is none."""


@dataclass
class Completion:
    """A response and the server's log-probabilities of its tokens, in nats."""

    ids: list[int]
    logprobs: list[float]


@dataclass
class Server:
    """The server at `url`; every method raises web.Failure if it gets no answer, Malformed if the
    answer makes no sense.
    """

    url: str
    key_variable: str | None
    timeout: float
    requests: int
    backoff: float

    def ask(
        self, path: str, body: dict[str, Any] | None = None, *, patient: bool = True
    ) -> dict[str, Any]:
        """The answer to a POST of `body` (a GET without one), {} if it is no JSON object; patience
        is to ask again, ever later, while the server is lost or busy.
        """
        key = web.key_in(self.key_variable, "sampler.key_variable")
        timeout = self.timeout if patient else min(self.timeout, 10.0)
        for number in range(self.requests):
            try:
                said = web.send(f"{self.url.rstrip('/')}{path}", body, timeout=timeout, key=key)
                break
            except web.Failure as failure:
                last = number + 1 == self.requests or not patient
                if last or failure.status not in LOST:
                    raise
                time.sleep(max(failure.wait, self.backoff * 2**number))
        try:
            answer = json.loads(said)  # pyright: ignore[reportPossiblyUnboundVariable]
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}

    def offers(self, path: str) -> bool:
        """Whether there is something to POST to at `path`."""
        try:
            self.ask(path, patient=False)
        except web.Failure as failure:
            if failure.status == 405:
                return True
            if failure.status != 404:
                raise
            return False
        return True

    def models(self) -> list[dict[str, Any]]:
        """The cards of what it serves: the base model (without a parent) first."""
        cards = self.ask("/v1/models", patient=False).get("data")
        if not isinstance(cards, list) or not cards or "id" not in cards[0]:
            raise Malformed(
                f"what answers at sampler.url={self.url} lists no models, so it is no vLLM server: "
                "check the address and port"
            )
        return sorted(cards, key=lambda card: card.get("parent") is not None)

    # ---- completions

    def complete(self, body: dict[str, Any]) -> list[Completion]:
        """The `n` completions of one prompt; see `request`."""
        answer = self.ask("/v1/completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [self._read(choice, body) for choice in choices]
            whole = len(found) == body["n"] and answer["model"] == body["model"]
        except (LookupError, TypeError, AttributeError):
            whole, found = False, []
        if not whole:
            said = json.dumps(answer)[:120]
            raise Malformed(
                f"the server at sampler.url={self.url} answers with what is no completion "
                f"({said}): see to it, then run or resume"
            )
        return found

    def _read(self, choice: dict[str, Any], body: dict[str, Any]) -> Completion:
        """One choice, which must be what was asked for."""
        ids, asked = choice.get("token_ids"), choice.get("prompt_token_ids")
        if ids is None or asked is None:
            raise Malformed(
                f"the server at sampler.url={self.url} returns no token ids (return_token_ids): "
                "it is too old, use vLLM 0.33"
            )
        logprobs = choice["logprobs"]["token_logprobs"]
        (end,) = body["stop_token_ids"]
        wrong = {
            "another prompt": asked != body["prompt"],
            "no tokens": not ids,
            "too many tokens": len(ids) > body["max_tokens"],
            "tokens after the end of text": tokens.until(ids, end) != ids,
            "no end": (ids[-1:] == [end]) != (choice["finish_reason"] == "stop"),
            "a log-probability missing": len(logprobs) != len(ids) or None in logprobs,
            f"finish_reason={choice['finish_reason']}": choice["finish_reason"]
            not in ("stop", "length"),
        }
        if any(wrong.values()):
            what = next(name for name, found in wrong.items() if found)
            raise Malformed(
                f"the server at sampler.url={self.url} answers a request with {what}: see to it, "
                "then run or resume"
            )
        return Completion(ids, logprobs)

    # ---- weights

    def load_adapter(self, name: str, path: str, prefix: str) -> None:
        """Serve the adapter at `path` as `name`, and no other one whose name begins so."""
        for card in self.models():
            if card["id"].startswith(prefix) and card["id"] != name:
                try:
                    self.ask("/v1/unload_lora_adapter", {"lora_name": card["id"]})
                except web.Failure as failure:  # it made room by itself
                    if failure.status not in (404, 500):
                        raise
        body = {"lora_name": name, "lora_path": path, "load_inplace": True}  # if asked twice
        self.ask("/v1/load_lora_adapter", body)

    def load_weights(self, path: str, version: int) -> bool:
        """Serve the weights at `path`; whether it remembers which `version` they are."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        self.ask("/collective_rpc", body)
        self.ask("/reset_prefix_cache", {})
        if not self.offers("/update_weight_version"):
            return False
        self.ask("/update_weight_version", {"new_version": str(version)})
        return True

    def holds(self, version: int) -> bool:
        """Whether its weights are those last loaded as `version`."""
        return self.ask("/weight_info").get("weight_version") == str(version)


def request(policy: "Policy", model: str, prompt: list[int], n: int, seed: int) -> dict[str, Any]:
    """The body that asks `model` for `n` completions of `prompt` as `policy` samples."""
    return {
        "model": model,
        "prompt": prompt,
        "n": n,
        "seed": seed,
        "max_tokens": policy.max_new_tokens,
        "min_tokens": policy.min_new_tokens,
        "temperature": policy.temperature,
        "top_k": policy.top_k,
        "top_p": policy.top_p,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {str(i): SUPPRESSED for i in policy.control},
        "ignore_eos": True,
        "stop_token_ids": [policy.tokenizer.eos_token_id],
        "logprobs": 0,
        "return_token_ids": True,
        "add_special_tokens": False,
    }
