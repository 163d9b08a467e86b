"""Training checkpoints that belong to the model, not to the machines.

Tensors are stored through torch.distributed.checkpoint under keys of (layer, expert, tensor), optimizer state
included: ``model.blocks.3.moe.experts.5.w_gate``, ``optim.blocks.3.moe.experts.5.w_gate.exp_avg``. No key names a
rank, so any world size and any placement of experts can load any checkpoint.

A checkpoint is written to ``step_000100.partial`` and renamed when complete: a kill at any moment leaves the previous
one untouched. ``latest`` names the newest complete one. All ranks must see the folder: nodes need a shared file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from moe.errors import CheckpointError
from moe.experts import ExpertBank
from parallel.dense_fsdp import own_part
from parallel.topology import Topology

FORMAT = "moeyard-checkpoint"
FORMAT_VERSION = 1
META_FILE = "meta.json"
LATEST_FILE = "latest"
DCP_ERRORS = (Exception, CheckpointException)
"""What a failing save or load raises; DCP's own exception is no subclass of Exception."""


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Every tensor of a training state by its placement-free key; the values are views of the live tensors.

    Where dense parameters are sliced, the values are ``DTensor``: of the whole shape, with this rank's slice in them.

    Stacked expert tensors are split along their first dimension, one key an expert. 0-d optimizer state (the step)
    is kept whole.
    """
    experts = {
        f"{prefix}.{name}" if prefix else name: (prefix, module)
        for prefix, module in model.named_modules()
        if isinstance(module, ExpertBank)
        for name, _ in module.named_parameters(recurse=False)
    }
    tensors: dict[str, Tensor] = {}

    def add(root: str, name: str, suffix: str, tensor: Tensor) -> None:
        if name not in experts:
            tensors[f"{root}.{name}{suffix}"] = tensor
            return
        prefix, module = experts[name]
        for expert, stacked, view in module.expert_views(name.rpartition(".")[2], tensor):
            short = stacked.rsplit("_", 1)[0]  # w_gate_EDF -> w_gate: one expert's tensor has no E
            key = short if expert is None else f"{expert}.{short}"
            tensors[f"{root}.{prefix}.{key}{suffix}"] = view

    for name, tensor in model.state_dict().items():
        add("model", name, "", tensor)
    if optimizer is not None:
        names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        for param, state in optimizer.state.items():
            for key, value in state.items():
                add("optim", names[param], f".{key}", value)
    return tensors


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint on disk: where, of which step, and the plain values that were saved with the tensors."""

    path: Path
    step: int
    values: Mapping[str, Any]


class CheckpointWriter:
    """Saves checkpoints of one run, in the background if asked, and keeps the last few.

    All ranks must construct it and call :meth:`save` and :meth:`wait` at the same steps; a save that fails on one rank
    fails on all, so that their next saves still meet.

    Args:
        resumed_step: the step that this run continues from. Later checkpoints belong to another future of the run:
            they are set aside as ``step_000200.superseded``.
    """

    def __init__(
        self,
        directory: Path,
        topology: Topology,
        *,
        keep_last: int,
        async_save: bool,
        resumed_step: int | None = None,
        on_saved: Callable[[int, Path], None] = lambda step, path: None,
    ) -> None:
        self.directory = directory
        self.topology = topology
        self.keep_last = keep_last
        self.on_saved = on_saved
        self._complete = set() if resumed_step is None else {resumed_step}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if async_save else None
        self._pending: Future[None] | None = None
        if topology.is_first:
            directory.mkdir(parents=True, exist_ok=True)
            for leftover in directory.glob("step_*.partial"):
                shutil.rmtree(leftover)
            if resumed_step is not None:
                self._continue_from(resumed_step)
        topology.barrier()

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> CheckpointError | None:
        """Save a snapshot of ``tensors`` and the JSON-able ``values``; with ``async_save`` returns after the copy.

        Returns:
            Why the previous background save failed, if it did and nobody was told yet; this one has begun all the same.

        Raises:
            CheckpointError: without ``async_save``, when this save failed.
        """
        failure = None
        try:
            self.wait()
        except CheckpointError as error:
            failure = error
        if step in self._complete:
            return failure  # what was resumed from, or saved a moment ago: the same step holds the same values
        if self._pool is None:
            self._write(step, dict(tensors), values)
        else:
            snapshot = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
            self._pending = self._pool.submit(self._write, step, snapshot, values)
        return failure

    def wait(self) -> None:
        """Wait for the background save; raises its CheckpointError, once."""
        if self._pending is not None:
            future, self._pending = self._pending, None
            future.result()

    def poll(self) -> None:
        """Raise the error of a background save that has failed since; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Wait for the background save and end its thread."""
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def _write(self, step: int, tensors: dict[str, Tensor], values: Mapping[str, Any]) -> None:
        final = self.directory / step_name(step)
        partial = final.with_name(final.name + ".partial")
        group = self.topology.checkpoint_group
        cause: str | None = None
        try:
            state_dict_saver.save(
                tensors,
                storage_writer=FileSystemWriter(partial, single_file_per_rank=True, sync_files=True),
                process_group=group,
                no_dist=group is None,
            )
        except DCP_ERRORS as error:  # raised on every rank, whichever failed
            cause = _root_cause(error)
        else:
            if group is not None and not dist.is_initialized():
                # The main thread has failed and left the group; DCP then saves what this rank has as if it were all.
                raise CheckpointError(f"step {step} was not saved: the run ended before all ranks had written")
            if self.topology.is_first:
                try:
                    self._publish(step, partial, final, values)
                except Exception as error:
                    cause = _root_cause(error)
            cause = _of_first_rank(cause, group)
        if cause is None:
            self._complete.add(step)
            if self.topology.is_first:
                self._delete_old()
                self.on_saved(step, final)
            return
        needed_bytes = sum(own_part(tensor).nbytes for tensor in tensors.values())
        free_bytes = shutil.disk_usage(self.directory).free if self.directory.is_dir() else needed_bytes
        if free_bytes < needed_bytes and "No space left" not in cause:
            # torch's file writer hides the operating system's reason behind one of its own.
            cause = f"No space left on device ({free_bytes:,} bytes free of {needed_bytes:,} needed): {cause}"
        if self.topology.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not save step {step} to {final}: {cause}; {self._what_is_left()}")

    def _publish(self, step: int, partial: Path, final: Path, values: Mapping[str, Any]) -> None:
        """Give a complete checkpoint its name."""
        storage = FileSystemReader(partial).read_metadata().storage_data or {}
        missing = sorted({item.relative_path for item in storage.values()} - {p.name for p in partial.iterdir()})
        if missing:
            raise CheckpointError(
                f"{missing[0]}, which another rank wrote, is not in {partial}: all nodes must see the run directory"
                " on a shared file system; set run.root"
            )
        sizes = {entry.name: entry.stat().st_size for entry in sorted(partial.iterdir())}
        meta = {"format": FORMAT, "version": FORMAT_VERSION, "step": step, "files": sizes, "values": dict(values)}
        _write_synced(partial / META_FILE, json.dumps(meta, indent=1))
        os.replace(partial, final)
        self._point_latest_at(final)

    def _delete_old(self) -> None:
        """Keep only the last checkpoints; what cannot be deleted now is tried again after the next save."""
        for doomed in list_checkpoints(self.directory)[: -self.keep_last]:
            # Renamed first, so that a kill while deleting leaves no half checkpoint under a good name.
            partial = doomed.with_name(doomed.name + ".partial")
            with contextlib.suppress(OSError):
                os.replace(doomed, partial)
            shutil.rmtree(partial, ignore_errors=True)

    def _continue_from(self, step: int) -> None:
        """Make ``step`` the newest checkpoint."""
        for later in list_checkpoints(self.directory):
            if _step_of(later) > step:
                aside = later.with_name(later.name + ".superseded")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(later, aside)
        if (self.directory / step_name(step)).is_dir():
            self._point_latest_at(self.directory / step_name(step))

    def _point_latest_at(self, checkpoint: Path) -> None:
        _write_synced(self.directory / (LATEST_FILE + ".partial"), checkpoint.name)
        os.replace(self.directory / (LATEST_FILE + ".partial"), self.directory / LATEST_FILE)

    def _what_is_left(self) -> str:
        left = list_checkpoints(self.directory)
        return f"the last good checkpoint is {left[-1]}" if left else "there is no earlier checkpoint in this run"


def step_name(step: int) -> str:
    """Folder name of the checkpoint of ``step``."""
    return f"step_{step:06d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints under ``directory``, oldest first."""
    found = [p for p in directory.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def read_checkpoint(path: Path) -> CheckpointInfo:
    """What the checkpoint at ``path`` is, after checking that it is ours and whole.

    Raises:
        CheckpointError: not a checkpoint, another format, or a file is missing or has another size; names an older
            good checkpoint of the same run if there is one.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint folder" + _offer_previous(path))
    try:
        meta = json.loads((path / META_FILE).read_text(encoding="utf-8"))
        if meta.get("format") != FORMAT:
            raise KeyError("format")
        step, sizes, values = int(meta["step"]), dict(meta["files"]), meta["values"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of this program (no usable {META_FILE}: {error})" + _offer_previous(path)
        ) from error
    if meta["version"] != FORMAT_VERSION:
        raise CheckpointError(f"{path} has checkpoint version {meta['version']}; this program reads {FORMAT_VERSION}")
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
            raise CheckpointError(f"checkpoint {path} is damaged: {name} {state}" + _offer_previous(path))
    return CheckpointInfo(path, step, values)


def find_checkpoint(directory: Path) -> Path:
    """The newest checkpoint in a run's checkpoint folder: what ``latest`` names, or the highest step without it."""
    latest = directory / LATEST_FILE
    if latest.is_file():
        named = directory / latest.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    found = list_checkpoints(directory)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {directory}")
    return found[-1]


def load_tensors(info: CheckpointInfo, tensors: dict[str, Tensor], topology: Topology, *, subset: bool = False) -> None:
    """Fill ``tensors`` (views of live tensors, as :func:`training_tensors` gives) from a checkpoint, in place.

    Args:
        subset: the checkpoint may hold more than is asked for (a model without its optimizer).

    Raises:
        CheckpointError: keys or shapes differ; nothing has been changed then. Or a file does not decode.
    """
    try:
        stored = FileSystemReader(info.path).read_metadata().state_dict_metadata
    except DCP_ERRORS as error:
        raise CheckpointError(
            f"checkpoint {info.path} is damaged: its metadata does not decode ({error})" + _offer_previous(info.path)
        ) from error
    sizes = {k: tuple(v.size) for k, v in stored.items() if isinstance(v, TensorStorageMetadata)}
    problems = [f"{key} is not in the checkpoint" for key in tensors if key not in sizes]
    if not subset:
        # A rank asks for the experts that it owns; only together do the ranks ask for everything.
        asked = {key for keys in topology.gather_objects(list(tensors)) for key in keys}
        problems += [
            f"{key} is in the checkpoint only"
            for key in sizes
            if key not in asked and key.startswith(("model.", "optim."))
        ]
    problems += [
        f"{key} has shape {tuple(tensor.shape)} here and {sizes[key]} in the checkpoint"
        for key, tensor in tensors.items()
        if key in sizes and sizes[key] != tuple(tensor.shape)
    ]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"checkpoint {info.path} has another structure than this run:\n  {shown}")
    try:
        with warnings.catch_warnings():
            # One rank that reads for itself means to.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_loader.load(
                tensors,
                storage_reader=FileSystemReader(info.path),
                process_group=topology.checkpoint_group,
                no_dist=topology.checkpoint_group is None,
            )
    except DCP_ERRORS as error:
        raise CheckpointError(
            f"checkpoint {info.path} is damaged: {_root_cause(error)}" + _offer_previous(info.path)
        ) from error


def _offer_previous(path: Path) -> str:
    """The newest whole checkpoint beside ``path`` that is not ``path``, as the end of an error message."""
    for other in reversed(list_checkpoints(path.parent)):
        if other == path:
            continue
        try:
            meta = json.loads((other / META_FILE).read_text(encoding="utf-8"))
            whole = all((other / name).stat().st_size == size for name, size in meta["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if whole:
            return f"; a good one is {other}: resume with --resume {other}"
    return "; there is no other good checkpoint beside it"


def _of_first_rank(text: str | None, group: dist.ProcessGroup | None) -> str | None:
    """What rank 0 has to say, on every rank of ``group``."""
    if group is None or dist.get_world_size(group) == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def _root_cause(error: BaseException) -> str:
    """The line that says what went wrong: DCP wraps the failures of ranks, possibly twice."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, wrapped = sorted(failures.items())[0]
        inner = wrapped[0] if isinstance(wrapped, tuple) else wrapped
        return f"rank {rank}: {type(inner).__name__}: {inner}"
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
