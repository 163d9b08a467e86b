"""From options to a run: read the config, join the ranks, prepare data, build or restore the training state, train.

Read :func:`train` from top to bottom: it is the order in which a run comes to be.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from launch.callbacks.base import Callback, CallbackList
from launch.config import COMPUTE_DTYPES, TrainConfig
from launch.data import EvalWindows, PreparedData, TrainSampler, prepare_data
from launch.export import TOKENIZER_FOLDER, export_checkpoint, export_model
from launch.interrupt import Interrupt
from launch.memory import keep_freed_memory
from launch.optim import build_optimizer
from launch.records import RunInfo
from launch.run_dir import CHECKPOINT_FOLDER, MODEL_FOLDER, RunDir, RunDirError
from launch.trainer import Trainer, random_state, set_random_state
from moe import Tokenizer, Transformer
from moe.config import count_params, flops_per_token
from moe.errors import CheckpointError, ConfigError, TokenizerError
from parallel.checkpoint import (
    CheckpointInfo,
    CheckpointWriter,
    find_checkpoint,
    load_tensors,
    read_checkpoint,
    training_tensors,
)
from parallel.dense import check_in_sync
from parallel.engine import ExpertEngine
from parallel.model import ParallelModel
from parallel.topology import Topology, connect

SHARED_FILES = "all nodes must see run.root on a shared file system"
SHARED_FILES_S = 30.0


def train(args: argparse.Namespace, command: list[str]) -> int:
    """Run what the command line asks for; returns the exit code. Raises UserError for what users can mend."""
    config, checkpoint = resolve(args.config, args.resume, args.overrides)
    if not checkpoint and (missing := config.missing_files()):
        raise ConfigError(missing)
    if args.dry_run:
        from launch.estimate import print_dry_run

        print_dry_run(config)
        return 0
    set_determinism(config)
    keep_freed_memory()
    changes = resumed_changes(config, checkpoint)
    with (
        ExitStack() as held,
        connect(config.parallel.timeout_s) as topology,
        Interrupt(announce=topology.is_first) as interrupt,
    ):
        problems = config.check(topology.world_size)
        if problems:
            raise ConfigError(problems)
        check_same_config(topology, config)
        check_same_checkpoint(topology, checkpoint)
        with topology.first_rank_goes_first():
            data = prepare_data(config.data, seq_len=config.train.seq_len, progress=topology.is_first)
        config = with_vocabulary(config, data.tokenizer, checkpoint)
        model, experts = build_model(config, topology, checkpoint)
        check_in_sync(model, topology)
        parallel = ParallelModel(model, topology, config.parallel, experts)
        held.callback(parallel.close)
        optimizer = build_optimizer(model, config.optim)
        # Before anything in the run directory changes: a damaged checkpoint must leave the others as they are.
        messages = [restore(model, optimizer, checkpoint, topology), *changes] if checkpoint else []
        run_dir = topology.broadcast_object(
            open_run_dir(config, checkpoint, command, data.tokenizer, held) if topology.is_first else None
        )
        check_shared(topology, run_dir)
        callbacks: Callback = CallbackList()
        if topology.is_first:
            from launch.callbacks.build import build_callbacks

            callbacks = build_callbacks(config, run_dir, quiet=args.quiet)
        writer = CheckpointWriter(
            run_dir / CHECKPOINT_FOLDER,
            topology,
            keep_last=config.checkpoint.keep_last,
            async_save=config.checkpoint.async_save,
            resumed_step=checkpoint.step if checkpoint else None,
            on_saved=callbacks.on_checkpoint,
        )
        trainer = Trainer(
            config=config,
            topology=topology,
            model=model,
            parallel=parallel,
            optimizer=optimizer,
            sampler=TrainSampler(data.train, config.run.seed, config.train.seq_len, config.train.global_batch),
            validation=EvalWindows(data.validation, config.train.seq_len, data.tokenizer),
            tokenizer=data.tokenizer,
            writer=writer,
            callbacks=callbacks,
            interrupt=interrupt,
        )
        if checkpoint:
            trainer.restore_values(dict(checkpoint.values))
            if checkpoint.values["data_fingerprint"] != trainer.sampler.fingerprint:
                messages.append("the training data is NOT the one that the checkpoint was trained on")
        elif args.resume:
            messages = [f"no run named {config.run.name!r} under {config.run.root} has a checkpoint: beginning one"]
        callbacks.on_start(run_info(config, topology, trainer, data, run_dir))
        for message in messages:
            callbacks.on_message(message)
        try:
            code = trainer.run()
            if topology.is_first and trainer.step == config.train.steps:
                where = run_dir / MODEL_FOLDER
                if parallel.in_lockstep:  # no rank has the whole model: the checkpoint does
                    saved = read_checkpoint(find_checkpoint(run_dir / CHECKPOINT_FOLDER))
                    export_checkpoint(saved, run_dir / TOKENIZER_FOLDER, where)
                else:
                    export_model(model, data.tokenizer, config, trainer.step, where)
                callbacks.on_message(
                    f"model exported to {where}; serve it with: moeyard serve {shlex.quote(str(run_dir))}"
                )
            elif topology.is_first:
                callbacks.on_message(f"resume with: {resume_command(topology, run_dir, command)}")
        finally:
            # A background save needs the process group that is about to end.
            with suppress(CheckpointError):
                writer.close()
            callbacks.on_end()
        return code


def resolve(
    config_path: str | None, resume: str | None, overrides: Sequence[str]
) -> tuple[TrainConfig, CheckpointInfo | None]:
    """The config and, when resuming, the checkpoint to continue from.

    ``--resume PATH`` without ``--config`` takes the config that the run was started with; overrides apply on top.

    Raises:
        ConfigError: options are wrong, or the model's structure differs from the checkpoint's.
        RunDirError: there is nothing at that path.
        CheckpointError: the checkpoint is damaged, or is none.
    """
    from launch.config_file import config_from_values, load_config, structural_difference
    from launch.run_dir import find_latest_run

    if resume is None:
        return load_config(config_path, list(overrides)).config, None
    if resume == "auto":
        config = load_config(config_path, list(overrides)).config
        run = find_latest_run(config.run.root, config.run.name)
        if run is None or not (run / CHECKPOINT_FOLDER).is_dir():
            return config, None
        path = find_checkpoint(run / CHECKPOINT_FOLDER)
    else:
        path = Path(resume)
        if not path.is_dir():
            raise RunDirError(f"--resume {resume}: there is no such folder")
        if (path / CHECKPOINT_FOLDER).is_dir():
            path = path / CHECKPOINT_FOLDER
        if path.name == CHECKPOINT_FOLDER:
            path = find_checkpoint(path)
    info = read_checkpoint(path)
    RunDir.open(path.resolve().parent.parent)  # a checkpoint outside of a run has no place to go on
    stored = stored_config(info)
    if resume != "auto" and config_path is None:
        config = config_from_values(info.values["config"], list(overrides), origin=str(path))
    elif resume != "auto":
        config = load_config(config_path, list(overrides)).config
    if config.model.vocab_size is None:  # filled in from the tokenizer, whose fingerprint is compared later
        vocab_size = info.values["vocab_size"]
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})
    structural, _ = structural_difference(stored, config)
    if structural:
        raise ConfigError(
            [
                f"{line}  (checkpoint {path} cannot be continued with another structure; without --resume a new run"
                " begins)"
                for line in structural
            ]
        )
    if config.train.steps < info.step:
        raise ConfigError([f"train.steps: {config.train.steps} steps are over already: {path} is of step {info.step}"])
    return config, info


def stored_config(checkpoint: CheckpointInfo) -> TrainConfig:
    """The config that a checkpoint was saved with, whatever ranks this process belongs to."""
    from launch.config_file import config_from_values

    return config_from_values(checkpoint.values["config"], [], origin=str(checkpoint.path), world_size=1)


def resumed_changes(config: TrainConfig, checkpoint: CheckpointInfo | None) -> list[str]:
    """One line for each option in which a resumed run differs from its checkpoint."""
    from launch.config_file import structural_difference

    if checkpoint is None:
        return []
    _, changed = structural_difference(stored_config(checkpoint), config)
    return [f"changed since the checkpoint: {line}" for line in changed if not line.startswith("model.vocab_size")]


def check_same_config(topology: Topology, config: TrainConfig) -> None:
    """Every rank read the options by itself; they must have come to the same.

    Raises:
        ConfigError: they have not; names the first option that differs, and where.
    """
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()
    digests = topology.gather_objects(digest)
    if len(set(digests)) == 1:
        return
    from launch.config_file import flatten

    first, *others = (flatten(values) for values in topology.gather_objects(config.model_dump(mode="json")))
    problems = [
        f"{path}: {other.get(path)!r} on rank {rank}, {first.get(path)!r} on rank 0; all ranks need the same options"
        for rank, other in enumerate(others, 1)
        for path in sorted(first.keys() | other.keys())
        if first.get(path) != other.get(path)
    ]
    raise ConfigError(problems)


def check_same_checkpoint(topology: Topology, checkpoint: CheckpointInfo | None) -> None:
    """Every rank looked for a checkpoint by itself; they must have found the same one.

    Raises:
        CheckpointError: they have not, because nodes see different files.
    """
    found = (checkpoint.path.parent.parent.name, checkpoint.step) if checkpoint else None
    everyone = topology.gather_objects(found)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            here, there = (
                f"{run} step {step}" if run else "none" for run, step in (o or ("", 0) for o in (everyone[0], other))
            )
            raise CheckpointError(f"rank 0 found checkpoint {here}, rank {rank} {there}: {SHARED_FILES}")


def check_shared(topology: Topology, run_dir: Path) -> None:
    """Every rank must see the run directory that rank 0 has made.

    Raises:
        CheckpointError: some do not.
    """
    deadline = time.monotonic() + SHARED_FILES_S
    while not run_dir.is_dir() and time.monotonic() < deadline:
        time.sleep(0.2)  # a network file system may take a while to show it
    blind = [rank for rank, sees in enumerate(topology.gather_objects(run_dir.is_dir())) if not sees]
    if blind:
        raise CheckpointError(f"rank {blind[0]} does not see the run directory {run_dir}: {SHARED_FILES}")


def set_determinism(config: TrainConfig) -> None:
    """Seed what is global and, if asked, allow only deterministic kernels."""
    torch.manual_seed(config.run.seed)
    # cuBLAS reads it when it starts, and is deterministic only with a workspace of fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=True)
    # That mode also fills every new tensor, which costs a few percent; nothing here reads memory it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def with_vocabulary(config: TrainConfig, tokenizer: Tokenizer, checkpoint: CheckpointInfo | None) -> TrainConfig:
    """The config with ``model.vocab_size`` filled in, after checking that tokenizer and checkpoint belong together."""
    if checkpoint and checkpoint.values["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise TokenizerError(
            f"checkpoint {checkpoint.path} was trained with tokenizer"
            f" {checkpoint.values['tokenizer_fingerprint'][:12]},"
            f" this run's data gives {tokenizer.fingerprint[:12]}: restore data.sources and data.tokenizer, or point"
            " data.tokenizer.path at the run's own tokenizer.json with data.tokenizer.kind=file"
        )
    vocab = config.model.vocab_size
    if vocab is not None and vocab < tokenizer.vocab_size:
        raise ConfigError([f"model.vocab_size: {vocab} is less than the tokenizer's {tokenizer.vocab_size} tokens"])
    known = config.gate.num_ids()
    if known is not None and known < tokenizer.vocab_size:
        raise ConfigError(
            [f"gate.vocab_size: the table has {known} ids, fewer than the tokenizer's {tokenizer.vocab_size}"]
        )
    model = config.model.model_copy(update={"vocab_size": vocab or tokenizer.vocab_size})
    return config.model_copy(update={"model": model})


def build_model(
    config: TrainConfig, topology: Topology, checkpoint: CheckpointInfo | None
) -> tuple[Transformer, ExpertEngine | None]:
    """The model with initial weights on this rank's device, and the engine that its experts are spread by, if any.

    Weights are the same however they are spread, because each tensor is seeded by its name.

    Raises:
        ConfigError: a file that the gate reads is not what it should be.
    """
    sharded = config.parallel.mode != "local" and config.model.num_moe_layers > 0
    model = Transformer(config.model, config.gate, expert_device="meta" if sharded else None)
    compute_dtype = COMPUTE_DTYPES[config.train.compute_dtype]
    experts = None
    if sharded:
        state = checkpoint.values.get("parallel") if checkpoint else None
        experts = ExpertEngine(model, topology, config.parallel, compute_dtype=compute_dtype, state=state)
    try:
        model.init_weights(config.run.seed)
    except ValueError as error:  # of a gate's file
        raise ConfigError([str(error)]) from error
    dtype = torch.float64 if config.train.compute_dtype == "fp64" else torch.float32
    return model.to(topology.device, dtype), experts


def open_run_dir(
    config: TrainConfig,
    checkpoint: CheckpointInfo | None,
    command: list[str],
    tokenizer: Tokenizer,
    held: ExitStack,
) -> Path:
    """A new run directory, or the checkpoint's own with the metrics after its step removed. Rank 0 only.

    Args:
        held: keeps the directory locked until it is closed.
    """
    if checkpoint is None:
        run = RunDir.create(config, command)
        held.enter_context(run.locked())
        tokenizer.save(run.path / TOKENIZER_FOLDER)
        return run.path
    run = RunDir.open(checkpoint.path.parent.parent)
    held.enter_context(run.locked())
    run.truncate_metrics(checkpoint.step)
    run.note_resume(config, command)
    return run.path


def restore(
    model: Transformer, optimizer: torch.optim.Optimizer, checkpoint: CheckpointInfo, topology: Topology
) -> str:
    """Load the training state from ``checkpoint``; returns one line that says what was restored.

    Raises:
        CheckpointError: it is damaged or of another structure.
    """
    ranks, device = checkpoint.values["world_size"], checkpoint.values.get("device", "cpu")
    same = (ranks, device) == (topology.world_size, topology.device.type)
    random = random_state(topology) if same else {}
    load_tensors(checkpoint, training_tensors(model, optimizer) | random, topology)
    if same:
        set_random_state(topology, random)
        note = ", random state"
    else:
        note = (
            f" (random state starts anew: saved by {ranks} ranks on {device},"
            f" now {topology.world_size} on {topology.device.type})"
        )
    what = "model, optimizer, schedule, gate state, data position"
    return f"resumed from {checkpoint.path} at step {checkpoint.step}: {what}{note}"


def run_info(config: TrainConfig, topology: Topology, trainer: Trainer, data: PreparedData, run_dir: Path) -> RunInfo:
    """What the start banner and the report say about the run."""
    counts = count_params(config.model, config.gate)
    flops = flops_per_token(config.model, config.gate, config.train.seq_len)
    tokens_per_step = config.train.global_batch * config.train.seq_len
    corpus = sum(len(domain.tokens) for domain in data.train)
    layers = trainer.model.moe_layers()
    compute_dtype = COMPUTE_DTYPES[config.train.compute_dtype]
    expert_op, op_reason = layers[0][1].experts.op_choice(compute_dtype) if layers else ("none", "no MoE layer")
    derived = {
        "parameters": f"{counts.total:,} ({counts.active:,} active per token)",
        "experts": f"{config.model.moe.num_experts} per layer, {config.model.num_moe_layers} MoE layers,"
        f" gate {config.gate.name}",
        "compute": f"{config.train.compute_dtype} on {topology.device.type} ({topology.device_reason}),"
        f" {torch.get_num_threads()} thread(s) a rank",
        "expert op": f"{expert_op} ({op_reason})",
        "FLOPs per token": f"{flops:,.0f} (forward and backward)",
        "ranks": f"{topology.world_size}, dense parameters {config.parallel.dense}",
        "batch": f"{config.train.global_batch} sequences x {config.train.seq_len} tokens = {tokens_per_step:,} a step",
        "training": f"{config.train.steps:,} steps, {config.train.steps * tokens_per_step:,} tokens,"
        f" {config.train.steps * tokens_per_step / max(1, corpus):.2f} epochs of {corpus:,}",
        "run directory": str(run_dir),
    }
    return RunInfo(
        name=config.run.name,
        run_dir=run_dir,
        steps=config.train.steps,
        start_step=trainer.step,
        world_size=topology.world_size,
        tokens_per_step=tokens_per_step,
        num_experts=config.model.moe.num_experts,
        moe_layers=tuple(index for index, _ in trainer.model.moe_layers()),
        derived=derived,
        config=config.model_dump(mode="json"),
    )


def resume_command(topology: Topology, run_dir: Path, command: list[str]) -> str:
    """The command line that continues this run, in the way that ``command`` began it."""
    run = shlex.quote(str(run_dir))
    if command[0] == "moeyard":
        return f"moeyard train --resume {run}"
    program = f"python {shlex.quote(command[0])}"
    nodes = topology.world_size // topology.local_world_size
    if topology.world_size > 1:
        several = f"--nnodes {nodes} " if nodes > 1 else ""
        program = f"torchrun {several}--nproc-per-node {topology.local_world_size} {shlex.quote(command[0])}"
    return f"{program} --resume {run}"
