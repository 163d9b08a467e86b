"""From a training state to the exported model directory that can be served, evaluated and shared."""

from __future__ import annotations

from pathlib import Path

from launch.config import TrainConfig
from launch.run_dir import CHECKPOINT_FOLDER, RunDirError
from moe import Tokenizer, Transformer
from moe.checkpoint import save_model
from moe.errors import TokenizerError
from parallel.checkpoint import find_checkpoint, load_tensors, read_checkpoint, step_name, training_tensors
from parallel.topology import connect

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
    from launch.config_file import config_from_values

    folder = Path(run) / CHECKPOINT_FOLDER
    if not folder.is_dir():
        what = "is not a run directory: it has no checkpoints folder" if Path(run).is_dir() else "does not exist"
        raise RunDirError(f"{run} {what}")
    info = read_checkpoint(find_checkpoint(folder) if step is None else folder / step_name(step))
    config = config_from_values(info.values["config"], [], origin=str(info.path))
    tokenizer = Tokenizer.load(Path(run) / TOKENIZER_FOLDER)
    if tokenizer.fingerprint != info.values["tokenizer_fingerprint"]:
        raise TokenizerError(f"{Path(run) / TOKENIZER_FOLDER} is not the tokenizer that {info.path} was trained with")
    model = Transformer(config.model.model_copy(update={"vocab_size": info.values["vocab_size"]}), config.gate)
    with connect() as topology:
        load_tensors(info, training_tensors(model), topology, subset=True)
    return export_model(model, tokenizer, config, info.step, Path(out) if out else Path(run) / "model")
