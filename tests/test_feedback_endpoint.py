"""A judge behind HTTP: one that answers well, badly, late, not now, and not at all."""

import hashlib
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from judge_standin import KEY, Answer, Server, said
from runs import inside, logged, says, the_error, timeless

from rlhf_exp.feedback import Provider
from rlhf_exp.feedback.endpoint import OpenAI
from rlhf_exp.feedback.tasks import Categories
from rlhf_exp.web import retry_after
from rlhf_exp.worker import resume

pytest_plugins = ["runs_fixtures", "judge_fixtures"]

NAMES = ["Good", "Bad"]


def judge(server: Server, **settings: Any) -> OpenAI:
    defaults = {"model": "m", "base_url": server.url, "key_variable": "TEST_KEY", "backoff": 0.01}
    return OpenAI(**(defaults | settings))


def provider(directory: Path, asked: OpenAI, tries: int = 5) -> Provider:
    task = Categories(names=NAMES, instruction="Choose.")
    made = Provider(task=task, judge=asked, tries=tries)
    made.load("cpu")
    made.open(directory)
    return made


def ask(made: Provider, texts: list[str]) -> list[str | None]:
    return [f and f.text for f in made([""] * len(texts), texts)]


# ------------------------------------------------------------------------------------------- well


def test_replies_come_back_in_order_from_a_few_requests_at_a_time(server, tmp_path) -> None:
    def slower_first(text: str, number: int) -> Answer:
        time.sleep(0.03 if number < 4 else 0.005)
        return said("Bad" if int(text) % 3 else " good.\n")

    server.answer = slower_first
    made = provider(tmp_path, judge(server, concurrency=4))
    texts = [str(i) for i in range(24)]
    assert ask(made, texts) == ["Bad" if i % 3 else "Good" for i in range(24)]
    assert 2 <= server.busiest <= 4
    assert len(server.requests) == 24


def test_request_is_a_chat_completion(server, tmp_path) -> None:
    made = provider(tmp_path, judge(server, body={"seed": 7, "max_tokens": None, "n_tokens": 9}))
    assert ask(made, ["fine"]) == ["Good"]
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == f"Bearer {KEY}"
    message = made.task.question("", "fine").messages[0][1]
    expected = {"model": "m", "temperature": 0.0, "seed": 7, "n_tokens": 9}
    assert request["body"] == expected | {"messages": [{"role": "user", "content": message}]}


def test_key_may_be_absent_and_is_never_written(server, tmp_path) -> None:
    server.answer = lambda text, number: (400, {}, f"bad key {KEY}")
    made = provider(tmp_path, judge(server, patience=1))
    with pytest.raises(ConnectionError) as caught:
        ask(made, ["a"])
    assert "bad key ***" in str(caught.value)
    server.answer = lambda text, number: said("Good")
    ask(made, ["a"])
    assert KEY not in "".join(p.read_text() for p in tmp_path.iterdir())
    assert KEY not in f"{made!r} {made.judge.identity()}"
    open_to_all = provider(tmp_path / "other", judge(server, key_variable=None))
    assert ask(open_to_all, ["b"]) == ["Good"]
    assert "Authorization" not in server.requests[-1]["headers"]


def test_no_more_requests_than_allowed_per_minute(server, tmp_path) -> None:
    made = provider(tmp_path, judge(server, per_minute=1200, concurrency=8))
    ask(made, list("abcdef"))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 5
    assert server.times[-1] - server.times[0] >= 0.05 * 5 - 0.03
    assert sum(gap > 0.02 for gap in gaps) >= 4, gaps


# ------------------------------------------------------------------------------------------ badly


def test_malformed_replies_are_asked_for_again_and_warmer(server, tmp_path) -> None:
    temperatures: dict[str, list[float]] = {"stays": [], "mends": []}

    def answer(text: str, number: int) -> Answer:
        seen = temperatures[text]
        seen.append(server.requests[number - 1]["body"]["temperature"])
        return said("Bad" if text == "mends" and len(seen) == 3 else "I like it")

    server.answer = answer
    made = provider(tmp_path, judge(server, concurrency=1))
    assert ask(made, ["stays", "mends"]) == [None, "Bad"]
    assert temperatures == {"stays": [0.0, 0.7, 0.7, 0.7, 0.7], "mends": [0.0, 0.7, 0.7]}
    assert made.counts == {"asked": 8, "cached": 0, "malformed": 1, "failed": 0, "retried": 6}
    again = provider(tmp_path, judge(server, concurrency=1))
    assert ask(again, ["stays", "mends"]) == [None, "Bad"]
    assert len(server.requests) == 8


@pytest.mark.parametrize(
    "nonsense",
    [(200, {}, "<html>hello</html>"), (200, {}, "[]"), (200, {}, '{"choices": []}'), (200, {}, "")],
)
def test_nonsense_is_a_failed_request(nonsense: Answer, server, tmp_path) -> None:
    server.answer = lambda text, number: nonsense if number < 3 else said("Bad")
    made = provider(tmp_path, judge(server))
    assert ask(made, ["a"]) == ["Bad"]
    assert made.counts == {"asked": 1, "cached": 0, "malformed": 0, "failed": 0, "retried": 2}


def test_a_refusal_to_say_anything_is_malformed(server, tmp_path) -> None:
    server.answer = lambda text, number: said(None)
    made = provider(tmp_path, judge(server), tries=2)
    assert ask(made, ["a"]) == [None]
    assert made.counts == {"asked": 2, "cached": 0, "malformed": 1, "failed": 0, "retried": 1}


def test_back_off_sleeps_twice_as_long_each_time(server, tmp_path) -> None:
    """The authors' code computes the delay and never sleeps."""
    server.answer = lambda text, number: (500, {}, "") if number < 4 else said("Good")
    made = provider(tmp_path, judge(server, backoff=0.05))
    assert ask(made, ["a"]) == ["Good"]
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert len(gaps) == 3
    for gap, wait in zip(gaps, (0.05, 0.1, 0.2), strict=True):
        assert wait <= gap < wait + 0.2
    assert made.counts["retried"] == 3


def test_retry_after_is_honored_by_all(server, tmp_path) -> None:
    server.answer = lambda text, number: (
        (429, {"Retry-After": "0.4"}, "slow down") if number == 1 else said("Good")
    )
    made = provider(tmp_path, judge(server, concurrency=1))
    assert ask(made, ["a", "b", "c"]) == ["Good"] * 3
    assert server.times[1] - server.times[0] >= 0.4
    assert made.counts["retried"] == 1


def test_retry_after_reads_seconds_and_dates() -> None:
    assert retry_after("2.5") == 2.5
    assert 28 < retry_after(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert retry_after(formatdate(time.time() - 30, usegmt=True)) == 0.0
    assert [retry_after(x) for x in (None, "", "soon", "-3")] == [0.0] * 4


def test_who_asks_for_too_much_patience_is_not_waited_for(server, tmp_path) -> None:
    server.answer = lambda text, number: (
        (429, {"Retry-After": "3600"}, "") if text == "a" else said("Good")
    )
    started = time.monotonic()
    assert ask(provider(tmp_path, judge(server)), ["a", "b"]) == [None, "Good"]
    assert time.monotonic() - started < 2
    assert len(server.requests) == 2


def test_one_question_that_is_refused_is_dropped_alone(server, tmp_path) -> None:
    server.answer = lambda text, number: (400, {}, "too long") if text == "b" else said("Good")
    made = provider(tmp_path, judge(server, concurrency=1))
    assert ask(made, ["a", "b", "c"]) == ["Good", None, "Good"]
    assert made.counts == {"asked": 3, "cached": 0, "malformed": 0, "failed": 1, "retried": 0}
    assert len(server.requests) == 3


# ------------------------------------------------------------------------------------- not at all


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refused_key_or_address_ends_it_at_once(status: int, server, tmp_path) -> None:
    """And no redirect is followed: it would take the key elsewhere."""
    server.answer = lambda text, number: (status, {"Location": server.url + "/elsewhere"}, "no")
    made = provider(tmp_path, judge(server, concurrency=1))
    with pytest.raises(ConnectionError, match=rf"refuses to answer \({status} .*judge\.model=m"):
        ask(made, list("abcdef"))
    assert len(server.requests) == 1


def test_a_judge_that_goes_down_ends_the_call_and_the_next_run_goes_on(server, tmp_path) -> None:
    """After `patience` questions in a row; the authors' code loops forever. Nothing answered is
    lost, and feedback stays with its completion.
    """
    texts = [str(i) for i in range(30)]
    server.answer = lambda text, number: (
        said("Bad" if int(text) % 2 else "Good") if number <= 10 else (503, {}, "asleep")
    )
    made = provider(tmp_path, judge(server, concurrency=2, requests=2, patience=3))
    with pytest.raises(ConnectionError, match=r"does not answer \(503 .*asleep\): see to the serv"):
        ask(made, texts)
    kept = (tmp_path / "feedback.jsonl").read_text().splitlines()
    assert len(kept) == 10
    assert len(server.requests) <= 10 + 2 * (3 + 2)
    server.answer = lambda text, number: said("Bad" if int(text) % 2 else "Good")
    before = len(server.requests)
    resumed = provider(tmp_path, judge(server))
    assert ask(resumed, texts) == ["Bad" if i % 2 else "Good" for i in range(30)]
    assert len(server.requests) - before == 20
    assert ask(made, texts[:1]) == ["Good"], "the same provider goes on too"


def test_a_server_that_is_gone_is_noticed_within_seconds(server, tmp_path) -> None:
    made = provider(tmp_path, judge(server, requests=3))
    server.close()
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"does not answer \(.*refused"):
        ask(made, list("abcdef"))
    with pytest.raises(ConnectionError, match=r"does not answer \(.*refused"):
        judge(server).check()
    assert time.monotonic() - started < 3


def test_a_server_that_never_answers_is_timed_out(server, tmp_path) -> None:
    gate = threading.Event()

    def hang(text: str, number: int) -> Answer:
        gate.wait(5)
        return said("Good")

    server.answer = hang
    made = provider(tmp_path, judge(server, timeout=0.05, requests=2, patience=1))
    with pytest.raises(ConnectionError, match="timed out"):
        ask(made, ["a"])
    gate.set()
    assert made.counts["retried"] == 1


def test_failures_far_apart_are_no_outage(server, tmp_path) -> None:
    server.answer = lambda text, number: (400, {}, "") if number % 3 else said("Good")
    made = provider(tmp_path, judge(server, concurrency=1, patience=3))
    assert ask(made, list("abcdef")) == [None, None, "Good"] * 2
    assert made.counts["failed"] == 4


# ----------------------------------------------------------------------------------- before a run


@pytest.mark.parametrize("status", [200, 404, 429])
def test_check_asks_the_server_once(status: int, server) -> None:
    server.answer = lambda text, number: (status, {}, "{}")
    judge(server).check()
    assert [r["path"] for r in server.requests] == ["/v1/models"]


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses to answer"), (403, "refuses"), (502, "does not answer")]
)
def test_check_refuses_a_wrong_key_or_a_dead_server(status: int, message: str, server) -> None:
    server.answer = lambda text, number: (status, {}, "no")
    with pytest.raises(ConnectionError, match=rf"{message}.* \({status} "):
        judge(server).check()


def test_check_wants_the_key(server, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "  ", "two\nlines", "schlüssel"):
        monkeypatch.setenv("TEST_KEY", value)
        with pytest.raises(ValueError, match=r"judge\.key_variable=TEST_KEY: .* holds no key") as e:
            judge(server).check()
        assert not value.strip() or value not in str(e.value)
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(ValueError, match=r"export it, or set judge\.key_variable=null"):
        judge(server).check()
    assert server.requests == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, r"judge\.base_url must be http\(s\)://host/path"),
        ({"base_url": "file:///etc/passwd"}, r"judge\.base_url must be http"),
        ({"base_url": "https://me:secret@host/v1"}, "without a user or password"),
        ({"key_variable": "sk-very-secret"}, "must be the name of an environment variable"),
        ({"concurrency": 0}, r"judge\.concurrency=0 must be positive"),
        ({"patience": 0}, r"judge\.patience=0"),
        ({"per_minute": 0.0}, r"judge\.per_minute=0"),
        ({"backoff": -1.0}, r"judge\.backoff=-1"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        OpenAI(**({"model": "m"} | settings))
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------------------------- in a run


def asking(server: Server, **settings: Any) -> list[str]:
    """The options that have a run ask `server`."""
    wanted = {"model": "m", "base_url": server.url, "key_variable": "TEST_KEY", "backoff": 0.01}
    judged = [f"algo.labels.feedback.judge.{k}={v}" for k, v in (wanted | settings).items()]
    return ["algo=alt_lmc", "feedback@algo.labels.feedback=openai", *judged]


def test_run_without_a_key_is_refused_before_anything_is_made(server, refused) -> None:
    sentence = refused(*asking(server, key_variable="NO_SUCH_KEY"))
    says(sentence, "judge.key_variable=NO_SUCH_KEY", "export it")


def test_run_without_a_server_is_refused_before_anything_is_made(server, refused) -> None:
    server.close()
    says(refused(*asking(server)), f"judge.base_url={server.url}", "refused", "see to the server")


@pytest.mark.slow
def test_a_run_that_lost_its_judge_resumes_to_the_same_bytes(
    server, artifacts, tmp_path, capsys
) -> None:
    names = ["Harmless and very helpful", "Harmless and helpful", "Harmless and not helpful"]
    lives = 10**6

    def answer(text: str, number: int) -> Answer:
        if number > lives:
            return 503, {}, "asleep"
        place = hashlib.sha256(text.encode()).digest()[0] % 5
        return said([*names, "Harmful", "hm"][place])

    server.answer = answer
    options = ["experiment=debug", *asking(server), f"artifacts={artifacts}", "algo.steps=4"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert inside(whole, *options, "checkpoints.every=1") == 0
    asked = len(server.requests)  # once for the list of models
    server.requests.clear()
    lives = asked * 2 // 3
    capsys.readouterr()
    assert inside(cut, *options, "checkpoints.every=1") == 1
    says(the_error(capsys.readouterr().err), "503 Service Unavailable asleep", "are kept")
    assert len((cut / "feedback.jsonl").read_text().splitlines()) == lives - 1
    lives = 10**6
    server.requests.clear()
    assert logged(lambda: resume(cut)) == 0
    assert len(server.requests) - 1 == asked - asked * 2 // 3, "nothing is asked twice"
    assert weights(cut) == weights(whole)
    assert told(cut) == told(whole)
    assert sum(row.get("feedback/malformed", 0) for row in told(whole)) > 0
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def weights(directory: Path) -> str:
    return hashlib.sha256((directory / "policy" / "model.safetensors").read_bytes()).hexdigest()


def told(directory: Path) -> list[dict[str, Any]]:
    """The metrics but for what was asked of whom, which an interruption does change."""
    other = ("feedback/asked", "feedback/cached", "feedback/retried")
    rows = timeless(directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in other} for row in rows]
