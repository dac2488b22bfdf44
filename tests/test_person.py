"""People as labellers: what is stored, who is asked what, terminal and files."""

import contextlib
import json
import math
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp import processes, signals
from rlhf_exp.labellers.noisy import Noisy
from rlhf_exp.labellers.person import Person
from rlhf_exp.labellers.person.agreement import summary
from rlhf_exp.labellers.person.desk import Closed, Desk, shown
from rlhf_exp.labellers.person.files import Files
from rlhf_exp.labellers.person.store import Label, Store, combined, key_of
from rlhf_exp.labellers.person.terminal import Terminal, plain
from rlhf_exp.preferences import Preferences
from tests.people import ROWS, person, wait_for
from tests.runs import REPOSITORY, environment
from tests.test_preferences import DATA, Dice


@pytest.fixture(autouse=True)
def _no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "received", [])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "person.jsonl")


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def label(
    number: int = 0, choice: float | None = 1.0, who: str = "ada", id: str | None = None, **changes
) -> Label:
    """What `who` said of the pair `number`, of which `one` was on the left."""
    key = key_of(*ROWS[number])
    id = id or f"{number} {who} {choice}"
    prompt, left, right = ROWS[number]
    about = {"prompt": prompt, "left": left, "right": right, "seconds": 2.0, "when": "now"}
    return Label(**({"id": id, "key": key, "who": who, "probability": choice} | about | changes))


def turned(given: Label) -> Label:
    """The same opinion of somebody who saw the texts the other way round."""
    assert given.probability is not None
    return replace(
        given, left=given.right, right=given.left, probability=1 - given.probability, id="turned"
    )


def say(desk: Desk, number: int, better: str, who: str = "ada", id: str = "") -> bool:
    """Let `who` prefer `better`, one of the texts of the pair."""
    question = shown(ROWS[number], who)
    choice = {question.left: "left", question.right: "right"}.get(better, better)
    return desk.label(question, choice, who=who, id=id or f"{number} {better} {who}")


# ------------------------------------------------------------------------------------------- store


def test_a_pair_is_found_by_its_content_whichever_text_comes_first() -> None:
    assert key_of("p", "a", "b") == key_of("p", "b", "a")
    assert len({key_of("p", "a", "b"), key_of("p", "ab", ""), key_of("pa", "", "b")}) == 3


def test_labels_are_on_the_disk_and_found_again(store: Store) -> None:
    assert store.add(label(0, 1.0))
    assert store.add(label(1, None))
    found = Store(store.ledger.path)
    assert found.of(key_of(*ROWS[0])) == [label(0, 1.0)]
    assert found.of(key_of(*ROWS[1])) == [label(1, None)]
    row = json.loads(store.ledger.path.read_text().splitlines()[0])
    assert row == vars(label(0, 1.0))


def test_the_same_decision_sent_twice_counts_once(store: Store) -> None:
    assert store.add(label(0, 1.0, id="x"))
    assert not store.add(label(0, 0.0, id="x"))
    assert not Store(store.ledger.path).add(label(0, 1.0, id="x"))
    assert len(store.ledger.path.read_text().splitlines()) == 1


def test_two_runs_share_a_file(store: Store) -> None:
    other = Store(store.ledger.path)
    store.add(label(0))
    assert not other.add(label(0))
    other.add(label(1))
    store.add(label(2))
    assert [len(store.of(key_of(*ROWS[i]))) for i in range(4)] == [1, 1, 1, 0]
    assert not other.of(key_of(*ROWS[2]))
    other.refresh()
    assert len(other.of(key_of(*ROWS[2]))) == 1


def test_a_label_taken_back_holds_no_longer_and_nothing_is_rewritten(store: Store) -> None:
    store.add(label(0, 1.0))
    before = store.ledger.path.read_text()
    assert store.take_back(label(0, 1.0), id="u")
    assert not store.take_back(label(0, 1.0), id="u")
    assert store.ledger.path.read_text().startswith(before)
    assert len(store.ledger.path.read_text().splitlines()) == 2
    assert store.of(label(0).key) == Store(store.ledger.path).of(label(0).key) == []


def test_half_a_line_is_dropped_and_the_next_label_starts_a_new_one(store: Store) -> None:
    store.add(label(0))
    with store.ledger.path.open("ab") as file:
        file.write(b'{"id": "half", "key"')
    found = Store(store.ledger.path)
    found.add(label(1))
    assert [json.loads(x)["id"] for x in store.ledger.path.read_text().splitlines()] == [
        label(0).id, label(1).id,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("nonsense", "Expecting value"),
        ("[]", "not a label"),
        ('{"id": "a"}', "missing"),
        (json.dumps(vars(label()) | {"probability": 1.5}), "1.5 is not between 0 and 1"),
        (json.dumps(vars(label()) | {"seconds": -1}), "-1 are no length of time"),
        (json.dumps(vars(label()) | {"prompt": "another"}), "key is not that of its texts"),
        (json.dumps(vars(label()) | {"who": " "}), "not empty"),
        (json.dumps(vars(label()) | {"surprise": 1}), "surprise"),
        (json.dumps({"id": "u", "undo": "never given", "who": "ada"}), "never given"),
    ],
)
def test_a_row_that_is_no_label_is_named_with_its_line(store: Store, line: str, why: str) -> None:
    store.add(label(0, id="first"))
    with store.ledger.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(
        ValueError, match=r"person\.jsonl, line 2: not a label .*labeller\.file"
    ) as e:
        Store(store.ledger.path)
    assert why in str(e.value)


def test_several_people_are_combined_by_the_mean_of_their_last_labels() -> None:
    one = ROWS[0][1]
    said = [label(0, 0.0), label(0, 1.0), label(0, 1.0, "bob"), label(0, 0.0, "eve")]
    assert combined(said, one) == pytest.approx(2 / 3)  # ada has changed her mind
    assert combined(said, ROWS[0][2]) == pytest.approx(1 / 3)
    assert combined([turned(label(0, 1.0))], one) == 1.0
    assert combined([label(0, None), label(0, 0.5, "bob")], one) == 0.5
    assert math.isnan(combined([label(0, None)], one))
    assert math.isnan(combined([], one))


def test_what_the_labels_tell() -> None:
    pairs = [
        [label(0, 1.0, seconds=1.0), turned(label(0, 1.0, "bob", seconds=3.0))],  # the same
        [label(1, 1.0, seconds=8.0), label(1, 0.0, "bob", seconds=None)],
        [label(2, None), label(2, 0.5, "bob")],
        [label(3, 0.0), label(3, 0.5, id="again")],
    ]
    assert summary(pairs) == {
        "labels": 8,
        "labellers": 2,
        "ties": 2,
        "skips": 1,
        "contradictions": 2,  # of two people, and of one who changed her mind
        "agreement": 0.5,  # of the two couples of people who both said something
        "left_chosen": 2 / 5,
        "seconds_per_label": 2.0,
        "labels_by/ada": 5,
        "labels_by/bob": 3,
    }
    assert summary([[]]) == {}


KILLED = """
import sys
from pathlib import Path
from rlhf_exp.labellers.person.desk import Desk
from rlhf_exp.labellers.person.store import Store
desk = Desk(Store(Path(sys.argv[1])))
desk.ask([(f"p{i}", "a", "b") for i in range(2000)])
while True:
    (question,) = desk.take("ada")
    desk.label(question, "left", who="ada", id=question.key)
    print(question.key, flush=True)
"""


@pytest.mark.slow
def test_kill_9_while_labels_come_in_loses_and_doubles_none(tmp_path: Path) -> None:
    file, told = tmp_path / "person.jsonl", []
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(file)],
            stdout=subprocess.PIPE, text=True, env=environment(), cwd=REPOSITORY,
        )  # fmt: skip
        assert process.stdout is not None
        told += [process.stdout.readline().strip() for _ in range(5)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().split()  # what was still in the pipe was told, too
        process.wait()
        process.stdout.close()
    store = Store(file)
    assert len(set(told)) == len(told) >= 10, "a pair was asked again"
    assert set(told) <= set(store.labels)
    assert len(store.labels) - len(told) <= 2  # written, and killed before it was told
    assert len(file.read_text().splitlines()) == len(store.labels)


# -------------------------------------------------------------------------------------------- desk


def test_the_order_of_the_texts_is_drawn_by_pair_and_person() -> None:
    rows = [(f"p {i}", "a", "b") for i in range(200)]
    ada, bob = ([shown(row, who).left for row in rows] for who in ("ada", "bob"))
    assert ada == [shown(row, "ada").left for row in rows]
    assert ada == [shown((p, b, a), "ada").left for p, a, b in rows]
    assert 70 < ada.count("a") < 130
    assert 70 < sum(x == y for x, y in zip(ada, bob, strict=True)) < 130


def test_two_people_get_different_pairs_until_a_lease_is_over(store: Store) -> None:
    clock = Clock()
    desk = Desk(store, lease=60.0, clock=clock)
    desk.ask(ROWS[:3])
    keys = [key_of(*row) for row in ROWS]
    assert [q.key for q in desk.take("ada", 2)] == keys[:2]
    assert [q.key for q in desk.take("bob", 2)] == keys[2:3]
    assert [q.key for q in desk.take("ada", 2)] == keys[:2]  # a reload shows the same
    clock.now += 61.0
    assert [q.key for q in desk.take("ada", 2)] == keys[2:3]  # what she let lie: others first
    assert [q.key for q in desk.take("bob", 2)] == keys[:2]


def test_a_pair_stays_with_whoever_keeps_asking_for_it(store: Store) -> None:
    clock = Clock()
    desk = Desk(store, lease=60.0, clock=clock)
    desk.ask(ROWS[:1])
    for _ in range(60):  # 120 s
        assert desk.take("ada"), "it was taken from under the reader"
        assert not desk.take("bob")
        clock.now += 2.0
    clock.now += 59.0  # she has left
    assert desk.take("bob")
    assert not desk.take("ada")


def test_what_another_run_is_told_is_not_asked_any_more(store: Store) -> None:
    clock, other = Clock(), Store(store.ledger.path)
    desk = Desk(store, clock=clock)
    other.add(label(0))
    assert desk.ask(ROWS[:2]) == 1
    other.add(label(1))
    assert not desk.wait(0.0)  # it has just looked
    clock.now += 2.0
    assert desk.wait(0.0)
    assert not desk.open


def test_a_pair_may_be_for_several_people(store: Store) -> None:
    desk = Desk(store, labels_per_pair=2)
    desk.ask(ROWS[:1])
    assert desk.take("ada")
    assert desk.take("bob")
    assert not desk.take("eve")
    say(desk, 0, "one 0", "ada")
    assert not desk.take("ada"), "nobody labels a pair twice"
    assert len(desk.open) == 1
    say(desk, 0, "other 0", "bob")
    assert desk.wait(0.0)
    assert combined(store.of(key_of(*ROWS[0])), "one 0") == 0.5


def test_only_what_is_not_answered_is_asked(store: Store) -> None:
    store.add(label(0))
    store.add(turned(label(1)))
    desk = Desk(store)
    assert desk.ask(ROWS[:4]) == 2
    assert [q.prompt for q in desk.take("bob", 9)] == ["prompt 2", "prompt 3"]
    assert desk.ask(ROWS[:2]) == 0
    assert desk.wait(0.0)
    assert not desk.take("bob")


def test_undo_takes_the_last_label_back_and_asks_again(store: Store) -> None:
    desk = Desk(store)
    desk.ask(ROWS)
    for number in range(2):
        say(desk, number, f"one {number}")
    say(desk, 2, "one 2", "bob")
    assert desk.undo(who="ada", id="u") == key_of(*ROWS[1])
    assert desk.undo(who="ada", id="u") is None, "a repeated request takes nothing more back"
    assert desk.take("ada")[0].key == key_of(*ROWS[1])
    assert desk.undo(who="eve", id="v") is None
    assert desk.undo(who="ada", id="w") == key_of(*ROWS[0])
    assert len(desk.open) == 5


def test_the_last_label_of_a_round_can_be_taken_back_for_a_while(store: Store) -> None:
    clock = Clock()
    desk = Desk(store, clock=clock)
    desk.ask(ROWS[:1])
    say(desk, 0, "one 0")
    assert not desk.wait(0.0, grace=3.0)
    assert desk.undo(who="ada", id="u")
    clock.now += 10.0
    assert not desk.wait(0.0, grace=3.0)
    say(desk, 0, "other 0")
    clock.now += 3.0
    assert desk.wait(0.0, grace=3.0)
    with pytest.raises(Closed):
        desk.undo(who="ada", id="too late")


def test_a_label_for_no_pair_of_the_round_is_refused(store: Store) -> None:
    desk = Desk(store)
    desk.ask(ROWS[:1])
    with pytest.raises(Closed):
        say(desk, 3, "one 3")
    with pytest.raises(ValueError, match=r"choice='best' is none of left, right, tie, skip"):
        say(desk, 0, "best")
    assert not store.labels


def test_a_noted_signal_ends_the_waiting(store: Store) -> None:
    desk = Desk(store)
    desk.ask(ROWS)
    signals.received.append(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        desk.wait(0.0)


# ------------------------------------------------------------------------------------------ person


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interface": "pages"}, r"labeller\.interface=pages .* did you mean page"),
        ({"labels_per_pair": 0}, r"labeller\.labels_per_pair=0 must be at least 1"),
        ({"labels_per_pair": 2, "interface": "terminal"}, r"asks one: .*interface=page"),
        ({"port": -1}, r"labeller\.port=-1 must be"),
        ({"port": 65536}, r"labeller\.port=65536"),
        ({"lease": 0}, r"labeller\.lease=0 must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Person(**settings)


def test_what_cannot_work_is_said_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"interface=terminal needs a terminal .*page or files"):
        person(tmp_path, interface="terminal").check()
    (tmp_path / "queue").write_text("")
    with pytest.raises(ValueError, match=r"labeller\.folder=.*queue is a file"):
        person(tmp_path, interface="files").check()
    with pytest.raises(ValueError, match=r"labeller\.host=192\.0\.2\.1 .*cannot be listened on"):
        person(tmp_path, host="192.0.2.1").check()
    (tmp_path / "person.jsonl").write_text("what?\n")
    with pytest.raises(ValueError, match=r"person\.jsonl, line 1"):
        person(tmp_path).check()
    monkeypatch.setattr("rlhf_exp.labellers.person.page.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package starlette: pip install"):
        person(tmp_path).check()


def test_how_labels_are_asked_for_does_not_change_the_artifact(tmp_path: Path) -> None:
    page, files = person(tmp_path, port=81), person(tmp_path, interface="files")
    spec = [vars(p) | p.identity() for p in (page, files)]
    names = ("file", "interface", "labels_per_pair", "folder", "host", "port", "lease")
    assert [spec[0][n] for n in names] == [spec[1][n] for n in names]
    assert spec[0]["file"] == str(tmp_path / "person.jsonl")


def test_of_several_processes_the_main_one_asks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(processes, "main", lambda: False)
    monkeypatch.setattr(processes, "agreed", lambda _: [0.0])  # what the main one was told
    labeller = person(tmp_path)
    labeller.check()
    labeller.open(tmp_path)
    assert labeller(["prompt"], ["one"], ["other"]).tolist() == [0.0]
    assert (labeller.report(), list(tmp_path.iterdir())) == ({}, [])


def answering(keys: str) -> Callable[[], str]:
    """One key after the other."""
    rest = iter(keys)
    return lambda: next(rest)


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A terminal as standard input; gives the side on which keys are typed."""
    typed, theirs = pty.openpty()
    with os.fdopen(theirs, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield typed
    os.close(typed)


def test_typed_keys_label_in_the_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    with terminal(monkeypatch) as typed:
        labeller = person(tmp_path, interface="terminal")
        labeller.check()
        labeller.open(tmp_path)
        keys = b"1?2u0s"  # ? means nothing; 2 is taken back

        def write() -> None:  # what was typed before something is shown does not count
            wait_for(lambda: labeller.desk and labeller.desk.in_hand)
            time.sleep(0.1)
            os.write(typed, keys)

        threading.Thread(target=write).start()
        said = labeller(*map(list, zip(*ROWS[:3], strict=True)))
    shown_first = shown(ROWS[0], labeller_name()).left
    assert said[0] == (1.0 if shown_first == "one 0" else 0.0)
    assert said[1] == 0.5
    assert math.isnan(said[2])
    report = labeller.report()
    assert (report["labels"], report["ties"], report["skips"]) == (3, 1, 1)
    assert "pair 1 of 3" in capsys.readouterr().out


def test_a_signal_ends_the_waiting_for_a_key(store: Store, monkeypatch) -> None:
    desk = Desk(store)
    desk.ask(ROWS[:1])
    with terminal(monkeypatch) as typed:

        def stop() -> None:  # a handler that only notes it, as while a policy trains
            wait_for(lambda: desk.in_hand)
            signals.received.append(signal.SIGTERM)

        threading.Thread(target=stop).start()
        late = threading.Timer(5.0, os.write, [typed, b"1"])  # so that a failure does not hang
        late.start()
        with pytest.raises(KeyboardInterrupt):
            Terminal()(desk)
        late.cancel()
    assert not store.labels


def test_a_pair_that_another_run_is_told_leaves_the_terminal(store: Store, monkeypatch) -> None:
    clock = Clock()
    desk = Desk(store, clock=clock)
    desk.ask(ROWS[:1])

    looks = iter([""])

    def nothing_yet() -> str:
        Store(store.ledger.path).add(label(0))
        clock.now += 2.0
        return next(looks)

    with terminal(monkeypatch):
        Terminal(nothing_yet)(desk)
    assert len(store.labels) == 1


def labeller_name() -> str:
    import getpass

    return getpass.getuser()


def test_q_finishes_and_the_rest_cannot_be_said(store: Store, monkeypatch) -> None:
    desk = Desk(store)
    desk.ask(ROWS)
    with terminal(monkeypatch):
        Terminal(answering("1q"))(desk)
    assert (len(store.labels), desk.finished) == (1, True)
    assert desk.ask(ROWS) == 0


def test_a_completion_does_not_steer_the_terminal() -> None:
    assert plain("a\x1b[2Jb\r\nc\u202e") == "a\\x1b[2Jb\\r\nc\\u202e"
    assert plain("naïve 😀 …") == "naïve 😀 …"


def test_pairs_that_a_person_finished_early_are_shared_out(tmp_path: Path, caplog) -> None:
    class Hurried(Person):
        """Says something of eight pairs, then no more."""

        def _labels(self, rows: Any) -> list[float]:
            assert self.desk is not None
            self.desk.finish()
            return [1.0] * 8 + [float("nan")] * (len(rows) - 8)

    labeller = Hurried(file=str(tmp_path / "person.jsonl"))
    labeller.open(tmp_path)
    settings = Preferences(pairs=30, evaluation_pairs=10, noise_rate=0.0)
    folder = tmp_path / "pairs"
    folder.mkdir()
    settings.make(folder, DATA, Dice(10**6), Noisy(labeller=labeller, rate=0.0))  # type: ignore[arg-type]
    counts = [
        len((folder / f"{n}.jsonl").read_text().splitlines()) for n in ("train", "evaluation")
    ]
    assert counts == [6, 2]


# ------------------------------------------------------------------------------------------- files


def test_answers_of_another_tool_are_read(tmp_path: Path, caplog, monkeypatch) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("rlhf_exp"), "propagate", True)
    labeller = person(tmp_path, interface="files")
    labeller.check()
    labeller.open(tmp_path)
    labeller.ask.poll = 0.05
    folder, said = tmp_path / "queue", []
    asked = [list(column) for column in zip(*ROWS[:3], strict=True)]
    thread = threading.Thread(target=lambda: said.append(labeller(*asked)))
    thread.start()
    queue = wait_for(
        lambda: [json.loads(x) for x in (folder / "queue.jsonl").read_text().split("\n")[:-1]]
    )
    assert [(q["prompt"], {q["left"], q["right"]}) for q in queue] == [
        (p, {a, b}) for p, a, b in ROWS[:3]
    ]
    choice = {q["key"]: "left" if q["left"].startswith("one") else "right" for q in queue}
    rows = [{"key": q["key"], "choice": choice[q["key"]], "who": "lab"} for q in queue]
    wrong = ["{", "[]", '{"key": "x"}', json.dumps(rows[0] | {"key": "unknown"})]
    wrong += [json.dumps(rows[0] | {"choice": "first"}), json.dumps(rows[0] | {"who": 3})]
    (folder / "answers.jsonl").write_text("\n".join([*wrong, json.dumps(rows[0])]) + "\n")
    wait_for(lambda: len((folder / "queue.jsonl").read_text().splitlines()) == 2)
    (folder / "answers-2.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[1:]))
    thread.join(20)
    assert said[0].tolist() == [1.0, 1.0, 1.0]
    for line in range(1, 7):  # the fourth is to a pair that may be asked later
        assert caplog.text.count(f"answers.jsonl, line {line}: no answer") == (line != 4)
    assert labeller.report()["refused_answers"] == 5
    again = person(tmp_path, interface="files")
    again.open(tmp_path)
    assert again(*asked).tolist() == [1.0, 1.0, 1.0], "nothing is asked twice"
    assert len((tmp_path / "person.jsonl").read_text().splitlines()) == 3


def test_answers_replaced_by_others_count_as_a_change_of_mind(store: Store, tmp_path: Path) -> None:
    desk, files = Desk(store, labels_per_pair=2), Files(tmp_path)
    desk.ask(ROWS[:1])
    for choice in ("left", "right"):
        row = {"key": key_of(*ROWS[0]), "choice": choice, "who": "lab"}
        (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
        files.looked.clear()
        assert files._read(desk)
    right = shown(ROWS[0], "").right
    assert combined(store.of(key_of(*ROWS[0])), right) == 1.0
    assert len(store.labels) == 2


def answer(number: int, **changes: Any) -> str:
    """A row of another tool, which prefers the left text of a pair."""
    return json.dumps({"key": key_of(*ROWS[number]), "choice": "left", "who": "lab"} | changes)


def test_an_answer_to_a_later_pair_waits_for_its_round(store: Store, tmp_path: Path) -> None:
    desk, files = Desk(store), Files(tmp_path, poll=0.05)
    (tmp_path / "answers.jsonl").write_text(f"{answer(0)}\n{answer(1)}\n")
    for number in range(2):
        desk.ask(ROWS[number : number + 1])
        late = threading.Timer(5.0, desk.finish)  # so that a failure does not hang
        late.start()
        files(desk)
        late.cancel()
        assert len(store.labels) == number + 1
    assert not files.refused


def test_an_answer_counts_without_the_end_of_its_line(store: Store, tmp_path: Path) -> None:
    desk, files, path = Desk(store), Files(tmp_path), tmp_path / "answers.jsonl"
    desk.ask(ROWS[:2])
    path.write_text(answer(0))
    assert files._read(desk)
    path.write_text(f"{answer(0)}\n{answer(1)[:-1]}")  # the second is still written
    assert not files._read(desk)
    path.write_text(f"{answer(0)}\n{answer(1)}\n")
    assert files._read(desk)
    assert len(store.labels) == 2, "the end of its line has made an answer count again"
    assert not files.refused


def test_pairs_that_another_run_is_told_leave_the_queue(store: Store, tmp_path: Path) -> None:
    clock = Clock()
    desk, files = Desk(store, clock=clock), Files(tmp_path, poll=0.05)
    desk.ask(ROWS[:2])
    thread = threading.Thread(target=lambda: files(desk))
    thread.start()
    queue = tmp_path / "queue.jsonl"
    try:
        wait_for(lambda: len(queue.read_text().splitlines()) == 2)
        Store(store.ledger.path).add(label(0))
        clock.now += 2.0
        wait_for(lambda: len(queue.read_text().splitlines()) == 1)
    finally:
        desk.finish()
        thread.join(10)


def test_runs_do_not_share_a_queue_unless_told_to(tmp_path: Path) -> None:
    for name in ("run", "other", "run"):  # the third goes on with the first
        labeller = Person(file=str(tmp_path / "person.jsonl"), interface="files")
        labeller.check()
        labeller.open(tmp_path / name)
        assert labeller.ask.folder == tmp_path / name / "labels"
    labeller = person(tmp_path, interface="files")
    labeller.open(tmp_path / "run")
    assert labeller.ask.folder == tmp_path / "queue"
