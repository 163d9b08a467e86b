"""What a gate itself costs: forward and backward of the trained gates, on the tokens that reach them.

All gates take turns in an order that rotates, and ratios are taken within a round, so that a slow spell of the machine
hits all of them. One thread, nothing else of ours beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gates import Gate, GateInput, Mode
from launch.config_file import load_config
from launch.data import EvalWindows, prepare_data
from launch.gate_comparison.results import GateResult
from launch.memory import keep_freed_memory
from launch.run_dir import CONFIG_FILE, MODEL_FOLDER
from moe.checkpoint import load_model
from moe.transformer import ForwardContext

ROUNDS, WARM_UP = 15, 3
REFERENCE = "topk"


@dataclass(frozen=True)
class GateCost:
    """Time of one layer's gate in a micro-batch of training, a mean over layers.

    Attributes:
        ms: median over rounds.
        ratio: to ``reference``'s, median over rounds.
    """

    ms: float
    ratio: float
    reference: str


def measure_gates(gates: Sequence[GateResult], rounds: int = ROUNDS) -> dict[str, GateCost]:
    """Time the gates of every first finished run, on validation text. By label."""
    calls = {gate.label: _capture(gate) for gate in gates}
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        labels = list(calls)
        for number in range(WARM_UP + rounds):
            turn = number % len(labels)
            for label in labels[turn:] + labels[:turn]:
                took = _time(calls[label])
                if number >= WARM_UP:
                    seconds[label].append(took)
    finally:
        torch.set_num_threads(threads)
    return against_reference(seconds)


def against_reference(seconds: Mapping[str, Sequence[float]]) -> dict[str, GateCost]:
    reference = REFERENCE if REFERENCE in seconds else min(seconds, key=lambda label: statistics.median(seconds[label]))
    return {
        label: GateCost(
            1000 * statistics.median(times),
            statistics.median(a / b for a, b in zip(times, seconds[reference], strict=True)),
            reference,
        )
        for label, times in seconds.items()
    }


def _capture(gate: GateResult) -> list[tuple[Gate, GateInput]]:
    """Each layer's gate and what it is given in one micro-batch of training, as after the last step."""
    folder = gate.runs[0].folder
    config = load_config(str(folder / CONFIG_FILE), world_size=1).config
    loaded = load_model(folder / MODEL_FOLDER)
    data = prepare_data(config.data, seq_len=config.train.seq_len, progress=False)
    windows = EvalWindows(data.validation, config.train.seq_len, data.tokenizer)
    rows = min(config.train.micro_batch or config.train.global_batch, windows.num_sequences)
    ids_BS, _ = windows.rows(0, rows)
    caught: list[tuple[Gate, GateInput]] = []

    def catch(module: torch.nn.Module, args: tuple[GateInput]) -> None:
        assert isinstance(module, Gate)
        caught.append((module, replace(args[0], x_TD=args[0].x_TD.detach().float().requires_grad_())))

    steps = config.train.steps
    loaded.model.train()
    handles = []
    for _, layer_gate in loaded.model.gates():
        layer_gate.begin_step(steps - 1, steps)
        handles.append(layer_gate.register_forward_pre_hook(catch))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        loaded.model(ids_BS[:, :-1], context=ForwardContext(step=steps - 1, mode=Mode.TRAIN, rng=rng))
    for handle in handles:
        handle.remove()
    return caught


def _time(layers: Sequence[tuple[Gate, GateInput]]) -> float:
    """Seconds per layer: route, then gradients of the weights and of every loss by its coefficient."""
    begin = time.perf_counter()
    for gate, inp in layers:
        inp.x_TD.grad = None
        gate.zero_grad()
        coefs = gate.config.aux_coefs()
        out = gate(inp)
        loss = out.plan.weight_N.square().sum()  # their plain sum is constant for most gates
        if out.added_TD is not None:
            loss = loss + out.added_TD.square().sum()
        for name, value in out.aux.items():
            loss = loss + coefs.get(name, 1.0) * value
        if loss.requires_grad:
            loss.backward()
    return (time.perf_counter() - begin) / len(layers)
