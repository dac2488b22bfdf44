"""The labelling page in a real browser, served by a real command: keys alone do, and texts of
models are inert.
"""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from rlhf_exp.labellers.person import Person
from tests.chromium import PROGRAM, Chromium, chromium
from tests.runs import PATIENCE, command, environment, rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium here: apt-get install chromium"),
]
RUN = (
    "experiment=debug",
    "labeller=person",
    "stages=[sft,preferences]",
    "preferences.pairs=6",
    "preferences.evaluation_pairs=2",
    "preferences.noise_rate=0",
    "hydra.run.dir=run",
    "sft.steps=2",
    "data.demonstrations=200",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def listening() -> None:
    """A shell starts what it sends to the background, such as a test run, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """`python -m rlhf_exp` that waits for people."""

    def __init__(self, cwd: Path, *arguments: str) -> None:
        self.said: list[str] = []
        self.process = subprocess.Popen(
            command(*arguments), cwd=cwd, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=listening,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:  # as they come
                self.said.append(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def url(self) -> str:
        """The address it prints."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"label here: (http\S+)", "".join(self.said)):
                return found[1]
            time.sleep(0.1)
        raise AssertionError("".join(self.said))

    def end(self) -> tuple[int, str]:
        """Exit code, and all that it said."""
        code = self.process.wait(PATIENCE)
        self.reader.join(10)
        return code, "".join(self.said)


def arrive(browser: Chromium, url: str) -> None:
    """Open the page and say who one is, where it asks."""
    browser("Network.clearBrowserCookies")
    browser("Page.navigate", url=url)
    browser.until("location.href.startsWith('http') && document.getElementById('who')?.open")
    browser.write("Ada")
    browser.press("Enter")
    browser.until("!document.getElementById('pair').hidden")


def press_until(browser: Chromium, key: str, expression: str) -> None:
    """Press a key, and wait for what it does."""
    browser.press(key)
    browser.until(expression)


def saved(count: int) -> str:
    return f"state && state.done === {count} && busy === 0"


def test_a_command_is_labelled_by_keys_is_interrupted_and_goes_on(
    browser: Chromium, tmp_path: Path
) -> None:
    with Command(tmp_path, *RUN) as first:
        url = first.url()
        arrive(browser, url)
        asked = browser.js("[...document.querySelectorAll('#pair .text')].map(e => e.textContent)")
        press_until(browser, "1", saved(1))
        press_until(browser, "2", saved(2))
        press_until(browser, "u", saved(1))
        press_until(browser, "1", saved(2))
        press_until(browser, "s", saved(3))
        first.process.send_signal(signal.SIGINT)
        code, said = first.end()
        assert code == 130, said
        assert "interrupted" in said
        browser.until("document.getElementById('what').textContent === 'The run does not answer'")
    labels = rows(tmp_path / "artifacts" / "labels" / "person.jsonl")
    assert [row.get("probability", "undo") for row in labels] == [1.0, 0.0, "undo", 1.0, None]
    assert [labels[0][name] for name in ("prompt", "left", "right")] == asked
    assert labels[0]["who"] == "Ada"
    assert not list((tmp_path / "artifacts" / "preferences").glob("pairs-*"))

    with Command(tmp_path, "resume=run") as second:
        browser("Page.navigate", url=second.url())  # the browser knows who it is
        browser.until("typeof state === 'object' && state?.asked === 8 && state.done === 3")
        for done in range(4, 8):
            press_until(browser, "12"[done % 2], saved(done))
        browser.press("1")
        browser.until("state && state.asked === 1")  # in place of the one that was skipped
        browser.until("!document.getElementById('pair').hidden")
        browser.press("2")
        code, said = second.end()
        assert code == 0, said
    (folder,) = (tmp_path / "artifacts" / "preferences").glob("pairs-*")
    assert [len(rows(folder / f"{name}.jsonl")) for name in ("train", "evaluation")] == [6, 2]
    told = json.loads((folder / "labels.json").read_text())
    assert (told["labels"], told["skips"], told["labels_by/Ada"]) == (9, 1, 9)
    chosen = {pair["chosen"] for pair in rows(folder / "train.jsonl")}
    assert labels[0]["left"] in chosen
    log = (tmp_path / "run" / "run.log").read_text()
    assert "8 of 8 pairs are unlabelled" in log
    assert "5 of 8 pairs are unlabelled" in log
    assert "http" not in log


FITS = "document.documentElement.scrollWidth <= innerWidth"
HOSTILE = "<img src=x onerror=window.hit=1></script><script>window.hit=2</script>"
REVIEW = (
    "It begins quietly, in a kitchen, and never raises its voice. The two leads are patient with "
    "each other and with us; by the last scene, a shared meal, the smallest gesture matters."
)
OTHER = (
    "A beautiful film with a beautiful story. The actors are beautiful and the music is "
    "beautiful. I would recommend this film to everyone who likes beautiful films."
)


def test_texts_of_models_are_inert_and_the_page_fits_every_screen(
    browser: Chromium, tmp_path: Path
) -> None:
    labeller = Person(file=str(tmp_path / "person.jsonl"))
    labeller.open(tmp_path)
    labeller.ask.grace = 0.0
    asked = ["Write a short review of a film about two old friends.", HOSTILE, "third"]
    others = [REVIEW, HOSTILE + "1", "x" * 3000], [OTHER, "javascript:alert(1)\n\n\tb", "y"]
    said: list[list[float]] = []
    thread = threading.Thread(target=lambda: said.append(labeller(asked, *others).tolist()))
    thread.start()
    try:
        while labeller.ask.url is None:
            time.sleep(0.05)
        arrive(browser, labeller.ask.url)
        pictures = Path(os.environ.get("PICTURES", tmp_path))
        for name, size in {
            "light": (1200, 600, False, False),
            "dark": (1200, 600, True, False),
            "phone": (390, 844, False, True),
        }.items():
            browser.look(*size[:2], dark=size[2], phone=size[3])
            browser.picture(pictures / f"{name}.png")
            assert browser.js(FITS), name
        press_until(browser, "0", saved(1))
        assert browser.js("document.getElementById('prompt').textContent") == HOSTILE
        assert browser.js("document.querySelectorAll('main img, main script').length") == 0
        browser.picture(pictures / "toast.png")
        press_until(browser, "s", saved(2))
        assert browser.js(FITS), "a long word breaks"
        assert browser.js("window.hit === undefined")
        browser.press("Tab")
        assert browser.js("document.activeElement.matches(':focus-visible')")
        browser.js("document.getElementById('finish').click()")
        browser.picture(pictures / "finish.png")
        browser.js("document.querySelector('#sure .strong').focus()")
        browser.press("Enter")
        browser.until("document.getElementById('what').textContent === 'Labelling is finished'")
        thread.join(20)
        assert said[0][0] == 0.5
        assert [p == p for p in said[0]] == [True, False, False]
    finally:
        labeller.desk.finish()  # type: ignore[union-attr]
        thread.join(10)
        labeller.ask.close()


def test_no_key_labels_a_pair_that_nobody_has_read(browser: Chromium, tmp_path: Path) -> None:
    labeller = Person(file=str(tmp_path / "person.jsonl"))
    labeller.open(tmp_path)
    asked = [[f"{part} {i}" for i in range(4)] for part in ("prompt", "one", "other")]
    thread = threading.Thread(target=lambda: labeller(*asked))
    thread.start()
    try:
        while labeller.ask.url is None:
            time.sleep(0.05)
        arrive(browser, labeller.ask.url)
        browser.until("busy === 0 && pairs.length === 2")
        replaced = "heard({...state, pairs: [pairs[1]]}); choose('left'); [count, answered.size]"
        assert browser.js(f"{{ {replaced}.join() }}") == "0,0", "the pair was just replaced"
        browser.until("performance.now() > ready")
        press_until(browser, "1", f"{saved(1)} && count === 1 && answered.size === 0")
        browser.js("choose('best')")  # which the run refuses
        browser.until("busy === 0 && count === 1 && answered.size === 0")
        desk = labeller.desk
        assert desk is not None
        key = desk.undo(who="Ada", id="on another page")
        browser.until(f"pairs.some((pair) => pair.key === '{key}')")
    finally:
        labeller.desk.finish()  # type: ignore[union-attr]
        thread.join(10)
        labeller.ask.close()
