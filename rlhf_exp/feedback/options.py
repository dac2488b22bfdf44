"""How likely each of a few options is as the answer, from what is told of a reply.

An option may begin another, as "1" does "10": what goes on to be the longer one is no case of the
shorter one.
"""

import math
from collections.abc import Sequence
from itertools import dropwhile
from typing import Any

TOP = 20  # alternatives of a token asked for: as many as OpenAI and vLLM give
UNSAID = 1e-9  # smallest probability of an option


def of_words(said: str, options: Sequence[str]) -> list[float] | None:
    """Log-probabilities if only the answer is known: all but one are UNSAID. None unless it is an
    option, up to white space.
    """
    if said.strip() not in options:
        return None
    return [0.0 if said.strip() == option else math.log(UNSAID) for option in options]


def of_tokens(tokens: Sequence[dict[str, Any]], options: Sequence[str]) -> list[float] | None:
    """Log-probabilities from `logprobs.content` of a chat completion: tokens of the reply, each
    with its `top_logprobs`. None if the first word of the reply is no option.

    An option that is not among the alternatives of the first token has at most the probability of
    the last of them, and at most what all leave: the smaller of the two is taken for its own. One
    that goes on after the first token is seen only if the reply begins as it does.
    """
    tokens = list(dropwhile(lambda t: not t["token"].strip(), tokens))
    said = tokens[0]["token"].strip() if tokens else ""
    if not said or not any(option.startswith(said) for option in options):
        return None
    word = "".join(t["token"] for t in tokens).split()[0]  # such as 10, in two tokens
    if word.isalnum() and not any(option.startswith(word) for option in options):
        return None
    shares = _merged(tokens[0])
    floor = min(min(shares.values()), 1 - sum(shares.values()))
    for option in options:
        rest = option.removeprefix(said)
        if len(tokens) > 1 and rest and rest != option and option not in shares:
            shares[option] = shares[said] * _shares(tokens[1]).get(rest, 0.0)
            shares[said] -= shares[option]
    return [math.log(max(shares.get(option, floor), UNSAID)) for option in options]


def _shares(token: dict[str, Any]) -> dict[str, float]:
    """Probabilities of the token and its alternatives, by text."""
    listed = {t["token"]: t["logprob"] for t in [*(token.get("top_logprobs") or ()), token]}
    return {text: math.exp(min(p, 0.0)) for text, p in listed.items() if p is not None}


def _merged(token: dict[str, Any]) -> dict[str, float]:
    """The same, with and without white space around being one."""
    found: dict[str, float] = {}
    for text, share in _shares(token).items():
        found[text.strip()] = found.get(text.strip(), 0.0) + share
    return found
