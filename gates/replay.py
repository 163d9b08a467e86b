"""Replay: the routing of an earlier run, expert by expert; for benchmarks and for finding out what routing changes.

:func:`record_routing` notes what the gates of a model choose while it trains; the file is read by
``gate: {name: replay, path: FILE}``. What was recorded for a micro-batch of a step is repeated for the one that begins
with the same sequence of the global batch; after the last recorded step the first one follows. Only training is
recorded and repeated: evaluation and generation choose by the gate's own logits, whose weights are learned meanwhile.

Shape suffixes: T tokens, E experts, N pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gates.base import Gate, GateInput, GateOutput, Mode
from gates.linear import LinearGate, LinearGateConfig
from gates.plan import RoutingPlan
from gates.registry import register_gate
from gates.scores import top_k

Recorded = dict[tuple[int, int, int], tuple[Tensor, Tensor]]
"""(step, layer, row) -> (row_ptr_T1, expert_N) of the micro-batch that begins with that sequence."""


class ReplayConfig(LinearGateConfig):
    """Options of replayed routing."""

    name: Literal["replay"] = "replay"
    path: str = Field("", description="file that record_routing() wrote; there is no default")
    strict: bool = Field(
        True,
        description="what is trained must be what was recorded; false: any micro-batch repeats the first recorded one"
        " of its step, from the start again where it has more tokens",
    )
    k: int = Field(2, ge=1, description="experts per token in evaluation and generation")

    def experts_per_token(self, num_experts: int) -> float:
        """k, whatever was recorded."""
        return float(min(self.k, num_experts))

    def files(self) -> dict[str, str]:
        """The recording."""
        return {"path": self.path} if self.path else {}

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        problems = []
        if not self.path:
            problems.append("path: name the file to repeat; gates.record_routing(model, path) writes one")
        if self.k > num_experts:
            problems.append(f"k: {self.k} experts per token, but there are only {num_experts}")
        return problems


@register_gate("replay")
class ReplayGate(LinearGate):
    """A linear gate that repeats another run's choice in training. See the module."""

    config_type = ReplayConfig
    config: ReplayConfig
    interchangeable_experts = False
    weight_sum = "one"

    def __init__(self, config: ReplayConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        self._recorded: Recorded = {}
        self._steps = 0

    @property
    def trains_as_it_serves(self) -> bool:
        """No: only training repeats what was recorded."""
        return False

    def choose(self, logits_TE: Tensor, inp: GateInput) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """See :meth:`LinearGate.choose`."""
        if inp.mode is not Mode.TRAIN:
            return RoutingPlan.from_topk(top_k(logits_TE, self.config.k), logits_TE, self.num_experts), {}
        if not self._recorded:
            self._recorded, self._steps = load_routing(self.config.path, self.num_experts)
        key = (inp.step % self._steps, inp.layer, inp.row)
        if not self.config.strict:
            return self._repeated(min(found for found in self._recorded if found[0] == key[0]), logits_TE), {}
        if key not in self._recorded:
            step, layer, row = key
            raise ValueError(
                f"gate 'replay': {self.config.path} has nothing for step {step}, layer {layer}, sequence {row}: it was"
                " recorded with another model, batch or micro-batch"
            )
        row_ptr_T1, expert_N = self._recorded[key]
        if row_ptr_T1.numel() - 1 != logits_TE.shape[0]:
            raise ValueError(
                f"gate 'replay': {self.config.path} has {row_ptr_T1.numel() - 1} tokens for step {key[0]}, layer"
                f" {key[1]}, sequence {key[2]}; {logits_TE.shape[0]} are to be routed"
            )
        expert_N = expert_N.to(logits_TE.device)
        load_E = torch.bincount(expert_N, minlength=self.num_experts)
        weight_N = logits_TE.new_zeros(expert_N.numel())
        row_ptr_T1 = row_ptr_T1.to(logits_TE.device)
        return RoutingPlan(row_ptr_T1, expert_N, weight_N, self.num_experts, load_E, load_E), {}

    def _repeated(self, key: tuple[int, int, int], logits_TE: Tensor) -> RoutingPlan:
        """The rows of one micro-batch over and over."""
        row_ptr_T1, expert_N = self._recorded[key]
        size_T = row_ptr_T1.diff()
        token_T = torch.arange(logits_TE.shape[0]) % max(1, size_T.numel())
        mask_RE = torch.zeros(size_T.numel(), self.num_experts, dtype=torch.bool)
        mask_RE[torch.arange(size_T.numel()).repeat_interleave(size_T), expert_N] = True
        return RoutingPlan.from_mask(mask_RE[token_T].to(logits_TE.device), logits_TE)

    def weigh(self, logits_TE: Tensor, chosen: RoutingPlan, inp: GateInput) -> RoutingPlan:
        """Softmax over the chosen logits."""
        return chosen.with_weight(chosen.softmax_rows(chosen.pick(logits_TE)))


@contextmanager
def record_routing(model: nn.Module, path: str | Path) -> Iterator[None]:
    """Record what every gate of ``model`` chooses in training within this block; written to ``path`` at its end.

    On one process: of several, each would write what its own tokens did.
    """
    recorded: dict[str, Tensor] = {}

    def note(gate: nn.Module, args: tuple[Any, ...], out: GateOutput) -> None:
        inp = args[0]
        if isinstance(inp, GateInput) and inp.mode is Mode.TRAIN:
            prefix = f"{inp.step}.{inp.layer}.{inp.row}"
            recorded[prefix + ".row_ptr_T1"] = out.plan.row_ptr_T1.cpu()
            recorded[prefix + ".expert_N"] = out.plan.expert_N.cpu()

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Gate)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    torch.save(recorded, path)


def load_routing(path: str | Path, num_experts: int) -> tuple[Recorded, int]:
    """What :func:`record_routing` wrote, steps counted from 0, and how many there are.

    Raises:
        ValueError: the file cannot be read, is empty, or names experts that are not there.
    """
    try:
        values = torch.load(path, weights_only=True)
        found = {tuple(map(int, key.split(".")[:3])) for key in values}
        first = min((step for step, _, _ in found), default=0)
        recorded: Recorded = {
            (step - first, layer, row): (
                values[f"{step}.{layer}.{row}.row_ptr_T1"],
                values[f"{step}.{layer}.{row}.expert_N"],
            )
            for step, layer, row in found
        }
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
        UnpicklingError,
    ) as error:
        raise ValueError(f"gate.path: cannot read {path} as recorded routing: {error}") from error
    if not recorded:
        raise ValueError(f"gate.path: {path} holds no step: nothing was trained while it was recorded")
    most = max((int(expert_N.max()) for _, expert_N in recorded.values() if expert_N.numel()), default=0)
    if most >= num_experts:
        raise ValueError(f"gate.path: {path} routes to expert {most}, but there are only {num_experts} experts")
    return recorded, 1 + max(step for step, _, _ in recorded)
