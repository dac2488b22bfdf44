"""A server that speaks the chat completions of OpenAI, as well or as badly as a test wants;
judge_fixtures.py starts one.
"""

import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret"
Answer = tuple[int, dict[str, str], str]  # status, headers, body


def said(content: str | None, tokens: list[dict[str, Any]] | None = None) -> Answer:
    """A completion, with the `logprobs` of its tokens if there are any."""
    choice: dict[str, Any] = {"message": {"content": content}}
    if tokens is not None:
        choice["logprobs"] = {"content": tokens}
    return 200, {}, json.dumps({"choices": [choice]})


def token(text: str, **alternatives: float) -> dict[str, Any]:
    """A token of a reply with its most likely alternatives, by probability: _1 stands for "1"."""
    shares = {k.removeprefix("_"): v for k, v in alternatives.items()}
    top = [{"token": k, "logprob": math.log(v)} for k, v in shares.items()]
    return {"token": text, "logprob": math.log(shares[text]), "top_logprobs": top}


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that timed out and left is what some tests are about."""


class Server:
    """Answers each request with what `answer(completion, number of the request)` gives."""

    def __init__(self) -> None:
        self.answer: Callable[[str, int], Answer] = lambda text, number: said("Good")
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.take(self)

            def do_GET(self) -> None:
                outer.take(self)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"] or 0)) or "{}")
        with self.lock:
            headers = dict(handler.headers.items())
            self.requests.append({"path": handler.path, "headers": headers, "body": body})
            self.times.append(time.monotonic())
            number = len(self.requests)
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        text = body["messages"][-1]["content"] if body else ""
        status, more, content = self.answer(text.split("Answer: ")[-1].split("\n")[0], number)
        with self.lock:
            self.busy -= 1
        handler.send_response(status)
        for name, value in more.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content.encode())))
        handler.end_headers()
        handler.wfile.write(content.encode())

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
