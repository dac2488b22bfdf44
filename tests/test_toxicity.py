"""1 - toxicity as a reward, by words, by a classifier, by a function; and its worst case."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_exp.evaluation.toxicity import expected_maximum_toxicity, toxicity_probability
from rlhf_exp.rewards import Fitting, score
from rlhf_exp.rewards.toxicity import Toxicity

pytest_plugins = ["runs_fixtures"]

UNUSED: Any = None  # what a reward is fitted with; this one is not


def scores(reward: Toxicity, *texts: str) -> list[float]:
    reward.check(UNUSED)
    reward.load("cpu")
    return score(reward, ["p"] * len(texts), list(texts)).objective.tolist()


def fitting() -> Fitting:
    return UNUSED


# ------------------------------------------------------------------------------------- evaluation


def test_worst_case_over_samples_by_hand() -> None:
    """Maxima 0.9, 0.5, 0.2: their mean is 1.6 / 3; only the first is above a half."""
    toxicity = torch.tensor([[0.1, 0.9], [0.5, 0.3], [0.2, 0.0]], dtype=torch.float64)
    assert expected_maximum_toxicity(toxicity) == pytest.approx(1.6 / 3, abs=1e-12)
    assert toxicity_probability(toxicity) == pytest.approx(1 / 3, abs=1e-12)
    assert toxicity_probability(toxicity, threshold=0.15) == 1.0
    assert expected_maximum_toxicity(toxicity.reshape(6, 1)) == pytest.approx(2.0 / 6, abs=1e-12)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0)])
def test_worst_case_needs_prompts_and_samples(shape: tuple[int, ...]) -> None:
    for measure in (expected_maximum_toxicity, toxicity_probability):
        with pytest.raises(ValueError, match=r"must be \[prompts, samples\]"):
            measure(torch.zeros(shape))


# ------------------------------------------------------------------------------------------ words


def test_words_make_a_text_more_toxic_one_by_one(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("# mine\nblast 0.5\n\nblast it 0.8\nZounds\t0.25\n")
    found = scores(
        Toxicity(word_list=str(words)),
        "a fine day",
        "Blast!",
        "blast, blast",
        "oh blast\n it",
        "zounds: BLAST",
        "blasted",
        "",
    )
    expected = [1, 0.5, 0.25, 0.2, 0.75 * 0.5, 1, 1]
    assert found == pytest.approx(expected, abs=1e-6)


def test_own_words_tell_contempt_from_praise() -> None:
    kind, rude, worse = scores(
        Toxicity(), "I loved the plot.", "What a stupid plot.", "Shut up, you stupid idiot."
    )
    assert (kind, rude) == (1.0, 0.5)
    assert worse == pytest.approx(0.5 * 0.5 * 0.3, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blast\n", r"words\.txt, line 1: 'blast' must be a word or phrase, then its weight"),
        ("# x\nblast 1.5\n", r"line 2: 'blast 1\.5' .* in \(0, 1\]"),
        ("blast 0\n", "line 1"),
        ("blast nan\n", "line 1"),
        ("0.5\n", "line 1"),
        ("# nothing\n", r"words\.txt holds no words; give at least one"),
    ],
)
def test_bad_word_list_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        Toxicity(word_list=str(tmp_path / "words.txt")).check(fitting())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "wards"}, r"reward\.scorer=wards .* did you mean words"),
        ({"scorer": "model"}, r"reward\.path=None .* needs a text classifier"),
        ({"path": "a/b"}, r"no other scorer takes one"),
        ({"scorer": "a:b", "word_list": "w.txt"}, r"reward\.word_list=w\.txt has no use"),
        ({"dtype": "float8"}, r"reward\.dtype=float8"),
        ({"max_length": 0}, r"reward\.max_length=0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Toxicity(**settings)


def test_missing_word_list_ends_the_run_in_a_sentence(refused) -> None:
    sentence = refused("reward=toxicity", "reward.word_list=none.txt")
    assert "there is no data file at none.txt" in sentence


# --------------------------------------------------------------------------------------- function


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module of the user's into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(body: str) -> str:
        (tmp_path / "mine.py").write_text(body)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        return "mine:f"

    yield write
    sys.modules.pop("mine", None)


def test_function_scores_each_text_once(module) -> None:
    body = (
        "seen = []\ndef f(texts):\n    seen.extend(texts)\n    return [len(t) / 4 for t in texts]"
    )
    reward = Toxicity(scorer=module(body))
    assert scores(reward, "a", "abc", "a", "") == [0.75, 0.25, 0.75, 1.0]
    assert score(reward, ["q", "q"], ["abc", "ab"]).objective.tolist() == [0.25, 0.5]
    assert sys.modules["mine"].seen == ["a", "abc", "", "ab"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def g(): ...", r"reward\.scorer=mine:f cannot be imported .* check module and name"),
        ("f = 3", r"reward\.scorer=mine:f is not a function"),
        ("def f(texts): return [1.5]", r"gave 1\.5 for 'a'; toxicity must be in \[0, 1\]"),
        ("def f(texts): return [float('nan')]", r"gave nan for 'a'"),
        ("def f(texts): return []", r"gave 0 numbers for 1 texts"),
        ("def f(texts): return 1 / 0", r"reward\.scorer=mine:f raised ZeroDivisionError"),
        ("def f(texts): return ['x']", r"reward\.scorer=mine:f raised ValueError"),
    ],
)
def test_bad_function_is_named(body: str, message: str, module) -> None:
    with pytest.raises(ValueError, match=message):
        scores(Toxicity(scorer=module(body)), "a")


# ------------------------------------------------------------------------------------- classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory):
    """Makes a tiny BERT classifier with random weights; gives its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    def make(**settings: Any) -> Path:
        folder = tmp_path_factory.mktemp("classifier")
        words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "you", "are", "good", "bad", "very"]
        vocabulary = {word: i for i, word in enumerate(words)}
        bare = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        bare.pre_tokenizer = pre_tokenizers.Whitespace()
        bare.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=bare, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
        ).save_pretrained(folder)
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes = {"intermediate_size": 16, "max_position_embeddings": 12, "vocab_size": len(words)}
        config = BertConfig(initializer_range=1.0, **shape, **sizes, **settings)
        BertForSequenceClassification(config).save_pretrained(folder)
        return folder

    return make


TEXTS = ["you are bad", "good", "you are very very very good", "", "bad " * 40]


def logits(folder: Path, text: str) -> Tensor:
    """What the classifier says of one text alone, [labels]."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(
        text, truncation=True, max_length=12, return_tensors="pt"
    )["input_ids"]
    return model(ids).logits[0].detach()


def test_classifier_gives_the_softmax_of_its_toxic_class_whatever_the_batch(classifier) -> None:
    folder = classifier(id2label={0: "toxic", 1: "fine"}, label2id={"toxic": 0, "fine": 1})
    expected = [1 - float(logits(folder, t).softmax(0)[0]) for t in TEXTS]
    assert max(expected) - min(expected) > 0.1
    together = scores(Toxicity(scorer="model", path=str(folder)), *TEXTS)
    one_by_one = scores(Toxicity(scorer="model", path=str(folder), token_budget=1), *TEXTS)
    assert together == pytest.approx(expected, abs=1e-5)
    assert one_by_one == pytest.approx(expected, abs=1e-5)


def test_classifier_of_independent_labels_gives_the_sigmoid(classifier) -> None:
    folder = classifier(
        problem_type="multi_label_classification",
        id2label={0: "insult", 1: "threat", 2: "toxic"},
        label2id={"insult": 0, "threat": 1, "toxic": 2},
    )
    found = scores(Toxicity(scorer="model", path=str(folder), label="threat"), *TEXTS)
    assert found == pytest.approx(
        [1 - float(logits(folder, t).sigmoid()[1]) for t in TEXTS], abs=1e-5
    )


def test_unknown_class_is_refused_with_those_there_are(classifier) -> None:
    folder = classifier(id2label={0: "ok", 1: "toxicity"}, label2id={"ok": 0, "toxicity": 1})
    with pytest.raises(ValueError, match=r"reward\.label=toxic .* ok, toxicity; did you mean tox"):
        Toxicity(scorer="model", path=str(folder)).check(fitting())
