"""Preference pairs: who is preferred, what is dropped, and label noise: exact, seeded, stored."""

import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_exp.data.local import read_jsonl
from rlhf_exp.data.rows import Dataset, Pair
from rlhf_exp.labellers import Labeller
from rlhf_exp.labellers.dataset import FromDataset
from rlhf_exp.labellers.gold import Gold
from rlhf_exp.preferences import Preferences, flip_all, flip_randomised_half
from rlhf_exp.rewards import Fitting, Reward
from rlhf_exp.rewards.ensemble import Ensemble

PROMPTS = [f"prompt {i}" for i in range(20)]
DATA: Any = Dataset(prompts=PROMPTS, held_out=["other"])


class Dice:
    """A policy that answers with a number below `sides`, drawn as a model would draw it."""

    def __init__(self, sides: int) -> None:
        self.sides = sides

    def sample(self, prompts: list[str], n: int) -> SimpleNamespace:
        """`n` numbers for each prompt, side by side."""
        drawn = torch.randint(self.sides, (len(prompts) * n,)).tolist()
        return SimpleNamespace(completions=[f"{number} pips" for number in drawn])


class Pips(Reward):
    """A gold reward: the number itself."""

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        return torch.tensor([float(c.split()[0]) for c in completions])


def gold() -> Gold:
    """The gold reward as labeller."""
    labeller = Gold()
    labeller.load(Pips(), "cpu")
    return labeller


def pips(text: str) -> int:
    """What the gold reward reads."""
    return int(text.split()[0])


def made(folder: Path, *, sides: int = 1000, labeller: Any = None, **settings) -> SimpleNamespace:
    """Run the stage into `folder` and read what it wrote."""
    folder.mkdir(exist_ok=True)
    settings = {"pairs": 100, "evaluation_pairs": 50} | settings
    data = settings.pop("data", DATA)
    Preferences(**settings).make(folder, data, Dice(sides), labeller or gold())  # type: ignore[arg-type]
    return SimpleNamespace(
        train=[Pair(**row) for row in read_jsonl(folder / "train.jsonl")],
        evaluation=[Pair(**row) for row in read_jsonl(folder / "evaluation.jsonl")],
        noise=json.loads((folder / "noise.json").read_text()),
    )


def wrong(pairs: list[Pair]) -> list[int]:
    """Indices of the pairs that contradict the gold reward."""
    return [i for i, pair in enumerate(pairs) if pips(pair.chosen) < pips(pair.rejected)]


# ------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("count", "rate", "expected"),
    [(100, 0.25, 25), (10, 0.0, 0), (10, 1.0, 10), (7, 0.25, 2), (3, 0.1, 0), (1, 0.6, 1)],
)
def test_flip_is_exact(count: int, rate: float, expected: int) -> None:
    for seed in range(5):
        flipped = flip_all(count, rate, random.Random(seed))
        assert len(flipped) == len(set(flipped)) == expected
        assert all(0 <= i < count for i in flipped)


@pytest.mark.parametrize("scheme", [flip_all, flip_randomised_half])
def test_noise_is_reproducible_and_differs_by_seed(scheme) -> None:
    first, again, other = (scheme(1000, 0.25, random.Random(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.5])
def test_randomise_half_is_wrong_at_the_rate_on_average(rate: float) -> None:
    counts = [len(flip_randomised_half(200, rate, random.Random(s))) for s in range(200)]
    deviation = (200 * 2 * rate * 0.25) ** 0.5  # of one draw: coin flips on a share 2 * rate
    assert abs(sum(counts) / len(counts) - 200 * rate) <= 4 * deviation / len(counts) ** 0.5
    assert max(counts) <= round(400 * rate)
    if rate:
        assert len(set(counts)) > 1, "the share is random, unlike that of flip"


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_written_pairs_are_wrong_exactly_where_noise_says(tmp_path: Path, rate: float) -> None:
    result = made(tmp_path, noise_rate=rate)
    assert (len(result.train), len(result.evaluation)) == (100, 50)
    assert wrong(result.train) == result.noise["flipped"]
    assert len(result.noise["flipped"]) == round(rate * 100)
    assert wrong(result.evaluation) == [], "evaluation pairs stay clean"


def test_noise_leaves_the_texts_alone(tmp_path: Path) -> None:
    clean = made(tmp_path / "clean", noise_rate=0.0)
    noisy = made(tmp_path / "noisy", noise_rate=0.3)
    for i, (a, b) in enumerate(zip(clean.train, noisy.train, strict=True)):
        flipped = Pair(a.prompt, a.rejected, a.chosen)
        assert b == (flipped if i in noisy.noise["flipped"] else a)
    assert clean.evaluation == noisy.evaluation


def test_randomise_half_in_the_stage(tmp_path: Path) -> None:
    result = made(tmp_path, noise_rate=0.25, noise_scheme="randomise_half")
    assert wrong(result.train) == result.noise["flipped"]
    assert 5 < len(result.noise["flipped"]) < 45
    assert wrong(result.evaluation) == []


def test_same_seed_same_pairs_whatever_happened_before(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = made(tmp_path / "a", seed=5)
    torch.manual_seed(2)
    again = made(tmp_path / "b", seed=5)
    other = made(tmp_path / "c", seed=6)
    assert vars(first) == vars(again)
    assert first.train != other.train
    for name in ("train.jsonl", "evaluation.jsonl", "noise.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_sampling_pairs_does_not_disturb_the_generator(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    made(tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_members_of_an_ensemble_see_the_same_noisy_pairs(tmp_path: Path) -> None:
    from dataclasses import dataclass

    seen: list[tuple[int, bytes]] = []

    @dataclass(kw_only=True)
    class Member(Reward):
        seed: int = 3

        def fit(self, fitting: Fitting) -> None:
            seen.append((self.seed, (fitting.pairs() / "train.jsonl").read_bytes()))

    made(tmp_path)
    fitting: Any = SimpleNamespace(pairs=lambda: tmp_path)
    Ensemble(member=Member(), size=3).fit(fitting)
    assert [seed for seed, _ in seen] == [3, 4, 5]
    assert len({content for _, content in seen}) == 1


# ----------------------------------------------------------------------------- what becomes a pair


def test_equal_texts_and_ties_are_dropped_and_counted(tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("rlhf_exp"), "propagate", True)
    caplog.set_level(logging.INFO, "rlhf_exp")
    result = made(tmp_path, sides=2, noise_rate=0.0)
    assert {pair.chosen for pair in result.train} == {"1 pips"}
    assert {pair.rejected for pair in result.train} == {"0 pips"}
    assert result.noise["dropped"] > 0
    assert f"{result.noise['dropped']} sampled pairs dropped" in caplog.text


def test_different_texts_of_one_score_are_a_tie(tmp_path: Path) -> None:
    class Constant(Pips):
        def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
            return torch.ones(len(completions))

    labeller = Gold()
    labeller.load(Constant(), "cpu")
    with pytest.raises(ValueError, match=r"only 0 of 150 preference pairs survived.*ties"):
        made(tmp_path, labeller=labeller)


def test_no_surviving_pair_is_an_error_that_tells_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"only 0 of 150 .*policy.temperature"):
        made(tmp_path, sides=1)
    assert list(tmp_path.iterdir()) == []


def test_labeller_that_cannot_say_drops_the_pair(tmp_path: Path) -> None:
    class Unsure(Labeller):
        def __call__(self, prompts, left, right) -> Tensor:
            sure = torch.tensor([pips(a) % 2 == 0 for a in left])
            return torch.where(sure, gold()(prompts, left, right), torch.nan)

    result = made(tmp_path, labeller=Unsure(), noise_rate=0.0)
    assert wrong(result.train) == []
    assert result.noise["dropped"] > 0
    assert all(pips(p.chosen) % 2 == 0 or pips(p.rejected) % 2 == 0 for p in result.train)


def test_gold_labeller_prefers_the_higher_score() -> None:
    said = gold()(["p"] * 3, ["2 pips", "1 pips", "3 pips"], ["1 pips", "1 pips", "4 pips"])
    assert said.tolist() == [1.0, 0.5, 0.0]


# ------------------------------------------------------------------------------- pairs of the data


def own_pairs() -> Dataset:
    """A data set that brings its pairs."""
    pairs = [Pair(f"p {i}", f"{i + 1} pips", "0 pips") for i in range(40)]
    return Dataset(prompts=PROMPTS, held_out=["x"], pairs=pairs[:30], held_out_pairs=pairs[30:])


def test_dataset_labeller_keeps_the_order_of_the_data_and_adds_noise(tmp_path: Path) -> None:
    result = made(tmp_path, data=own_pairs(), labeller=FromDataset(), noise_rate=0.2)
    assert len(result.noise["flipped"]) == 6
    assert wrong(result.train) == result.noise["flipped"]
    assert result.evaluation == own_pairs().held_out_pairs


def test_noise_does_not_reach_the_data_set_itself(tmp_path: Path) -> None:
    data = own_pairs()
    made(tmp_path, data=data, labeller=FromDataset(), noise_rate=0.5)
    assert data == own_pairs()


def test_dataset_labeller_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"labeller=dataset needs .*data.preferences"):
        made(tmp_path, labeller=FromDataset())


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_rate": 1.1}, r"preferences\.noise_rate=1\.1 must be between 0 and 1"),
        ({"noise_rate": -0.1}, r"preferences\.noise_rate=-0\.1"),
        ({"noise_rate": 0.6, "noise_scheme": "randomise_half"}, r"between 0 and 0\.5"),
        ({"noise_scheme": "flop"}, r"preferences\.noise_scheme=flop .* did you mean flip"),
        ({"pairs": 0}, r"preferences\.pairs must be at least 1"),
        ({"evaluation_pairs": 1}, r"preferences\.evaluation_pairs at least 2"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preferences(**settings)
