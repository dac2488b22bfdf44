"""A judge behind HTTP: any server that speaks the chat completions of OpenAI (theirs, vLLM,
llama.cpp, Ollama, ...). Nothing but the standard library.

The key comes from an environment variable and goes nowhere but into the request.
"""

import email.utils
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rlhf_exp.feedback import Judge, Question

REFUSED = (301, 302, 303, 307, 308, 401, 403, 404, 405)  # whatever is asked: address, key or model
BUSY = (408, 425, 429)  # worth asking again, as is every 5xx


class _Failure(Exception):
    """A request without a reply: `status` of the answer, None if there was no sound one, and the
    seconds the server wants to be left alone for.
    """

    def __init__(self, reason: str, status: int | None = None, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.status, self.wait = status, wait

    @property
    def passing(self) -> bool:
        """Whether the same request may fare better later."""
        return self.status is None or self.status in BUSY or self.status >= 500


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirects: they would take the key to another address."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


class _Pace:
    """When the next request may start, agreed on by all threads."""

    def __init__(self, per_minute: float | None) -> None:
        self.gap = 60 / per_minute if per_minute else 0.0
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
    concurrency: int = 8  # requests at a time
    per_minute: float | None = None  # requests at most; null: no limit
    requests: int = 5  # for one question, before it is given up
    backoff: float = 1.0  # seconds before the second one, doubled before each further one
    longest_wait: float = 120.0  # a server that asks for more is not waited for
    patience: int = 3  # questions given up in a row before the judge counts as down

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError(
                "judge.base_url must be http(s)://host/path, as in http://localhost:8000/v1, "
                "without a user or password"
            )
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.key_variable):
            raise ValueError(  # perhaps it is the key itself, so it is not repeated here
                "judge.key_variable must be the name of an environment variable, not the key; "
                "export the key under a name such as OPENAI_API_KEY"
            )
        for name in ("timeout", "concurrency", "requests", "patience"):
            if getattr(self, name) <= 0:
                raise ValueError(f"judge.{name}={getattr(self, name)} must be positive")
        if self.backoff < 0 or (self.per_minute is not None and self.per_minute <= 0):
            raise ValueError(
                f"judge.backoff={self.backoff} must be at least 0 and "
                f"judge.per_minute={self.per_minute} positive, or null for no limit"
            )
        self.varies, self.retried = True, 0
        self._opener, self._pace = urllib.request.build_opener(_Stay), _Pace(self.per_minute)
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._given_up, self._down = 0, ""  # questions in a row, and why nobody is asked any more

    def identity(self) -> dict[str, Any]:
        names = ("base_url", "model", "temperature", "retry_temperature", "body")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """The key is there, and the server answers and takes it."""
        try:
            self._send("models", None, min(self.timeout, 10.0))
        except _Failure as failure:  # not every server lists its models, so 404 says nothing
            if failure.status in (401, 403):
                raise ConnectionError(self._refusal(failure)) from None
            if failure.status is None or failure.status >= 500:
                raise ConnectionError(self._silence(failure)) from None

    def __call__(
        self, questions: Sequence[Question], attempt: int
    ) -> Iterator[tuple[int, str | None]]:
        temperature = self.retry_temperature if attempt else self.temperature
        self._down = ""
        self._stop.clear()
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._ask, q, temperature): i for i, q in enumerate(questions)}
            try:
                for reply in as_completed(asked):
                    yield asked[reply], reply.result()
            finally:
                self._stop.set()  # when interrupted: threads finish their request and no more
        if self._down:
            raise ConnectionError(self._down)

    # ---- one question, in a thread of its own

    def _ask(self, question: Question, temperature: float) -> str | None:
        """The reply; None if the question is given up, or nobody is asked any more."""
        body = self._body(question, temperature)
        number = 1
        while not self._stop.wait(self._pace.slot()):
            try:
                reply = _content(self._send("chat/completions", body, self.timeout))
            except _Failure as failure:
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

    def _body(self, question: Question, temperature: float) -> dict[str, Any]:
        """The request, as JSON."""
        body = {
            "model": self.model,
            "messages": [{"role": role, "content": text} for role, text in question.messages],
            "temperature": temperature,
            "max_tokens": question.max_tokens,
        }
        return {k: v for k, v in (body | self.body).items() if v is not None}

    def _give_up(self, failure: _Failure) -> None:
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

    def _refusal(self, failure: _Failure) -> str:
        return (
            f"the judge at judge.base_url={self.base_url} refuses to answer ({failure}): check the "
            f"address, judge.model={self.model} and the key in judge.key_variable="
            f"{self.key_variable}"
        )

    def _silence(self, failure: _Failure) -> str:
        return (
            f"the judge at judge.base_url={self.base_url} does not answer ({failure}): see to the "
            "server, then run or resume; the replies so far are kept"
        )

    # ---- one request

    def _send(self, what: str, body: dict[str, Any] | None, timeout: float) -> bytes:
        """POST `body` (GET if there is none) to `what` below the base URL; what comes back."""
        key = self._key()
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/{what}",
            data=None if body is None else json.dumps(body).encode(),
            headers=headers,
        )
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(500).decode(errors="replace").split())
            reason = f"{error.code} {error.reason} {said}".replace(key or "\0", "***")
            wait = _retry_after(error.headers.get("Retry-After"))
            raise _Failure(reason.strip()[:200], error.code, wait) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _Failure(str(reason) or type(error).__name__) from None

    def _key(self) -> str:
        if self.key_variable is None:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"judge.key_variable={self.key_variable}: this environment variable holds no key; "
                "export it, or set judge.key_variable=null if the server wants none"
            )
        return key


def _content(answer: bytes) -> str:
    """The text of a chat completion; what has another form counts as a failed request."""
    try:
        return str(json.loads(answer)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError):
        said = " ".join(answer[:60].decode(errors="replace").split())
        raise _Failure(f"{said!r} is no chat completion") from None


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header (a number or a date, RFC 9110) asks to wait; 0 if none."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
