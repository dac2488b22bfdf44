"""The server of the labelling page: who gets which pair, what counts, and who is refused."""

import http.client
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rlhf_exp import signals
from rlhf_exp.labellers.person import Person
from rlhf_exp.labellers.person.desk import Desk
from rlhf_exp.labellers.person.page import Page, ours
from rlhf_exp.labellers.person.store import Store, key_of
from tests.people import ROWS, person, wait_for


@pytest.fixture(autouse=True)
def _no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "received", [])


class Browser:
    """Requests to the page as a browser sends them."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.token = parts.netloc, parts.path.strip("/")

    def request(
        self, what: str, body: Any = None, *, method: str = "POST", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=20)
        sent = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"} | headers
        connection.request(method, f"/{self.token}/{what}", sent, headers)
        answer = connection.getresponse()
        content = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return content

    def post(self, what: str, who: str = "ada", **body: Any) -> dict[str, Any]:
        status, _, content = self.request(what, {"who": who} | body)
        assert status == 200, content
        return json.loads(content)

    def label(self, state: dict[str, Any], choice: str, who: str = "ada", id: str = "") -> Any:
        """Say `choice` of the first pair of `state`."""
        key = state["pairs"][0]["key"]
        return self.post("label", who, key=key, choice=choice, id=id or f"{who} {key}", seconds=1)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., tuple[Person, Browser, Any]]]:
    """Starts a labeller that asks about ROWS in a thread; gives it, a browser, and its answer."""
    started: list[Person] = []
    threads: list[threading.Thread] = []

    def serve(count: int = 4, **settings: Any) -> tuple[Person, Browser, Any]:
        labeller = person(tmp_path, **settings)
        labeller.open(tmp_path)
        labeller.ask.grace = 0.0
        started.append(labeller)
        said: list[Any] = []
        threads.append(threading.Thread(target=lambda: said.append(ask(labeller, count))))
        threads[-1].start()
        wait_for(lambda: labeller.ask.url)
        return labeller, Browser(labeller.ask.url), Answer(threads[-1], said)

    yield serve
    for labeller in started:
        if labeller.desk is not None:
            labeller.desk.finish()
        labeller.ask.close()
    for thread in threads:
        thread.join(10)


def ask(labeller: Person, count: int) -> Any:
    return labeller(*[list(column) for column in zip(*ROWS[:count], strict=True)])


class Answer:
    """What the labeller will have said."""

    def __init__(self, thread: threading.Thread, said: list[Any]) -> None:
        self.thread, self.said = thread, said

    def __call__(self) -> list[float]:
        self.thread.join(20)
        assert not self.thread.is_alive(), "it still waits"
        return self.said[0].tolist()


def test_a_round_on_the_page(served, capfd) -> None:
    labeller, browser, answer = served()
    state = browser.post("ask")
    assert (state["done"], state["asked"], state["asking"]) == (0, 4, True)
    assert len(state["pairs"]) == 2, "the next pair is there before it is needed"
    lefts = []
    for choice in ("left", "right", "tie", "skip"):
        lefts.append(state["pairs"][0]["left"])
        state = browser.label(state, choice)
    said = answer()
    assert said[0] == (1.0 if lefts[0] == "one 0" else 0.0)
    assert said[1] == (0.0 if lefts[1] == "one 1" else 1.0)
    assert said[2] == 0.5
    assert math.isnan(said[3])
    assert state["done"] == 4
    assert state["pairs"] == []
    report = labeller.report()
    assert (report["labels"], report["labels_by/ada"], report["seconds_per_label"]) == (4, 4, 1.0)
    assert capfd.readouterr().err.count(labeller.ask.url) == 1


def test_the_next_round_comes_by_itself_and_the_address_stays(served, capfd) -> None:
    labeller, browser, answer = served(1)
    browser.label(browser.post("ask"), "left")
    answer()
    waiting = browser.post("ask")
    assert (waiting["asking"], waiting["pairs"], waiting["finished"]) == (False, [], False)
    thread = threading.Thread(target=lambda: ask(labeller, 2))
    thread.start()
    state = wait_for(lambda: (s := browser.post("ask"))["pairs"] and s)
    assert [pair["prompt"] for pair in state["pairs"]] == ["prompt 1"]
    assert (state["done"], state["asked"]) == (1, 2)
    browser.label(state, "left")
    thread.join(10)
    assert not thread.is_alive()
    assert capfd.readouterr().err.count("label here") == 1


def test_a_label_posted_twice_counts_once(served) -> None:
    labeller, browser, _ = served()
    state = browser.post("ask")
    first = [browser.label(state, "left", id="x") for _ in range(2)]
    threads = [threading.Thread(target=lambda: browser.label(state, "left", id="x")) for _ in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [s["done"] for s in first] == [1, 1]
    assert len(labeller.desk.store.ledger.path.read_text().splitlines()) == 1


def test_two_people_at_once_label_every_pair_once(served) -> None:
    labeller, browser, answer = served(6)
    everyone: dict[str, list[str]] = {"ada": [], "bob": []}

    def work(who: str) -> None:
        state = browser.post("ask", who)
        while state["asking"] and state["done"] < 6:
            if state["pairs"]:
                everyone[who].append(state["pairs"][0]["key"])
                state = browser.label(state, "left", who)
            else:
                state = browser.post("ask", who)

    threads = [threading.Thread(target=work, args=[who]) for who in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(answer()) == 6
    keys = everyone["ada"] + everyone["bob"]
    assert sorted(keys) == sorted(key_of(*row) for row in ROWS)
    assert labeller.report()["labels"] == 6


def test_a_reload_shows_the_same_pairs_and_others_are_counted(served) -> None:
    _, browser, _ = served()
    state = browser.post("ask")
    assert browser.post("ask")["pairs"] == state["pairs"]
    theirs = browser.post("ask", "bob")
    assert theirs["others"] == 1
    assert not {p["key"] for p in theirs["pairs"]} & {p["key"] for p in state["pairs"]}


def test_undo_on_the_page(served) -> None:
    _, browser, _ = served()
    before = browser.post("ask")
    browser.label(before, "left")
    state = browser.post("undo", id="u")
    assert state["undone"] == before["pairs"][0]["key"] == state["pairs"][0]["key"]
    assert state["done"] == 0
    assert browser.post("undo", id="u2")["undone"] is None


def test_two_contradict_each_other(served) -> None:
    labeller, browser, answer = served(1, labels_per_pair=2)
    for who, better in (("ada", "one 0"), ("bob", "other 0")):
        state = browser.post("ask", who)
        side = next(s for s in ("left", "right") if state["pairs"][0][s] == better)
        browser.label(state, side, who)
    assert answer() == [0.5]
    report = labeller.report()
    assert (report["contradictions"], report["agreement"], report["labellers"]) == (1, 0.0, 2)


def test_finish_leaves_the_rest_unsaid(served) -> None:
    labeller, browser, answer = served(3)
    browser.label(browser.post("ask"), "tie")
    state = browser.post("finish")
    assert (state["finished"], state["pairs"]) == (True, [])
    said = answer()
    assert said[0] == 0.5
    assert math.isnan(said[1])
    assert math.isnan(said[2])
    assert labeller.finished()
    assert math.isnan(ask(labeller, 5)[4]), "it asks nothing more"
    assert browser.label({"pairs": [{"key": key_of(*ROWS[1])}]}, "left")["closed"]


@pytest.mark.parametrize("token", ["", "x" * 32, "é"])
def test_without_the_secret_nothing_is_served(served, token: str) -> None:
    _, browser, _ = served()
    browser.token = token.encode("utf-8").hex() if token == "é" else token
    for method, what in (("GET", ""), ("GET", "page.js"), ("POST", "ask"), ("POST", "finish")):
        status, _, content = browser.request(what, {"who": "eve"}, method=method)
        assert status == 403
        assert b"prompt" not in content


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_foreign_name_in_the_host_header_is_refused(served, host: str) -> None:
    _, browser, _ = served()
    assert browser.request("ask", {"who": "eve"}, Host=host)[0] == 403
    assert browser.request("ask", {"who": "ada"}, Host="localhost:1234")[0] == 200


def test_which_host_names_are_ours() -> None:
    assert all(ours(h) for h in ("127.0.0.1:80", "localhost", "[::1]:80", "::1", "10.0.0.7:1"))
    assert ours("Lab.example:80", "lab.example")
    assert not any(ours(h) for h in ("", "localhost.evil", "127.0.0.1.nip.io:80", "x@127.0.0.1"))


def test_what_the_page_may_do_and_texts_are_json_only(served) -> None:
    _labeller, browser, _ = served()
    status, headers, page = browser.request("", method="GET")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["referrer-policy"] == "no-referrer"
    assert b"prompt 0" not in page
    assert b"<script>" not in page
    assert b"http" not in page
    script = browser.request("page.js", method="GET")[2]
    for way in (b"innerHTML", b"insertAdjacentHTML", b"outerHTML", b"document.write", b"eval("):
        assert way not in script
    headers = browser.request("ask", {"who": "ada"})[1]
    assert headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("what", "body", "status"),
    [
        ("ask", {}, 400),
        ("ask", {"who": "  "}, 400),
        ("ask", {"who": "x" * 200}, 400),
        ("ask", ["who"], 400),
        ("ask", {"who": "ada", "more": "x" * 20_000}, 400),
        ("label", {"who": "ada", "key": "k", "id": "i"}, 400),
        ("nothing", {"who": "ada"}, 404),
        ("../page.py", {"who": "ada"}, 404),
    ],
)
def test_malformed_requests_are_refused_and_the_round_goes_on(served, what, body, status) -> None:
    labeller, browser, _ = served()
    assert browser.request(what, body)[0] == status
    state = browser.post("ask")
    wrong = {"who": "ada", "key": state["pairs"][0]["key"], "id": "i", "choice": "best"}
    assert browser.request("label", wrong)[0] == 400
    form = {"Content-Type": "text/plain"}  # which a foreign page may send unasked
    assert browser.request("ask", {"who": "ada"}, **form)[0] == 400
    assert not labeller.desk.store.labels
    assert state["asking"]


def test_a_page_that_is_dropped_stops_its_server(tmp_path: Path) -> None:
    page = Page(grace=0.0)
    desk = Desk(Store(tmp_path / "person.jsonl"))
    desk.finish()
    page(desk)
    browser = Browser(page.url or "")
    assert browser.request("", method="GET")[0] == 200
    del page
    with pytest.raises(ConnectionError):
        browser.request("", method="GET")
