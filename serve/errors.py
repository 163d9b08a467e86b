"""What an engine may raise for a request. Every error pickles, and its text is safe to show to clients."""

from __future__ import annotations

from typing import Literal


class EngineError(Exception):
    """Base of what an engine may raise for a request; the message is safe to show to clients."""


class UnknownModelError(EngineError):
    """The engine does not serve this model."""

    def __init__(self, model: str) -> None:
        self.model = model
        super().__init__(model)

    def __str__(self) -> str:
        return f"The model `{self.model}` does not exist"


class InvalidRequestError(EngineError):
    """A value that the model cannot take; ``param`` names the request's field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        self.message, self.param = message, param
        super().__init__(message, param)

    def __str__(self) -> str:
        return self.message


class ContextLengthError(EngineError):
    """Prompt, or prompt and ``max_tokens`` together, exceed the model's context."""

    def __init__(self, limit: int, prompt_tokens: int, max_tokens: int | None) -> None:
        self.limit, self.prompt_tokens, self.max_tokens = limit, prompt_tokens, max_tokens
        super().__init__(limit, prompt_tokens, max_tokens)

    def __str__(self) -> str:
        head = f"This model's maximum context length is {self.limit} tokens. However, "
        if self.max_tokens is None:
            return head + f"your prompt has {self.prompt_tokens} tokens and leaves no room. Please shorten it."
        return head + (
            f"you requested {self.prompt_tokens + self.max_tokens} tokens ({self.prompt_tokens} in the prompt,"
            f" {self.max_tokens} for the completion). Please shorten the prompt or lower max_tokens."
        )


class QueueFullError(EngineError):
    """The engine takes no more work now. ``reason`` is the limit that was hit."""

    def __init__(self, reason: Literal["requests", "prompt_tokens"], limit: int, retry_after_s: float) -> None:
        self.reason, self.limit, self.retry_after_s = reason, limit, retry_after_s
        super().__init__(reason, limit, retry_after_s)

    def __str__(self) -> str:
        what = {"requests": "requests", "prompt_tokens": "prompt tokens"}[self.reason]
        return f"The server is overloaded: {self.limit} {what} are already waiting. Please retry later."


class EngineUnavailableError(EngineError):
    """The engine has not started, is draining or has stopped; another replica, or a later try, may answer."""


class EngineDeadError(EngineError):
    """The engine failed for good and fails every request."""


class RequestAbortedError(EngineError):
    """The request was aborted by somebody other than the reader of its stream."""
