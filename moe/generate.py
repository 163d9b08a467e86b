"""Text generation for one sequence: sampling rules, and the loop over a contiguous key-value cache.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gates import Mode
from moe.attention import KVCache as KVCache
from moe.errors import UserError
from moe.transformer import ForwardContext, Transformer


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: divides the logits; 0 takes the likeliest token (ties: the lowest id).
        top_k: keep only the k likeliest tokens; None keeps all.
        top_p: keep the smallest set of likeliest tokens whose probabilities reach this sum (arXiv:1904.09751).
        seed: seed of the random stream; None draws a fresh one.
        stop_ids: tokens that end generation.
        ignore_eos: do not end at the end-of-text token.
        top_logprobs: how many of the likeliest tokens each step reports.

    Raises:
        UserError: a value out of range.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "max_tokens": (self.max_tokens >= 0, "at least 0"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "top_logprobs": (self.top_logprobs >= 0, "at least 0"),
        }
        for name, (fine, rule) in allowed.items():
            if not fine:
                raise UserError(f"{name}: must be {rule}, got {getattr(self, name)}")


@dataclass(frozen=True)
class TokenStep:
    """One generated token.

    Attributes:
        token: its id.
        logprob: its natural-log probability under the model, before temperature and cuts.
        top: (token, logprob) of the likeliest tokens, best first; as many as ``top_logprobs`` asked for.
        finish: set on the last step: "stop" when ``token`` is the end-of-text or a stop token, which is not part of
            the text; "length" when ``max_tokens`` or the model's context is used up.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    finish: Literal["stop", "length"] | None = None


def keep_likely(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """(V,) logits over the temperature, with -inf for tokens that top_k and then top_p cut. At least one is left.

    ``params.temperature`` must not be 0.
    """
    logits_V = logits_V / params.temperature
    if params.top_k is not None and params.top_k < logits_V.numel():
        kept = torch.topk(logits_V, params.top_k).indices
        logits_V = torch.full_like(logits_V, float("-inf")).index_copy(0, kept, logits_V[kept])
    if params.top_p < 1:
        prob_V, order_V = torch.softmax(logits_V, -1).sort(descending=True, stable=True)
        # Cut where the tokens before already reach top_p, so the one that crosses the line is kept.
        cut_V = prob_V.cumsum(-1) - prob_V >= params.top_p
        logits_V = logits_V.index_fill(0, order_V[cut_V], float("-inf"))
    return logits_V


def sample_token(logits_V: Tensor, params: SamplingParams, rng: torch.Generator | None = None) -> int:
    """One token id from (V,) logits by ``params``. Pure but for ``rng``.

    Args:
        logits_V: scores of any float dtype, on any device; -inf forbids a token.
        params: temperature, top_k and top_p are read.
        rng: source of randomness, on any device; None uses torch's global CPU one. Not read at temperature 0.

    Raises:
        UserError: the scores are NaN, so the model is damaged or its training diverged.
    """
    logits_V = logits_V.detach().float().to(rng.device if rng is not None else "cpu")
    if bool(torch.isnan(logits_V).any()):
        raise UserError("the model's scores are NaN: its weights are damaged or its training diverged")
    if params.temperature == 0:
        # argmax does not promise which of equal values it returns.
        return int((logits_V == logits_V.max()).nonzero()[0])
    return int(torch.multinomial(torch.softmax(keep_likely(logits_V, params), -1), 1, generator=rng))


def token_step(logits_V: Tensor, params: SamplingParams, rng: torch.Generator | None = None) -> TokenStep:
    """:func:`sample_token` with the log-probabilities that it is reported with; ``finish`` is not set."""
    token = sample_token(logits_V, params, rng)
    logprob_V = torch.log_softmax(logits_V.float(), -1)
    values, ids = torch.topk(logprob_V, min(params.top_logprobs, logprob_V.numel()))
    return TokenStep(token, float(logprob_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    eos_id: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Iterator[TokenStep]:
    """Continue ``prompt_ids``, one token after another.

    The prompt is computed in one pass (mode PREFILL), then each token in its own (mode DECODE); a gate that looks at
    the whole batch is replaced by its causal surrogate in both. The model is put in no other mode than it is in: call
    ``model.eval()`` first.

    Args:
        model: the language model.
        prompt_ids: at least one token id; a text from nothing starts with the end-of-text token.
        params: sampling rules; None means the defaults.
        eos_id: end-of-text token; ends generation unless ``params.ignore_eos``.
        compute_dtype: dtype of activations; None takes that of the parameters.

    Yields:
        A step per token, as soon as it is known. The last one has ``finish`` set; its token is the end-of-text or
        stop token itself when that is "stop".

    Raises:
        UserError: the prompt is empty, too long, or has ids outside the vocabulary; or the gate cannot generate.
    """
    params = params or SamplingParams()
    vocab, context_len = model.embed.num_embeddings, model.config.max_seq_len
    prompt = list(prompt_ids)
    if not prompt:
        raise UserError("the prompt has no tokens; start a text from nothing with the end-of-text token")
    foreign = [token for token in prompt if not 0 <= token < vocab]
    if foreign:
        raise UserError(f"the prompt has token {foreign[0]}, the model's vocabulary ends at {vocab - 1}")
    if len(prompt) >= context_len:
        raise UserError(f"the prompt has {len(prompt)} tokens; the model's context of {context_len} leaves no room")
    stop_ids = params.stop_ids if eos_id is None or params.ignore_eos else params.stop_ids | {eos_id}
    max_tokens = min(params.max_tokens, context_len - len(prompt))
    rng = torch.Generator()
    if params.seed is None:
        rng.seed()
    else:
        rng.manual_seed(params.seed)

    device = model.embed.weight.device
    dtype = compute_dtype or model.embed.weight.dtype
    cache = KVCache(model.config, capacity=len(prompt) + max_tokens, dtype=dtype, device=device)
    new, mode, count = prompt, Mode.PREFILL, 0
    while count < max_tokens:
        context = ForwardContext(mode=mode, compute_dtype=dtype)
        logits_BTV = model(torch.tensor([new], device=device), context=context, cache=cache, last_only=True).logits_BTV
        step = token_step(logits_BTV[0, -1], params, rng)
        count += 1
        finish: Literal["stop", "length"] | None = None
        if step.token in stop_ids:
            finish = "stop"
        elif count == max_tokens:
            finish = "length"
        yield replace(step, finish=finish)
        if finish:
            return
        new, mode = [step.token], Mode.DECODE
