"""A judge behind HTTP: any server that speaks the chat completions of OpenAI (theirs, vLLM,
llama.cpp, Ollama, ...). Nothing but the standard library.

The key comes from an environment variable and goes nowhere but into the request.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf_exp import processes, web
from rlhf_exp.feedback import Judge, Question
from rlhf_exp.feedback.options import TOP, of_tokens, of_words
from rlhf_exp.web import Failure

T = TypeVar("T")
REFUSED = (301, 302, 303, 307, 308, 401, 403, 404, 405)  # whatever is asked: address, key or model


class _Pace:
    """When the next request may start, agreed on by all threads."""

    def __init__(self, per_minute: float | None) -> None:
        self.gap = 60 / per_minute * processes.count() if per_minute else 0.0
        self.next, self.lock = 0.0, threading.Lock()

    def slot(self) -> float:
        """Take the next slot; seconds until it comes."""
        with self.lock:
            now = time.monotonic()
            start = max(now, self.next)
            self.next = start + self.gap
            return start - now

    def hold(self, seconds: float) -> None:
        """Let nobody start for `seconds`."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)


@dataclass(kw_only=True)
class OpenAI(Judge):
    """Asks a few questions at a time, and again, ever later, what was not answered.

    A question without a reply after `requests` requests is given up; `patience` of these in a row
    end the run, which can be resumed when the server is back.
    """

    model: str  # name, as the server knows it
    base_url: str = "https://api.openai.com/v1"  # what comes before /chat/completions
    # environment variable that holds the key; null: the server wants none
    key_variable: str | None = "OPENAI_API_KEY"
    temperature: float = 0.0
    retry_temperature: float = 0.7  # when a malformed reply is asked for again
    # more fields of the request; null removes one, as in {max_tokens: null}
    body: dict[str, Any] = field(default_factory=dict)
    timeout: float = 60.0  # seconds without a byte before a request has failed
    concurrency: int = 8  # requests at a time, of all processes of the run
    per_minute: float | None = None  # requests at most, of all of them; null: no limit
    requests: int = 5  # for one question, before it is given up
    backoff: float = 1.0  # seconds before the second one, doubled before each further one
    longest_wait: float = 120.0  # a server that asks for more is not waited for
    patience: int = 3  # questions given up in a row before the judge counts as down

    def __post_init__(self) -> None:
        web.require_url(self.base_url, "judge.base_url", "http://localhost:8000/v1")
        web.require_variable(self.key_variable, "judge.key_variable", "OPENAI_API_KEY")
        for name in ("timeout", "concurrency", "requests", "patience"):
            if getattr(self, name) <= 0:
                raise ValueError(f"judge.{name}={getattr(self, name)} must be positive")
        if self.backoff < 0 or (self.per_minute is not None and self.per_minute <= 0):
            raise ValueError(
                f"judge.backoff={self.backoff} must be at least 0 and "
                f"judge.per_minute={self.per_minute} positive, or null for no limit"
            )
        self.varies, self.retried = True, 0
        self._pace = _Pace(self.per_minute)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._given_up, self._down = 0, ""  # questions in a row, and why nobody is asked any more

    def identity(self) -> dict[str, Any]:
        names = ("base_url", "model", "temperature", "retry_temperature", "body")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """The key is there, and the server answers and takes it."""
        try:
            self._send("models", None, min(self.timeout, 10.0))
        except Failure as failure:  # not every server lists its models, so 404 says nothing
            if failure.status in (401, 403):
                raise ConnectionError(self._refusal(failure)) from None
            if failure.status is None or failure.status >= 500:
                raise ConnectionError(self._silence(failure)) from None

    def __call__(
        self, questions: Sequence[Question], attempt: int
    ) -> Iterator[tuple[int, str | None]]:
        return self._answers([self._body(q, attempt) for q in questions], _content)

    def choose(
        self, questions: Sequence[Question], options: Sequence[str], attempt: int
    ) -> Iterator[tuple[int, list[float] | str | None]]:
        """From the `top_logprobs` of the reply; where the server gives none, a reply that is an
        option and nothing else counts as certain.
        """
        more = {"logprobs": True, "top_logprobs": TOP}
        bodies = [self._body(q, attempt, **more) for q in questions]
        return self._answers(bodies, lambda answer: _chosen(answer, options))

    def _answers(
        self, bodies: list[dict[str, Any]], read: Callable[[bytes], T]
    ) -> Iterator[tuple[int, T | None]]:
        """Position of each request and what `read` makes of the answer, as they come."""
        self._down = ""
        self._stop.clear()
        with ThreadPoolExecutor(max(1, self.concurrency // processes.count())) as pool:
            asked = {pool.submit(self._ask, body, read): i for i, body in enumerate(bodies)}
            try:
                for reply in as_completed(asked):
                    yield asked[reply], reply.result()
            finally:
                self._stop.set()  # when interrupted: threads finish their request and no more
        if self._down:
            raise ConnectionError(self._down)

    # ---- one question, in a thread of its own

    def _ask(self, body: dict[str, Any], read: Callable[[bytes], T]) -> T | None:
        """The reply; None if the question is given up, or nobody is asked any more."""
        number = 1
        while not self._stop.wait(self._pace.slot()):
            try:
                reply = read(self._send("chat/completions", body, self.timeout))
            except Failure as failure:
                hopeless = not failure.passing or failure.wait > self.longest_wait
                if hopeless or number == self.requests:
                    self._give_up(failure)
                    return None
                self._pace.hold(failure.wait)
                self._stop.wait(self.backoff * 2 ** (number - 1))
                number += 1
                with self._lock:
                    self.retried += 1
            else:
                with self._lock:
                    self._given_up = 0
                return reply
        return None

    def _body(self, question: Question, attempt: int, **more: Any) -> dict[str, Any]:
        """The request, as JSON."""
        body = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in question.messages],
            "temperature": self.retry_temperature if attempt else self.temperature,
            "max_tokens": question.max_tokens,
        }
        return {k: v for k, v in (body | more | self.body).items() if v is not None}

    def _give_up(self, failure: Failure) -> None:
        """Count a question without a reply; stop asking if it is one too many."""
        with self._lock:
            self._given_up += 1
            if self._down:
                return
            if failure.status in REFUSED:
                self._down = self._refusal(failure)
            elif self._given_up >= self.patience:
                self._down = self._silence(failure)
            if self._down:
                self._stop.set()

    def _refusal(self, failure: Failure) -> str:
        return (
            f"the judge at judge.base_url={self.base_url} refuses to answer ({failure}): check the "
            f"address, judge.model={self.model} and the key in judge.key_variable="
            f"{self.key_variable}"
        )

    def _silence(self, failure: Failure) -> str:
        return (
            f"the judge at judge.base_url={self.base_url} does not answer ({failure}): see to the "
            "server, then run or resume; the replies so far are kept"
        )

    # ---- one request

    def _send(self, what: str, body: dict[str, Any] | None, timeout: float) -> bytes:
        """POST `body` (GET if there is none) to `what` below the base URL; what comes back."""
        key = web.key_in(self.key_variable, "judge.key_variable")
        return web.send(f"{self.base_url.rstrip('/')}/{what}", body, timeout=timeout, key=key)


def _content(answer: bytes) -> str:
    """The text of a chat completion; what has another form counts as a failed request."""
    try:
        return str(json.loads(answer)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        said = " ".join(answer[:60].decode(errors="replace").split())
        raise Failure(f"{said!r} is no chat completion") from None


def _chosen(answer: bytes, options: Sequence[str]) -> list[float] | str:
    """Log-probabilities of `options`, or the text if it is none of them."""
    text = _content(answer)
    try:
        tokens = (json.loads(answer)["choices"][0].get("logprobs") or {}).get("content")
        found = of_tokens(tokens, options) if tokens else of_words(text, options)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Failure(f"its logprobs cannot be read ({type(error).__name__}: {error})") from None
    return text if found is None else found
