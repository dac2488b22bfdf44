"""The page on which people label: a small server in a thread of the run.

Its address holds a secret; without it every request is refused. So is one whose Host is a name
that is not ours, since a foreign page could have had that name point here (DNS rebinding). Texts
reach the page as JSON only.

Left out: TLS and accounts. On another machine than the run's, use a tunnel (ssh -L).
"""

import hmac
import ipaddress
import secrets
import socket
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_exp.labellers.person.desk import Closed, Desk

FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
TEMPLATES = Path(__file__).parent / "template"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
GRACE = 4.0  # seconds in which the last label of a round can be taken back
LONGEST = 10_000  # bytes of a request


def ours(host: str, *names: str) -> bool:
    """Whether the Host header `host` is an IP address, localhost, or one of `names`."""
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or "]" in host else host
    name = name.strip("[]").lower()
    if name in ("localhost", *(n.lower() for n in names)):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _text(body: Any, name: str, longest: int = 80) -> str:
    """`body[name]`, a text; ValueError if it is none, or empty or long."""
    found = body.get(name) if isinstance(body, dict) else None
    if not isinstance(found, str) or not 0 < len(found.strip()) <= longest:
        raise ValueError(f"{name} must be a text of 1 to {longest} characters")
    return found.strip()


def _seconds(body: dict[str, Any]) -> float | None:
    found = body.get("seconds")
    return float(found) if isinstance(found, int | float) and 0 <= found < 1e9 else None


class Answers:
    """What each request does, and says in return."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def __call__(self, what: str, body: Any) -> dict[str, Any]:
        """The state that `who` sees after this request; ValueError for one that is malformed."""
        who = _text(body, "who")
        told: dict[str, Any] = {}
        try:
            told = getattr(self, what)(who, body)
        except Closed:
            told = {"closed": True}
        return self.desk.state(who) | told

    def ask(self, who: str, body: dict[str, Any]) -> dict[str, Any]:
        """Nothing but the state."""
        return {}

    def label(self, who: str, body: dict[str, Any]) -> dict[str, Any]:
        """Write a decision down."""
        key, choice, id = (_text(body, name) for name in ("key", "choice", "id"))
        question = self.desk.question(key, who)
        self.desk.label(question, choice, who=who, id=id, seconds=_seconds(body))
        return {}

    def undo(self, who: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take the last decision back."""
        return {"undone": self.desk.undo(who=who, id=_text(body, "id"))}

    def finish(self, who: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask nobody anything more."""
        self.desk.finish()
        return {}


def application(desk: Desk, token: str, host: str) -> Callable[..., Awaitable[None]]:
    """The ASGI application: files of the page, and requests in JSON, all below the secret."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    answers = Answers(desk)

    async def respond(request: Request) -> Response:
        secret, _, what = request.url.path.lstrip("/").partition("/")
        known = hmac.compare_digest(secret.encode(), token.encode())
        if not known or not ours(request.headers.get("host", ""), host, socket.gethostname()):
            return Response("This address is not complete: use the one on the screen.", 403)
        if request.method == "GET" and what in FILES:
            name, kind = FILES[what]
            return Response((TEMPLATES / name).read_bytes(), media_type=kind)
        if request.method != "POST" or what not in ("ask", "label", "undo", "finish"):
            return Response("There is nothing here.", 404)
        try:
            size = int(request.headers.get("content-length", LONGEST + 1))
            if size > LONGEST or request.headers.get("content-type") != "application/json":
                raise ValueError("a request is a short JSON object")
            return JSONResponse(await run_in_threadpool(answers, what, await request.json()))
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", scope["type"]
        response = await respond(Request(scope, receive))
        response.headers.update(HEADERS)
        await response(scope, receive, send)

    return app


class Page:
    """Serves the page from the first round on, until the run ends."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0, grace: float = GRACE) -> None:
        self.host, self.port, self.grace = host, port, grace
        self.url: str | None = None

    def check(self) -> None:
        """ValueError if the server's packages are missing, or the address is taken."""
        missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"labeller.interface=page needs the package {missing[0]}: "
                "pip install 'rlhf_exp[labelling]', or take interface=terminal or files"
            )
        self._bound().close()

    def __call__(self, desk: Desk) -> None:
        """Return when the round is over."""
        if self.url is None:
            self._start(desk)
        while not desk.wait(0.5, grace=self.grace):
            pass

    def _bound(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            raise ValueError(
                f"labeller.host={self.host} labeller.port={self.port} cannot be listened on "
                f"({error.strerror}): give another one, or port=0 for any that is free"
            ) from None

    def _start(self, desk: Desk) -> None:
        import uvicorn

        token, listener = secrets.token_urlsafe(24), self._bound()
        where = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        where = f"[{where}]" if ":" in where else where
        self.url = f"http://{where}:{listener.getsockname()[1]}/{token}/"
        config = uvicorn.Config(
            application(desk, token, self.host),
            log_config=None,
            access_log=False,  # the address is a secret
            ws="none",
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=[[listener]], daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _stop, server, thread)  # at the latest when Python ends
        print(f"label here: {self.url}", file=sys.stderr, flush=True)


def _stop(server: Any, thread: threading.Thread) -> None:
    server.should_exit = True
    thread.join(timeout=3)
