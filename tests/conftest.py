"""What every test stands on: the environment before torch is imported, one thread, a tiny model."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.artifacts import Store
from rlhf_exp.data.reviews import Reviews
from rlhf_exp.policy import Policy

# Weights ten times as large as usual, so that a token in the wrong place shows in the numbers.
TINY = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def tiny_policy(kind: str = "gpt2", **settings: Any) -> Policy:
    """A policy built from nothing, of the architecture `kind`."""
    architecture = {"model_type": kind, "initializer_range": 0.2} | TINY[kind]
    return Policy(
        **({"architecture": architecture, "vocabulary": 300, "max_new_tokens": 12} | settings)
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory):
    """Gives the folder of a tiny base model by architecture and seed, made once."""
    store = Store(tmp_path_factory.mktemp("bases"))
    told = Reviews(demonstrations=50, prompts=50).load().demonstrations
    texts = [d.prompt + d.completion for d in told]

    def base(kind: str = "gpt2", seed: int = 0) -> Path:
        folder = tiny_policy(kind, seed=seed).base(store, texts)
        assert isinstance(folder, Path)
        return folder

    return base
