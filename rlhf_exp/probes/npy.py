"""Hidden states from the files of collin-burns/discovering_latent_knowledge (Burns et al. 2022).

Its generate.py writes three files per run, named by the arguments:
`negative_hidden_states__..._split_test__....npy`, `positive_hidden_states__...` and `labels__...`.
States are [n, d, layers] (T5 with batch size 1: [n, 1, d, layers]), labels [n].

Left out: several runs in one folder as several templates, because each run shuffles its examples
anew, so that rows do not belong together.
"""

import re
from pathlib import Path

import numpy as np
import torch

from rlhf_exp.probes.states import States

KINDS = ("negative_hidden_states", "positive_hidden_states", "labels")


def read_npy(folder: str | Path, split: str) -> States:
    """The states of one run as one template: layer -> [n, 1, 2, d], the negative answer first.

    With --all_layers the layers count from 0, the embeddings; otherwise the layer is the one the
    file name tells, -1 being the last.
    """
    paths = {kind: _find(Path(folder).expanduser(), kind, split) for kind in KINDS}
    negative, positive, labels = (_load(path) for path in paths.values())
    name = paths[KINDS[0]].name
    if "__all_layers_True__" in name and "__batch_size_1__" in name:
        raise ValueError(
            f"{name}: with --all_layers and batch size 1 generate.py takes one feature of every "
            "token, not all features of one; write the file with a larger batch size"
        )
    if negative.ndim != 3 or negative.shape != positive.shape or labels.shape != negative.shape[:1]:
        raise ValueError(
            f"{name}: states {negative.shape} and {positive.shape} with labels {labels.shape} do "
            "not belong together; they must be [n, d, layers] twice and [n]"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"{paths['labels'].name}: labels must be 0 or 1, not {set(labels.tolist())}"
        )
    pairs = torch.from_numpy(np.stack([negative, positive], 1)).float()[:, None]  # [n, 1, 2, d, l]
    if not pairs.isfinite().all():
        raise ValueError(
            f"{name}: states are not finite, as T5 in half precision overflows; write them in "
            "float32"
        )
    layers = range(pairs.shape[-1])
    if len(layers) == 1 and (told := re.search(r"__layer_(-?\d+)__", name)):
        layers = [int(told[1])]
    return States(
        hidden={layer: pairs[..., i].contiguous() for i, layer in enumerate(layers)},
        labels=torch.from_numpy(labels).long(),
        lm=None,
        about={"source": str(folder), "split": split, "file": name},
    )


def _find(folder: Path, kind: str, split: str) -> Path:
    found = sorted(folder.glob(f"{kind}__*__split_{split}__*.npy"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder} holds {len(found)} files {kind}__*__split_{split}__*.npy: give a folder "
            "with one run"
        )
    return found[0]


def _load(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not an array of numbers ({error}); write it again") from None
    return array.squeeze(1) if array.ndim == 4 and array.shape[1] == 1 else array
