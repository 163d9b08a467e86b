"""The models that an engine serves, by name, and their chat templates, compiled once."""

from __future__ import annotations

from serve.client import EngineClient, ModelInfo, UnknownModelError
from serve.protocol.chat_template import ChatTemplate


async def find_model(client: EngineClient, name: str | None) -> ModelInfo:
    """The named model, or the default one.

    Raises:
        UnknownModelError: when nothing is served under that name.
    """
    models = await client.models()
    for model in models:
        if name is None or model.model_id == name:
            return model
    raise UnknownModelError(name or "")


class ChatTemplates:
    """Compiles a model's template when it is first needed."""

    def __init__(self) -> None:
        self._plain = ChatTemplate.plain()
        self._compiled: dict[str, ChatTemplate] = {}

    def of(self, model: ModelInfo) -> ChatTemplate:
        source = model.chat_template
        if source is None:
            return self._plain
        if source not in self._compiled:
            self._compiled[source] = ChatTemplate(source, model.special_tokens)
        return self._compiled[source]
