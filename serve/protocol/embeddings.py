"""``POST /v1/embeddings``: the body, and the answer in either of its encodings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from serve.client import EmbeddingRequest, Embeddings, InvalidRequestError, ModelInfo
from serve.protocol.fields import COUNT_LIMIT
from serve.protocol.prompts import PromptForms, as_prompts, check_prompts
from serve.protocol.responses import EmbeddingList
from serve.protocol.validation import RequestBody

MAX_INPUTS = 2048


class EmbeddingsBody(RequestBody):
    """Fields as OpenAI documents them; ``priority`` is vLLM's."""

    input: Annotated[PromptForms, BeforeValidator(check_prompts(MAX_INPUTS))]
    model: str | None = Field(None, max_length=512, description="served model; left out: the default one")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: float32, little-endian; left out: float"
    )
    dimensions: int | None = Field(None, ge=1, lt=COUNT_LIMIT, description="must be the model's own number")
    priority: int | None = Field(None, ge=-COUNT_LIMIT, lt=COUNT_LIMIT)

    def to_engine(self, request_id: str, model: ModelInfo) -> EmbeddingRequest:
        """What the engine gets.

        Raises:
            InvalidRequestError: vectors of another length are wanted.
        """
        if self.dimensions is not None and self.dimensions != model.embedding_dim:
            raise InvalidRequestError(
                f"This model's embeddings have {model.embedding_dim} dimensions and cannot be shortened.", "dimensions"
            )
        return EmbeddingRequest(request_id, model.model_id, as_prompts(self.input), self.priority or 0)

    def answer(self, result: Embeddings, model: str) -> EmbeddingList:
        """The response, in the encoding that was asked for."""
        encode = _base64 if self.encoding_format == "base64" else list
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encode(vector)}
                for index, vector in enumerate(result.vectors)
            ],
            "model": model,
            "usage": {"prompt_tokens": result.prompt_tokens, "total_tokens": result.prompt_tokens},
        }


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
