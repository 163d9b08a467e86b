"""Mixture-of-experts layers and the language model built from them. Knows no process group.

Names are loaded on first use, so that programs which only read a config do not wait for what they do not need.
The function ``generate`` stays in its module, ``from moe.generate import generate``: as a name of this package it
would be either the function or the module, depending on who imported first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.attention import KVCache
    from moe.checkpoint import LoadedModel, load_model, save_model
    from moe.config import ModelConfig, MoEConfig, count_params, flops_per_token
    from moe.dispatch import Dispatched, Dispatcher, LocalDispatcher
    from moe.experts import Experts, SwiGLU
    from moe.generate import SamplingParams, TokenStep, sample_token
    from moe.layer import MoELayer, MoEOutput, RoutingContext
    from moe.tokenizer import StreamDecoder, Tokenizer
    from moe.transformer import ForwardContext, LayerRouting, ModelOutput, Transformer, next_token_loss

_HOME = {
    "KVCache": "attention",
    "LoadedModel": "checkpoint",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "ModelConfig": "config",
    "MoEConfig": "config",
    "count_params": "config",
    "flops_per_token": "config",
    "Dispatched": "dispatch",
    "Dispatcher": "dispatch",
    "LocalDispatcher": "dispatch",
    "Experts": "experts",
    "SwiGLU": "experts",
    "SamplingParams": "generate",
    "TokenStep": "generate",
    "sample_token": "generate",
    "MoELayer": "layer",
    "MoEOutput": "layer",
    "RoutingContext": "layer",
    "StreamDecoder": "tokenizer",
    "Tokenizer": "tokenizer",
    "ForwardContext": "transformer",
    "LayerRouting": "transformer",
    "ModelOutput": "transformer",
    "Transformer": "transformer",
    "next_token_loss": "transformer",
}

__all__ = [
    "Dispatched",
    "Dispatcher",
    "Experts",
    "ForwardContext",
    "KVCache",
    "LayerRouting",
    "LoadedModel",
    "LocalDispatcher",
    "MoEConfig",
    "MoELayer",
    "MoEOutput",
    "ModelConfig",
    "ModelOutput",
    "RoutingContext",
    "SamplingParams",
    "StreamDecoder",
    "SwiGLU",
    "TokenStep",
    "Tokenizer",
    "Transformer",
    "count_params",
    "flops_per_token",
    "load_model",
    "next_token_loss",
    "sample_token",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"moe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
