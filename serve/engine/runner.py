"""The model behind an engine: token ids in, scored tokens out, experts counted. One sequence at a time.

Shape suffixes: L MoE layers, E experts, V vocabulary, T positions, B = 1.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gates import Mode
from moe.attention import KVCache
from moe.generate import SamplingParams, sample_token
from moe.transformer import ForwardContext, Transformer
from serve.client import SamplingOptions
from serve.engine.logits import adjusted

SEED_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with natural-log probabilities of the unchanged model.

    Attributes:
        logprob: None when nobody asked, and for the first token of a prompt, which nothing predicts.
        top: the likeliest tokens, best first.
        ends: the token ends the sequence and is not part of its text.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    ends: bool = False


class ModelRunner:
    """Runs one model from one thread.

    Args:
        model: in evaluation mode from here on.
        end_ids: tokens that end a sequence unless a request ignores them.
    """

    def __init__(self, model: Transformer, end_ids: frozenset[int]) -> None:
        self.model = model.eval()
        self.end_ids = end_ids
        weight = model.embed.weight
        self._device, self._dtype = weight.device, weight.dtype
        experts, layers = model.config.moe.num_experts, model.config.num_moe_layers
        self._load_LE = torch.zeros(layers, experts, dtype=torch.int64, device=self._device)

    def use_threads(self, threads: int | None) -> None:
        """Sets torch's compute threads for the calling thread and those that start later; None changes nothing."""
        if threads is not None:
            torch.set_num_threads(threads)

    def warm_up(self, token_id: int) -> None:
        """Two passes, so that no request pays for lazy initialisation; they do not count as load."""
        budget = min(2, self.model.config.max_seq_len - 1)
        for _ in self.steps([token_id], SamplingOptions(temperature=0.0, ignore_eos=True), 0, budget):
            pass
        self._load_LE.zero_()

    def expert_load(self) -> tuple[tuple[int, ...], ...]:
        """(L, E) tokens that each expert has taken since start."""
        return tuple(tuple(load_E) for load_E in self._load_LE.tolist())

    def score(self, ids: Sequence[int], top: int) -> list[Scored]:
        """Log-probabilities of a prompt's own tokens, and of the ``top`` likeliest at each position.

        The pass repeats the prefill, so it does not count as load a second time.
        """
        scored = [Scored(ids[0], None)]
        if len(ids) > 1:
            with torch.inference_mode():
                context = ForwardContext(mode=Mode.PREFILL)
                logits_TV = self.model(self._tensor(ids[:-1]), context=context).logits_BTV[0]
                logprob_TV = torch.log_softmax(logits_TV.float().cpu(), -1)
            scored += [_scored(token, logprob_V, top) for token, logprob_V in zip(ids[1:], logprob_TV, strict=True)]
        return scored

    def steps(
        self, prompt_ids: Sequence[int], options: SamplingOptions, seed: int, budget: int
    ) -> Generator[Scored, None, None]:
        """The loop of :func:`moe.generate.generate`, with the experts counted; stop strings are the caller's.

        The same seed gives the same tokens: nothing else is random, and no other request shares a batch. Ends after
        ``budget`` tokens, or with a token that ``ends`` the sequence.
        """
        ends = frozenset(options.stop_token_ids) | (frozenset() if options.ignore_eos else self.end_ids)
        params = SamplingParams(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
        rng = torch.Generator().manual_seed(seed & SEED_MASK)
        cache = KVCache(self.model.config, capacity=len(prompt_ids) + budget, dtype=self._dtype, device=self._device)
        output: list[int] = []
        new, mode = list(prompt_ids), Mode.PREFILL
        while len(output) < budget:
            logits_V = self._forward(new, mode, cache)
            token = sample_token(adjusted(logits_V, options, prompt_ids, output, ends), params, rng)
            output.append(token)
            scored = Scored(token, None)
            if options.logprobs is not None:
                scored = _scored(token, torch.log_softmax(logits_V, -1), options.logprobs)
            yield replace(scored, ends=token in ends)
            if token in ends:
                return
            new, mode = [token], Mode.DECODE

    # Not around the loop of `steps`: a suspended generator would leave its caller in inference mode.
    @torch.inference_mode()
    def _forward(self, ids: Sequence[int], mode: Mode, cache: KVCache) -> Tensor:
        """(V,) fp32 logits of the token after ``ids``, on the CPU, where they are sampled."""
        output = self.model(self._tensor(ids), context=ForwardContext(mode=mode), cache=cache, last_only=True)
        for load_E, routing in zip(self._load_LE, output.routing, strict=True):
            load_E += routing.output.plan.load_E
        logits_V: Tensor = output.logits_BTV[0, -1].float().cpu()
        return logits_V

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], dtype=torch.int64, device=self._device)


def _scored(token: int, logprob_V: Tensor, top: int) -> Scored:
    best = torch.topk(logprob_V, min(top, logprob_V.numel()))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Scored(token, float(logprob_V[token]), tuple(pairs))
