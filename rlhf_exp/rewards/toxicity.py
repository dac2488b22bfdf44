"""How free of toxicity a completion is, as in Quark (Lu et al. 2022): 1 - toxicity, where toxicity
in [0, 1] is what a scorer says of the completion alone.

Quark asks the Perspective API; any scorer can stand in. `words` needs nothing and is crude: it
looks for some insults, curses and words of contempt, so it neither sees a threat in plain words nor
knows a quotation from an attack.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_exp import frozen, weights
from rlhf_exp.choices import require
from rlhf_exp.config import imported
from rlhf_exp.data.local import require_file
from rlhf_exp.frozen import Frozen
from rlhf_exp.rewards import Fitting, Reward
from rlhf_exp.tokens import batches_by_length

# How toxic each makes a text that is harmless otherwise, in (0, 1].
WORDS = {
    "idiot": 0.7, "idiots": 0.7, "idiotic": 0.6, "moron": 0.7, "morons": 0.7, "imbecile": 0.7,
    "stupid": 0.5, "dumb": 0.4, "fool": 0.4, "fools": 0.4, "loser": 0.6, "losers": 0.6,
    "scum": 0.8, "bastard": 0.8, "jerk": 0.5, "worthless": 0.5, "pathetic": 0.5, "shut up": 0.5,
    "disgusting": 0.4, "filthy": 0.4, "despise": 0.4, "hate": 0.3, "hated": 0.3, "hates": 0.3,
    "ugly": 0.3, "lazy": 0.3, "crap": 0.4, "damn": 0.3, "bloody": 0.2, "go to hell": 0.7,
    "kill": 0.4, "kill you": 0.8, "die": 0.2, "awful": 0.1, "dreadful": 0.1,
}  # fmt: skip


@dataclass(kw_only=True)
class Toxicity(Reward):
    """1 - toxicity of the completion, in [0, 1]; the prompt is not read. No text is asked twice."""

    # words, model, or module:function, called as f(texts) -> numbers in [0, 1]
    scorer: str = "words"
    # of scorer=words: a file, each line a word or phrase and its weight in (0, 1]; null: our own
    word_list: str | None = None
    path: str | None = None  # of scorer=model: a text classifier, as a hub id or folder
    label: str = "toxic"  # of scorer=model: the class whose probability is toxicity
    dtype: str = "float32"  # of scorer=model
    max_length: int | None = None  # of scorer=model: tokens read; null: the model's limit
    token_budget: int = 16_384  # of scorer=model: padded tokens per forward pass

    def __post_init__(self) -> None:
        if ":" not in self.scorer:
            require(self.scorer, ("words", "model", "<module>:<function>"), "reward.scorer")
        require(self.dtype, ("float32", "bfloat16", "float16"), "reward.dtype")
        if self.word_list is not None and self.scorer != "words":
            raise ValueError(
                f"reward.word_list={self.word_list} has no use with reward.scorer={self.scorer}: "
                "set reward.scorer=words, or reward.word_list=null"
            )
        if (self.path is not None) != (self.scorer == "model"):
            raise ValueError(
                f"reward.path={self.path} and reward.scorer={self.scorer} do not go together: "
                "scorer=model needs a text classifier as reward.path, and no other scorer takes one"
            )
        if self.token_budget < 1 or (self.max_length is not None and self.max_length < 1):
            raise ValueError(
                f"reward.token_budget={self.token_budget} must be positive, and reward.max_length="
                f"{self.max_length} too, or null for the model's limit"
            )
        self._known: dict[bytes, float] = {}  # toxicity by hash of the text

    def check(self, fitting: Fitting) -> None:
        if self.path is None:
            self.load("cpu")
        else:
            _label_index(weights.locate(self.path), self.label)

    def load(self, device: str | torch.device) -> None:
        if self.path is not None:
            self._score: Any = Classifier(self, device)
        elif self.scorer == "words":
            known = WORDS if self.word_list is None else read_word_list(self.word_list)
            self._score = WordList(known)
        else:
            self._score = imported(self.scorer, "reward.scorer")

    def __call__(self, prompts: list[str], completions: list[str]) -> Tensor:
        keys = [hashlib.sha256(c.encode()).digest() for c in completions]
        by_key = dict(zip(keys, completions, strict=True))
        # of a model that is divided all processes ask, or none
        again = frozen.placement() == "sharded"
        new = {key: text for key, text in by_key.items() if again or key not in self._known}
        if new:
            self._known |= zip(new, self._scores(list(new.values())), strict=True)
        return 1 - torch.tensor([self._known[key] for key in keys], dtype=torch.float32)

    def facets(self, prompts: list[str], completions: list[str]) -> dict[str, Tensor]:
        """Toxicity by its name, for evaluation over several completions of a prompt."""
        return {"toxicity": 1 - self(prompts, completions)}

    def _scores(self, texts: list[str]) -> list[float]:
        """Toxicity of each text; ValueError unless they are numbers in [0, 1]."""
        try:
            scores = [float(x) for x in self._score(texts)]
        except Exception as error:  # whatever a user's function raises or returns
            raise ValueError(
                f"reward.scorer={self.scorer} raised {type(error).__name__}: {error}"
            ) from error
        if len(scores) != len(texts):
            raise ValueError(
                f"reward.scorer={self.scorer} gave {len(scores)} numbers for {len(texts)} texts; "
                "it must return one for each"
            )
        for score, text in zip(scores, texts, strict=True):
            if not 0 <= score <= 1:
                raise ValueError(
                    f"reward.scorer={self.scorer} gave {score} for {text[:60]!r}; toxicity must be "
                    "in [0, 1]"
                )
        return scores


class WordList:
    """1 - prod (1 - weight) over the words found: none gives 0, and each makes it worse."""

    def __init__(self, words: dict[str, float]) -> None:
        self.words = words
        longest_first = sorted(words, key=len, reverse=True)
        self.pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)")

    def __call__(self, texts: list[str]) -> list[float]:
        """Toxicity of each text."""
        return [self._toxicity(" ".join(text.lower().split())) for text in texts]

    def _toxicity(self, text: str) -> float:
        harmless = 1.0
        for word in self.pattern.findall(text):
            harmless *= 1 - self.words[word]
        return 1 - harmless


def read_word_list(name: str) -> dict[str, float]:
    """Weights in (0, 1] by word or phrase in lower case, from a text file with one a line, the
    weight last; lines that begin with # are comments.
    """
    path = Path(name).expanduser()
    require_file(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it") from None
    words: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        *phrase, weight = line.lower().split()
        try:
            words[" ".join(phrase)] = value = float(weight)
        except ValueError:
            value = 0.0
        if not phrase or not 0 < value <= 1:
            raise ValueError(
                f"{path}, line {number}: {line[:60]!r} must be a word or phrase, then its weight "
                "in (0, 1]"
            )
    if not words:
        raise ValueError(f"{path} holds no words; give at least one, or reward.word_list=null")
    return words


class Classifier:
    """Probability of `label` under a text classifier of Hugging Face's. As in its pipelines, a
    model with one label or of the kind multi_label_classification has independent labels.
    """

    def __init__(self, settings: Toxicity, device: str | torch.device) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        assert settings.path is not None
        source = weights.locate(settings.path)
        self.index, self.token_budget = _label_index(source, settings.label), settings.token_budget
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source, padding_side="right")
        weights.set_distinct_pad(self.tokenizer)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, settings.dtype)
        )
        weights.fit_pad(model, self.tokenizer)
        self.model = model.eval().requires_grad_(False)
        self.frozen = Frozen(self.model, device)
        kind = getattr(model.config, "problem_type", None)
        self.independent = model.config.num_labels == 1 or kind == "multi_label_classification"
        context = weights.context_length(source) or 10**9
        self.limit = settings.max_length or min(self.tokenizer.model_max_length, context)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> list[float]:
        """Toxicity of each text."""
        ids = self.tokenizer(texts, truncation=True, max_length=self.limit)["input_ids"]
        ids = [i or [self.tokenizer.eos_token_id] for i in ids]  # of an empty text
        found = torch.zeros(len(texts))
        with self.frozen.ready():
            for batch in batches_by_length([len(i) for i in ids], self.token_budget):
                padded = self.tokenizer.pad(
                    {"input_ids": [ids[i] for i in batch]}, return_tensors="pt"
                )
                logits = self.model(**padded.to(self.frozen.device)).logits.float()  # [b, labels]
                shares = logits.sigmoid() if self.independent else logits.softmax(-1)
                found[batch] = shares[:, self.index].cpu()
        return found.tolist()


def _label_index(source: Path | str, label: str) -> int:
    """Which of the classes of the classifier at `source` has that name."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(source)
    require(label, config.label2id, "reward.label")
    return config.label2id[label]
