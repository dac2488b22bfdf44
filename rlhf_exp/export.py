"""The stage `export`: a trained policy as a plain folder of Hugging Face weights, its adapter
merged in, shown to be the same model by its logits.

An adapter learned over quantized weights corrects their rounding as well, so it is merged into what
those weights stand for, dequantized; `base: original` merges it into the weights as they were
before quantization, which is another model. Merging is done in float32: added to 4-bit weights,
most of an adapter would be rounded away.

Left out: merging on several devices (the whole model, in float32, must fit into the memory of one).
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_exp import adapters, weights
from rlhf_exp.artifacts import verify, write_directory, write_json
from rlhf_exp.choices import require

logger = logging.getLogger(__name__)

ROWS, LENGTH = 8, 64  # random tokens on which the logits are compared


@dataclass(kw_only=True)
class Export:
    """Where a policy is taken from, and how it is written."""

    # run directory, or a policy's folder; null: what this run has trained
    run: str | None = None
    folder: str | None = None  # null: <run directory>/export
    # weights below the adapter; null: where the run found them
    path: str | None = None
    # what the adapter is merged into: trained (dequantized, if they were quantized) or original
    base: str = "trained"
    dtype: str | None = None  # of the written weights; null: those of the run
    tolerance: float = 0.05  # largest difference of the logits, as a share of their spread

    def __post_init__(self) -> None:
        require(self.base, ("trained", "original"), "export.base")
        if self.dtype is not None:
            require(self.dtype, ("float32", "bfloat16", "float16"), "export.dtype")

    def source(self, directory: Path) -> Path:
        """The folder of the policy to export, unharmed; FileNotFoundError if there is none."""
        asked = directory if self.run is None else Path(self.run).expanduser().absolute()
        for folder in (asked / "policy", asked):
            if (folder / "policy.json").exists():
                verify(folder)
                return folder
        raise FileNotFoundError(
            f"there is no trained policy in {asked}: give export.run=<run directory>, or add align "
            "to stages"
        )

    def target(self, directory: Path) -> Path:
        """The folder to write; ValueError if there is one already."""
        folder = directory / "export" if self.folder is None else Path(self.folder).expanduser()
        if folder.exists():
            raise ValueError(f"{folder} exists already: choose another export.folder")
        return folder

    def write(self, directory: Path, device: torch.device) -> Path:
        """The exported folder; ValueError if it would not be the trained model."""
        source, folder = self.source(directory), self.target(directory)
        write_directory(folder, lambda made: self._make(made, source, device), {"of": str(source)})
        logger.info("exported policy: %s", folder)
        return folder

    @torch.no_grad()
    def _make(self, folder: Path, source: Path, device: torch.device) -> None:
        saved = {"dtype": "float32", "quantization": None} | weights.saved_settings(source)
        tokenizer = weights.load_tokenizer(source)
        model = self._trained(source, saved, tokenizer, device)
        longest = getattr(model.config, "max_position_embeddings", None) or LENGTH
        tried = _tokens(len(tokenizer), min(LENGTH, longest)).to(device)
        trained = model(tried).logits.float().cpu()
        model = self._plain(model, source, saved, tokenizer, device)
        model.to(getattr(torch, self.dtype or saved["dtype"])).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "policy.json", _settings(saved))
        del model
        written = weights.load_causal_lm(folder, "float32", tokenizer).to(device).eval()
        report = self._compared(trained, written(tried).logits.cpu())
        write_json(folder / "export.json", {"of": str(source), "base": self.base} | report)
        if (source / "README.md").exists():
            (folder / "README.md").write_text((source / "README.md").read_text())

    def _trained(self, source: Path, saved: dict[str, Any], tokenizer: Any, device: Any) -> Any:
        """The model as it was trained, its adapter apart."""
        if not saved["lora"]:
            return weights.load_causal_lm(source, saved["dtype"], tokenizer).to(device).eval()
        base = self._base(saved)
        model = weights.load_causal_lm(
            base, saved["dtype"], tokenizer, saved["quantization"], device
        )
        if saved["quantization"] is None:
            model = model.to(device)
        adapters.require_base(model, source, str(base))
        return adapters.with_adapter(model, source).eval()

    def _base(self, saved: dict[str, Any]) -> Path | str:
        """Where the weights below the adapter are."""
        path = self.path or saved["base"]
        try:
            return weights.locate(path)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the weights below the adapter are no longer at {path}: give export.path=<where "
                "they are>"
            ) from None

    def _plain(
        self, model: Any, source: Path, saved: dict[str, Any], tokenizer: Any, device: Any
    ) -> Any:
        """`model` without adapter or quantization, in float32."""
        if not saved["lora"]:
            return model.float()
        if saved["quantization"] is None:
            return model.float().merge_and_unload()
        plain = weights.load_causal_lm(self._base(saved), "float32", tokenizer).to(device)
        if self.base == "trained":
            _dequantize_into(plain, model.get_base_model())
        return adapters.with_adapter(plain, source).merge_and_unload()

    def _compared(self, trained: Tensor, written: Tensor) -> dict[str, float]:
        """How far the logits [b, t, v] of the written model are from those of the trained one."""
        gap = (written - trained).abs()
        share = float(gap.mean() / trained.std())
        same = float((written.argmax(-1) == trained.argmax(-1)).float().mean())
        report = {"mean": float(gap.mean()), "max": float(gap.max()), "share": share, "same": same}
        logger.info(
            "logits against the trained policy: mean difference %.2g (%.2g of their spread), "
            "largest %.2g, same best token at %.1f %% of positions",
            *(report[k] for k in ("mean", "share", "max")),
            100 * same,
        )
        if not share <= self.tolerance:
            raise ValueError(
                f"the exported logits differ from those of the trained policy by {share:.3g} of "
                f"their spread, more than export.tolerance={self.tolerance}: see export.base and "
                "export.dtype"
            )
        return report


def _tokens(vocabulary: int, length: int) -> Tensor:
    """[b, length] the same random tokens at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (ROWS, length), generator=generator)


def _settings(saved: dict[str, Any]) -> dict[str, Any]:
    """policy.json of a policy whose weights are its own."""
    gone = ("base_weights", "quantization")
    return {k: v for k, v in saved.items() if k not in gone} | {"lora": False}


def _dequantize_into(plain: nn.Module, quantized: nn.Module) -> None:
    """Give `plain` the weights that those of `quantized` stand for."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D  # of GPT-2: [in, out]

    for name, layer in quantized.named_modules():
        weight: Any = vars(layer).get("_parameters", {}).get("weight")
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            continue
        values = dequantize_bnb_weight(weight, getattr(layer, "state", None))
        target: Any = plain.get_submodule(name.removesuffix(".base_layer"))
        target.weight.copy_(values.T if isinstance(target, Conv1D) else values)
