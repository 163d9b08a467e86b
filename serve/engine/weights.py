"""Other weights for a model that is being served: loaded beside it, checked, then put in its place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moe.checkpoint import load_model
from moe.config import ModelConfig
from moe.errors import UserError
from moe.tokenizer import Tokenizer
from moe.transformer import Transformer
from serve.client import InvalidRequestError, ModelInfo
from serve.engine.model_files import find_model_dir, weights_fingerprint
from serve.engine.products import Products
from serve.engine.threads import without_a_team


@dataclass(frozen=True)
class WeightsLoader:
    """Loads model directories that may take the place of the served one: same shape, gate and tokenizer.

    Attributes:
        config: shape of the served model; gate_name: of its gate.
        tokenizer: whose ids clients have in hand.
        device, dtype: where and how the weights are held.
        products: how the model computes.
    """

    config: ModelConfig
    gate_name: str
    tokenizer: Tokenizer
    device: str
    dtype: torch.dtype
    products: Products

    @without_a_team()
    def load(self, path: str) -> tuple[Transformer, str]:
        """The model at ``path`` and its version.

        Raises:
            InvalidRequestError: no usable model there, or another shape, gate or vocabulary.
        """
        try:
            directory = find_model_dir(Path(path))
            loaded = load_model(directory, device=self.device, dtype=self.dtype)
        except UserError as error:
            raise InvalidRequestError(str(error), "path") from error
        if loaded.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise InvalidRequestError(f"{path}: its tokenizer is not that of the served model", "path")
        if loaded.config != self.config or loaded.gate.name != self.gate_name:
            different = [
                name
                for name in type(self.config).model_fields
                if getattr(loaded.config, name) != getattr(self.config, name)
            ] or ["gate"]
            raise InvalidRequestError(
                f"{path}: differs from the served model in {', '.join(different)}; start a server for it", "path"
            )
        self.products.prepare(loaded.model)
        return loaded.model, weights_fingerprint(directory)

    @staticmethod
    def renewed(info: ModelInfo, version: str) -> ModelInfo:
        """What clients are told after the swap."""
        return replace(info, weights_version=version)
