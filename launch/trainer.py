"""The training loop: data -> forward -> backward -> reduce -> optimizer, and what hangs on it.

Everything here is the same on every rank; what only rank 0 does (printing, files, pictures) sits in callbacks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gates import GateNumericsError, Mode
from launch.callbacks.base import Callback
from launch.config import COMPUTE_DTYPES, TrainConfig
from launch.data import EvalWindows, TrainSampler
from launch.evaluate import evaluate
from launch.interrupt import EXIT_CODE as INTERRUPTED
from launch.interrupt import Interrupt
from launch.memory import peak_memory_gib
from launch.nan_watch import first_bad_gradient, first_bad_module
from launch.optim import learning_rate, set_learning_rate
from launch.phase_timer import PhaseTimer
from launch.records import EvalRecord, LogRecord, SampleRecord
from launch.step_stats import Interval, StepStats
from moe import Tokenizer, Transformer
from moe.errors import CheckpointError, NumericsError
from moe.generate import SamplingParams, generate
from moe.transformer import ForwardContext, ModelOutput, next_token_loss
from parallel.checkpoint import CheckpointWriter, training_tensors
from parallel.chrome_trace import chrome_trace
from parallel.model import ParallelModel
from parallel.topology import Topology

WAY_OUT = "A lower optim.lr or a longer optim.warmup_steps usually helps."


class Trainer:
    """One run's training state and the loop over it. ``step`` is the number of finished optimizer steps."""

    def __init__(
        self,
        config: TrainConfig,
        topology: Topology,
        model: Transformer,
        parallel: ParallelModel,
        optimizer: torch.optim.Optimizer,
        sampler: TrainSampler,
        validation: EvalWindows,
        tokenizer: Tokenizer,
        writer: CheckpointWriter,
        callbacks: Callback,
        interrupt: Interrupt,
    ) -> None:
        self.config = config
        self.topology = topology
        self.model = model
        self.parallel = parallel
        self.optimizer = optimizer
        self.sampler = sampler
        self.validation = validation
        self.tokenizer = tokenizer
        self.writer = writer
        self.callbacks = callbacks
        self.interrupt = interrupt
        self.timer = PhaseTimer(topology.device)
        self.compute_dtype = COMPUTE_DTYPES[config.train.compute_dtype]
        self.step = 0
        self.elapsed_s = 0.0
        self.interval = Interval()
        self._moe_layers = model.moe_layers()
        self._rows = config.train.global_batch // topology.world_size
        self._micro = config.train.micro_batch or self._rows
        self._grad_norm = float("nan")
        self._since_log = (time.perf_counter(), 0)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the last step. Returns the exit code: 0, or 130 after an interrupt.

        Raises:
            NumericsError: the loss or a gradient became NaN or infinite; no checkpoint was written from that state.
            CheckpointError: the final checkpoint could not be written.
        """
        with self.interrupt.deferred():
            try:
                return self._loop()
            except RuntimeError as error:
                # Collectives of dense parameters do not say themselves what they were for.
                error.add_note(f"in step {self.step + 1}, {self.timer.latest}")
                raise

    def _loop(self) -> int:
        config, begun = self.config, time.perf_counter() - self.elapsed_s
        self._since_log = (time.perf_counter(), self.step)
        while self.step < config.train.steps:
            traced = self.step + 1 == config.track.chrome_trace_step
            if traced:
                self.parallel.begin_trace()
            stats = self._train_step()
            self.step += 1
            self.elapsed_s = time.perf_counter() - begun
            self.interval.add(stats)
            self.callbacks.on_step(self.step)
            if stats.load_LWE is not None:
                self.callbacks.on_loads(self.step, stats.load_LWE)
            if traced:
                self.callbacks.on_step_trace(self.step, chrome_trace(self.parallel.take_trace()))
            last = self.step == config.train.steps
            if _due(self.step, config.track.log_interval) or last:
                with self.timer.phase("log"):
                    self._log()
            if stats.stop and not last:
                return self._stop("interrupted", INTERRUPTED)
            if _due(self.step, config.eval.interval) and not last:
                with self.timer.phase("eval"):
                    self._evaluate(final=False)
            if _due(self.step, config.eval.sample_interval) and not last:
                with self.timer.phase("sample"):
                    self._sample()
            if _due(self.step, config.checkpoint.interval) and not last:
                with self.timer.phase("checkpoint"):
                    self._checkpoint(must_succeed=False)
            if self.step == config.train.stop_after and not last:
                return self._stop("train.stop_after", 0)
        self._checkpoint(must_succeed=True)
        self._evaluate(final=True)
        self._sample()
        self.writer.close()
        return 0

    def _train_step(self) -> StepStats:
        """One optimizer step: accumulate over micro-batches, sum over ranks, check, clip, update."""
        step, timer = self.step, self.timer
        tokens_per_step = self.config.train.global_batch * self.config.train.seq_len
        stats = StepStats(len(self._moe_layers), self.config.model.moe.num_experts)
        self.model.train()
        for _, gate in self.model.gates():
            gate.begin_step(step, self.config.train.steps)
        with timer.phase("optimizer"):
            self.parallel.begin_step()
        for row, ids_BS, last in self._micro_batches(step):
            self.parallel.forward_begins(last)
            try:
                with timer.phase("forward"):
                    output, nats, tokens = self._forward(ids_BS, step, row)
                    # The one divisor rule: a term weighs its share of the step's tokens; gradients are summed.
                    loss = nats / tokens_per_step + output.aux_loss() * (tokens / tokens_per_step)
            except GateNumericsError as error:
                if self.config.gate.reduces_in_forward() or self.parallel.in_lockstep:
                    # The others wait in a collective of their own forward: only this rank's end can tell them.
                    raise NumericsError(f"step {step + 1}: {error}. {WAY_OUT}") from error
                stats.bad = True  # the other ranks learn of it in this step's collectives
                break
            stats.add(output, nats, tokens)
            with timer.phase("backward"):
                self.parallel.backward(loss, last)
        with timer.phase("reduce"):
            stats.stop = self.interrupt.requested
            self.parallel.finish()
            if self.config.track.load_trace:
                stats.load_LWE = self.parallel.loads_by_rank(stats.load_LE)
            stats.reduce(self.topology)
        with timer.phase("optimizer"):
            norm = self.parallel.grad_norm()
            self._grad_norm = float(norm)
            if stats.bad or not np.isfinite(stats.loss) or not np.isfinite(self._grad_norm):
                self._fail_on_nan(stats)
            self.parallel.clip_(norm, self.config.optim.clip_norm)
            set_learning_rate(self.optimizer, learning_rate(step, self.config.train.steps, self.config.optim))
            self.optimizer.step()
            for row_index, (_, gate) in enumerate(self.model.gates()):
                gate.end_step(stats.offered_LE[row_index], stats.signals_L[row_index])
            self.parallel.end_step(stats.load_LE, self.optimizer)
        return stats

    def _micro_batches(self, step: int) -> Iterator[tuple[int, Tensor, bool]]:
        """(first global row, ids (B, S + 1), is it the last) of each micro-batch of this rank."""
        begin = self.topology.rank * self._rows
        for first in range(begin, begin + self._rows, self._micro):
            with self.timer.phase("data"):
                ids_BS = torch.as_tensor(self.sampler.rows(step, first, first + self._micro))
                ids_BS = ids_BS.to(self.topology.device, torch.int64)
            yield first, ids_BS, first + self._micro >= begin + self._rows

    def _forward(self, ids_BS: Tensor, step: int, row: int, *, alone: bool = False) -> tuple[ModelOutput, Tensor, int]:
        """Model output, summed nats and token count; gate noise is a pure function of (seed, step, first row).

        Args:
            alone: other ranks do not do the same, so nothing may be summed over them.
        """
        seed = int(np.random.SeedSequence([self.config.run.seed, step, row]).generate_state(1, np.uint64)[0] >> 1)
        context = ForwardContext(
            step=step,
            row=row,
            mode=Mode.TRAIN,
            rng=torch.Generator().manual_seed(seed),
            reduce_load=(lambda load: self.topology.sum_(load.clone()))
            if self.topology.world_size > 1 and not alone
            else None,
            compute_dtype=self.compute_dtype,
        )
        output = self.model(ids_BS[:, :-1], context=context)
        nats, tokens = next_token_loss(output.logits_BTV, ids_BS[:, 1:])
        return output, nats, int(tokens)

    # --- what hangs on the loop -------------------------------------------------------------------------------------

    def _log(self) -> None:
        now = time.perf_counter()
        since, step_then = self._since_log
        steps = max(1, self.step - step_then)
        tokens_per_step = self.config.train.global_batch * self.config.train.seq_len
        seconds_per_step = (now - since) / steps
        record = LogRecord(
            step=self.step,
            loss=self.interval.loss,
            aux=self.interval.means("aux"),
            gate=self.interval.means("gate"),
            lr=learning_rate(self.step - 1, self.config.train.steps, self.config.optim),
            grad_norm=self._grad_norm,
            tokens_per_s=tokens_per_step / seconds_per_step,
            tokens_seen=self.step * tokens_per_step,
            elapsed_s=self.elapsed_s,
            eta_s=(self.config.train.steps - self.step) * seconds_per_step,
            imbalance=self.interval.imbalance(),
            dead_expert_fraction=self.interval.dead_expert_fraction(),
            dropped_fraction=self.interval.dropped_fraction(),
            memory_gib=peak_memory_gib(self.topology.device),
            load_LE=self.interval.load_LE,
            phase_s={name: seconds / steps for name, seconds in sorted(self.timer.take().items())},
            engine=self.parallel.take_metrics(),
        )
        self.interval = Interval()
        self._since_log = (now, self.step)
        self.callbacks.on_log(record)
        try:
            self.writer.poll()
        except CheckpointError as error:
            self._warn(error)

    def _evaluate(self, final: bool) -> None:
        start = time.perf_counter()
        limit = self.config.eval.final_sequences if final else self.config.eval.sequences
        with self._numerics("evaluation"), self.parallel.inference():
            result = evaluate(
                self.model,
                self.validation,
                self.topology,
                limit=limit,
                batch=self._micro,
                compute_dtype=self.compute_dtype,
                in_lockstep=self.parallel.in_lockstep,
            )
        record = EvalRecord(
            step=self.step,
            loss=result.loss,
            bits_per_byte=result.bits_per_byte,
            tokens=result.tokens,
            text_bytes=result.text_bytes,
            elapsed_s=time.perf_counter() - start,
            load_LE=result.load_LE,
            final=final,
            surrogate=result.surrogate,
        )
        self.callbacks.on_eval(record)

    def _sample(self) -> None:
        self.model.eval()
        with self.parallel.first_rank_computes(self._forward_nothing) as computes:
            if computes:
                self._write_sample()

    def _forward_nothing(self) -> None:
        nothing = torch.zeros(0, 1, dtype=torch.int64, device=self.topology.device)
        self.model(nothing, context=ForwardContext(mode=Mode.EVAL))

    def _write_sample(self) -> None:
        config = self.config.eval
        prompt = self.tokenizer.encode(config.sample_prompt) if config.sample_prompt else [self.tokenizer.eos_id]
        prompt = prompt[-(self.config.model.max_seq_len - 1) :]
        room = self.config.model.max_seq_len - len(prompt)
        params = SamplingParams(
            max_tokens=min(config.sample_tokens, room), temperature=0.8, top_p=0.95, seed=self.config.run.seed
        )
        with self._numerics("sample"):
            tokens = [step.token for step in generate(self.model, prompt, params, eos_id=self.tokenizer.eos_id)]
        record = SampleRecord(self.step, config.sample_prompt, self.tokenizer.decode(tokens))
        self.callbacks.on_sample(record)

    @contextmanager
    def _numerics(self, what: str) -> Iterator[None]:
        """Scores that are not finite end the run with the step and the place."""
        try:
            yield
        except GateNumericsError as error:
            raise NumericsError(f"{what} after step {self.step}: {error}. {WAY_OUT}") from error

    def _checkpoint(self, must_succeed: bool) -> None:
        tensors = training_tensors(self.model, self.optimizer)
        tensors |= random_state(self.topology)
        try:
            failure = self.writer.save(self.step, tensors, self.state_values())
            if failure:
                self._warn(failure)
            if must_succeed:
                self.writer.wait()
        except CheckpointError as error:
            if must_succeed:
                raise
            self._warn(error)

    def _warn(self, error: CheckpointError) -> None:
        self.callbacks.on_message(f"warning: {error}; training goes on")

    def _stop(self, why: str, exit_code: int) -> int:
        """Save and end before the last step."""
        self._checkpoint(must_succeed=True)
        self.writer.close()
        self.callbacks.on_message(f"{why}: step {self.step} of {self.config.train.steps} is saved")
        return exit_code

    def _fail_on_nan(self, stats: StepStats) -> None:
        """Say what went bad first, on the lowest rank that can tell, and stop every rank."""
        found = None
        # Tokens travel between ranks: a forward pass that one rank breaks off would leave the others waiting.
        alone = [] if self.parallel.in_lockstep else self._micro_batches(self.step)
        for row, ids_BS, _ in alone:

            def forward(ids_BS: Tensor = ids_BS, row: int = row) -> object:
                return self._forward(ids_BS, self.step, row, alone=True)

            found = found or first_bad_module(self.model, forward)
        found = found or first_bad_gradient(self.model)
        everyone = [text for text in self.topology.gather_objects(found) if text]
        try:
            self.writer.close()
        except CheckpointError as error:
            self._warn(error)
        raise NumericsError(
            f"step {self.step + 1}: loss {stats.loss:.4g}, gradient norm {self._grad_norm:.4g}. "
            + (everyone[0] if everyone else "no single layer is to blame: the forward pass is finite when repeated")
            + f". Training stopped before the weights were touched. {WAY_OUT}"
        )

    # --- state ------------------------------------------------------------------------------------------------------

    def state_values(self) -> dict[str, Any]:
        """Plain values of a checkpoint, beside its tensors."""
        return {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "interval": self.interval.to_values(),
            "world_size": self.topology.world_size,
            "device": self.topology.device.type,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "vocab_size": self.model.config.vocab_size,
            "data_fingerprint": self.sampler.fingerprint,
            "parallel": self.parallel.state(),
            "config": self.config.model_dump(mode="json"),
        }

    def restore_values(self, values: dict[str, Any]) -> None:
        """Continue from the plain values of a checkpoint."""
        self.step = int(values["step"])
        self.elapsed_s = float(values["elapsed_s"])
        self.interval = Interval.from_values(values["interval"])


def random_state(topology: Topology) -> dict[str, Tensor]:
    """torch's random state on this rank: the one thing in a checkpoint that belongs to a rank, not to the model."""
    states = {f"rng.rank_{topology.rank}.torch": torch.get_rng_state()}
    if topology.device.type == "cuda":
        states[f"rng.rank_{topology.rank}.cuda"] = torch.cuda.get_rng_state(topology.device)
    return states


def set_random_state(topology: Topology, states: Mapping[str, Tensor]) -> None:
    """What :func:`random_state` gave, back in place."""
    torch.set_rng_state(states[f"rng.rank_{topology.rank}.torch"])
    if topology.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"rng.rank_{topology.rank}.cuda"], topology.device)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
