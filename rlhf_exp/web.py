"""One request to an HTTP server and what comes back. Nothing but the standard library.

No redirect is followed: it would take the key to another address. A server on this machine is
asked directly, whatever proxy the environment names.
"""

import email.utils
import functools
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

BUSY = (408, 425, 429)  # worth asking again, as is every 5xx


class Failure(Exception):
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
    """Follows no redirects."""

    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        return None


@functools.cache
def _opener(here: bool) -> urllib.request.OpenerDirector:
    """For a server on this machine, or elsewhere."""
    return urllib.request.build_opener(_Stay, *([urllib.request.ProxyHandler({})] if here else []))


def send(url: str, body: dict[str, Any] | None, *, timeout: float, key: str = "") -> bytes:
    """POST `body` as JSON (GET if there is none); the answer's bytes, or a Failure."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    host = urlsplit(url).hostname or ""
    try:
        opener = _opener(host in ("localhost", "::1") or host.startswith("127."))
        with opener.open(request, timeout=timeout) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        with error:
            said = " ".join(error.read(500).decode(errors="replace").split())
        reason = f"{error.code} {error.reason} {said}".replace(key or "\0", "***")
        wait = retry_after(error.headers.get("Retry-After"))
        raise Failure(reason.strip()[:200], error.code, wait) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Failure(str(reason) or type(error).__name__) from None


def retry_after(header: str | None) -> float:
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


# ---- settings


def require_url(url: str, setting: str, example: str) -> None:
    """ValueError unless `url`, the value of `setting`, is one that can be asked and holds no
    secret.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ValueError(
            f"{setting} must be http(s)://host/path, as in {example}, without a user or password"
        )


def require_variable(name: str | None, setting: str, example: str) -> None:
    """ValueError unless `name`, the value of `setting`, can be that of an environment variable."""
    if name is not None and not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(  # perhaps it is the key itself, so it is not repeated here
            f"{setting} must be the name of an environment variable, not the key; "
            f"export the key under a name such as {example}"
        )


def key_in(variable: str | None, setting: str) -> str:
    """The key that the environment variable holds, "" if none is wanted; ValueError if it holds
    none.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"{setting}={variable}: this environment variable holds no key; "
            f"export it, or set {setting}=null if the server wants none"
        )
    return key
