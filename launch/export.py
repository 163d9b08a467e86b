"""From a training state to the exported model directory that can be served, evaluated and shared."""

from __future__ import annotations

from pathlib import Path

from launch.config import TrainConfig
from launch.run_dir import CHECKPOINT_FOLDER, MODEL_FOLDER, RunDirError
from moe import Tokenizer, Transformer
from moe.checkpoint import save_model
from moe.errors import TokenizerError
from parallel.checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    load_tensors,
    read_checkpoint,
    step_name,
    training_tensors,
)
from parallel.topology import Topology

TOKENIZER_FOLDER = "tokenizer"
"""Where a run directory keeps the tokenizer that its checkpoints belong to."""


def export_model(model: Transformer, tokenizer: Tokenizer, config: TrainConfig, step: int, out: Path) -> Path:
    """Write ``model`` as a Hugging Face directory at ``out``, with the training config beside it; returns ``out``."""
    extra = {"name": config.run.name, "train_config": config.model_dump(mode="json"), "step": step}
    save_model(out, model, tokenizer, extra=extra)
    return out


def export_run(run: str, step: int | None = None, out: str | None = None) -> Path:
    """Export a checkpoint of a run.

    Args:
        run: the run directory.
        step: which checkpoint; None takes the newest.
        out: where to; None means the run's own ``model`` folder.

    Raises:
        RunDirError: no such run.
        CheckpointError: no such checkpoint, or it is damaged.
    """
    folder = Path(run) / CHECKPOINT_FOLDER
    if not folder.is_dir():
        what = "is not a run directory: it has no checkpoints folder" if Path(run).is_dir() else "does not exist"
        raise RunDirError(f"{run} {what}")
    info = read_checkpoint(find_checkpoint(folder) if step is None else folder / step_name(step))
    return export_checkpoint(info, Path(run) / TOKENIZER_FOLDER, Path(out) if out else Path(run) / MODEL_FOLDER)


def export_checkpoint(info: CheckpointInfo, tokenizer_folder: Path, out: Path) -> Path:
    """Export the model of a checkpoint, wherever its experts were when it was saved; needs room for the whole model."""
    from launch.config_file import config_from_values

    config = config_from_values(info.values["config"], [], origin=str(info.path), world_size=1)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.fingerprint != info.values["tokenizer_fingerprint"]:
        raise TokenizerError(f"{tokenizer_folder} is not the tokenizer that {info.path} was trained with")
    model = Transformer(config.model.model_copy(update={"vocab_size": info.values["vocab_size"]}), config.gate)
    load_tensors(info, training_tensors(model), Topology.alone(), subset=True)
    return export_model(model, tokenizer, config, info.step, out)
