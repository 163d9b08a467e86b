"""A model, a request and chunks of its answer, for tests of what stands between engines and Ray."""

from __future__ import annotations

from typing import Any

from serve.client import EngineRequest, ModelInfo, SamplingOptions, TokenChunk, Usage

INFO = ModelInfo("fox", 0, 128, 300)
REQUEST = EngineRequest("q1", "fox", ("a",), SamplingOptions())


def chunk(text: str, index: int = 0, **rest: Any) -> TokenChunk:
    """One token a character."""
    return TokenChunk(index, text, tuple(map(ord, text)), Usage(1, len(text)), **rest)
