"""One generation's times and counts, on their way to the metrics and to the access log."""

from __future__ import annotations

import time

from serve.client import TokenChunk
from serve.http.access_log import Answered
from serve.http.metrics import ServerMetrics, abort_reason
from serve.protocol.errors import ApiError


class RequestTimer:
    """Follows the chunks of one request; knows the time since it was made.

    Attributes:
        answered: for the access log; complete once the request is over.
    """

    def __init__(self, metrics: ServerMetrics, model_name: str) -> None:
        self._metrics, self._model = metrics, model_name
        self.answered = Answered(model_name)
        self._over = False
        self._finish: set[str] = set()
        self._started = time.perf_counter()
        self._last_token: dict[int, float] = {}
        self._last_chunk: TokenChunk | None = None

    def chunk(self, chunk: TokenChunk) -> None:
        now = time.perf_counter()
        self._last_chunk = chunk
        if chunk.token_ids:
            if not self._last_token:
                self._metrics.time_to_first_token.labels(self._model).observe(now - self._started)
            elif chunk.index in self._last_token:
                wait = (now - self._last_token[chunk.index]) / len(chunk.token_ids)
                self._metrics.inter_token.labels(self._model).observe(wait)
            self._last_token[chunk.index] = now
        if chunk.finish_reason is not None:
            self._finish.add(chunk.finish_reason)
        if chunk.timings is not None:
            self._metrics.queue.labels(self._model).observe(chunk.timings.queue_s)
            self._metrics.prefill.labels(self._model).observe(chunk.timings.prefill_s)
            self._metrics.decode.labels(self._model).observe(chunk.timings.decode_s)

    def finished(self) -> None:
        """The request came to its end."""
        self._end(",".join(sorted(self._finish)))
        self._metrics.e2e.labels(self._model).observe(time.perf_counter() - self._started)
        if self._last_chunk is not None:
            usage = self._last_chunk.usage
            self._metrics.prompt_tokens.labels(self._model).observe(usage.prompt_tokens)
            self._metrics.generation_tokens.labels(self._model).observe(usage.completion_tokens)

    def failed(self, error: ApiError) -> None:
        """The client was told of an error instead of the rest."""
        reason = abort_reason(error)
        self._metrics.aborted(self._model, reason)
        self._end(reason)

    def released(self) -> None:
        """Nobody reads on. Where that is news, the client has left."""
        if not self._over:
            self._metrics.aborted(self._model, "disconnect")
            self._end("disconnect")

    def _end(self, finish: str) -> None:
        self._over = True
        self.answered.finish = finish
        if self._last_chunk is not None:
            self.answered.prompt_tokens = self._last_chunk.usage.prompt_tokens
            self.answered.completion_tokens = self._last_chunk.usage.completion_tokens
