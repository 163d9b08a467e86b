"""``/tokenize`` and ``/detokenize``, where vLLM has them: outside /v1, and behind the keys like everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Response

from serve.client import EngineClient
from serve.http.errors import json_response
from serve.http.json_route import JsonRoute
from serve.http.served_models import ChatTemplates, find_model
from serve.http.statuses import ENGINE
from serve.protocol.responses import Detokenized, Tokenized
from serve.protocol.tokens import DetokenizeRequest, TokenizeRequest

# After so many short calls the event loop gets its turn.
CALLS_AT_A_TIME = 256


def tokenization_router(client: EngineClient, templates: ChatTemplates) -> APIRouter:
    router = APIRouter(responses=ENGINE, tags=["tokens"], route_class=JsonRoute)

    @router.post("/tokenize", responses={200: {"model": Tokenized}})
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of messages as the chat route renders them."""
        model = await find_model(client, body.model)
        ids = await client.tokenize(model.model_id, body.text(templates.of(model)))
        strings = await _strings(client, model.model_id, ids) if body.return_token_strs else None
        answer: Tokenized = {
            "count": len(ids),
            "max_model_len": model.context_length,
            "tokens": list(ids),
            "token_strs": strings,
        }
        return json_response(answer)

    @router.post("/detokenize", responses={200: {"model": Detokenized}})
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        model = await find_model(client, body.model)
        answer: Detokenized = {"prompt": await client.detokenize(model.model_id, body.tokens)}
        return json_response(answer)

    return router


async def _strings(client: EngineClient, model: str, ids: Sequence[int]) -> list[str]:
    """Each token alone, U+FFFD where its bytes are not a whole character."""
    known: dict[int, str] = {}
    for number, token in enumerate(dict.fromkeys(ids), 1):
        known[token] = await client.detokenize(model, (token,))
        if number % CALLS_AT_A_TIME == 0:
            await asyncio.sleep(0)
    return [known[token] for token in ids]
