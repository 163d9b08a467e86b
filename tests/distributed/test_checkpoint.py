"""Checkpoints: placement-free keys, atomic publishing, clear errors, and the same state at any world size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from launch.config import OptimConfig
from launch.optim import build_optimizer
from moe import ModelConfig, MoEConfig, Transformer
from moe.errors import CheckpointError
from parallel.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    list_checkpoints,
    load_tensors,
    read_checkpoint,
    training_tensors,
)
from parallel.topology import Topology
from tests.harness import run_distributed, run_single

pytestmark = pytest.mark.distributed

ALONE = Topology(0, 1, 0, 1, torch.device("cpu"), "", None)


def state(seed: int, num_experts: int = 4) -> tuple[Transformer, torch.optim.AdamW]:
    """A small model with an optimizer whose state is not zero."""
    config = ModelConfig(
        vocab_size=32, dim=16, num_layers=2, num_heads=2, moe=MoEConfig(num_experts=num_experts, hidden_dim=8)
    )
    model = Transformer(config, {"name": "topk", "k": 2})
    model.init_weights(seed)
    optimizer = build_optimizer(model, OptimConfig())
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
    return model, optimizer


def writer_for(folder: Path, topology: Topology = ALONE, **options: object) -> CheckpointWriter:
    return CheckpointWriter(folder, topology, **{"keep_last": 2, "async_save": False, **options})


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


def test_keys_name_layer_expert_and_tensor_and_views_are_live() -> None:
    model, optimizer = state(0)
    tensors = training_tensors(model, optimizer)
    w_gate = tensors["model.blocks.1.moe.experts.3.w_gate"]
    assert w_gate.data_ptr() == model.blocks[1].moe.experts.w_gate_EDF[3].data_ptr()
    assert tensors["optim.blocks.1.moe.experts.3.w_gate.exp_avg"].shape == w_gate.shape
    assert not any("EDF" in key or "rank" in key for key in tensors)


@pytest.mark.parametrize("async_save", [False, True])
def test_round_trip_is_bit_equal_and_a_snapshot(tmp_path: Path, async_save: bool) -> None:
    model, optimizer = state(1)
    writer = writer_for(tmp_path, async_save=async_save)
    before = {k: v.clone() for k, v in training_tensors(model, optimizer).items()}
    writer.save(7, training_tensors(model, optimizer), {"note": 0.1})
    if async_save:
        with torch.no_grad():  # what training does next must not reach the file
            for param in model.parameters():
                param.add_(1)
    writer.close()
    info = read_checkpoint(find_checkpoint(tmp_path))
    assert (info.step, info.values) == (7, {"note": 0.1})
    other = training_tensors(*state(2))
    load_tensors(info, other, ALONE)
    assert_same(before, other)


def test_only_the_last_are_kept_and_latest_names_the_newest(tmp_path: Path) -> None:
    saved = []
    writer = writer_for(tmp_path, on_saved=lambda step, path: saved.append((step, path.name)))
    tensors = training_tensors(*state(0))
    for step in (1, 2, 10):
        writer.save(step, tensors, {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_000002", "step_000010"]
    assert (tmp_path / "latest").read_text() == "step_000010"
    assert saved == [(1, "step_000001"), (2, "step_000002"), (10, "step_000010")]


def test_leftovers_of_a_killed_save_are_never_a_checkpoint(tmp_path: Path) -> None:
    writer_for(tmp_path).save(1, training_tensors(*state(0)), {})
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002.partial")
    assert find_checkpoint(tmp_path).name == "step_000001"
    writer_for(tmp_path)
    assert not (tmp_path / "step_000002.partial").exists()


def test_a_failed_save_names_the_cause_and_keeps_the_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = writer_for(tmp_path, async_save=True)
    tensors = training_tensors(*state(0))
    writer.save(1, tensors, {})
    writer.wait()

    def no_space(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("parallel.checkpoint.FileSystemWriter.write_data", no_space)
    writer.save(2, tensors, {})
    with pytest.raises(CheckpointError, match=r"could not save step 2 .*No space left.*last good.*step_000001"):
        writer.wait()
    assert read_checkpoint(find_checkpoint(tmp_path)).step == 1
    assert not list(tmp_path.glob("*.partial"))


def test_damage_is_named_and_the_previous_good_one_is_offered(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    tensors = training_tensors(*state(0))
    writer.save(1, tensors, {})
    writer.save(2, tensors, {})
    data_file = next((tmp_path / "step_000002").glob("*.distcp"))
    data_file.write_bytes(data_file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"is damaged: .* bytes instead of .*--resume .*step_000001"):
        read_checkpoint(tmp_path / "step_000002")
    data_file.unlink()
    with pytest.raises(CheckpointError, match=r"is missing"):
        read_checkpoint(tmp_path / "step_000002")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        read_checkpoint(tmp_path / "foreign")
    meta = json.loads((tmp_path / "step_000001" / "meta.json").read_text())
    (tmp_path / "step_000001" / "meta.json").write_text(json.dumps({**meta, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        read_checkpoint(tmp_path / "step_000001")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        find_checkpoint(tmp_path / "foreign")


def test_flipped_bytes_inside_a_file_of_the_right_size_are_an_error_not_a_crash(tmp_path: Path) -> None:
    writer_for(tmp_path).save(1, training_tensors(*state(0)), {})
    metadata = tmp_path / "step_000001" / ".metadata"
    metadata.write_bytes(b"\x00" * metadata.stat().st_size)
    with pytest.raises(CheckpointError, match="metadata does not decode"):
        load_tensors(read_checkpoint(tmp_path / "step_000001"), training_tensors(*state(1)), ALONE)


def test_another_structure_names_the_paths_and_changes_nothing(tmp_path: Path) -> None:
    writer_for(tmp_path).save(1, training_tensors(*state(0)), {})
    wide = training_tensors(*state(3, num_experts=6))
    before = {k: v.clone() for k, v in wide.items()}
    with pytest.raises(CheckpointError, match=r"another structure.*\n.*experts\.4\.w_.* is not in the checkpoint"):
        load_tensors(read_checkpoint(tmp_path / "step_000001"), wide, ALONE)
    assert_same(before, wide)
    narrow = training_tensors(*state(3, num_experts=3))
    with pytest.raises(CheckpointError, match=r"is in the checkpoint only"):
        load_tensors(read_checkpoint(tmp_path / "step_000001"), narrow, ALONE)


def mark(folder: Path, step: int) -> float:
    """The number that a checkpoint's values carry."""
    return float(read_checkpoint(folder / f"step_{step:06d}").values["mark"])


def test_a_run_resumed_from_an_earlier_step_writes_its_own_later_checkpoints(tmp_path: Path) -> None:
    tensors = training_tensors(*state(0))
    writer = writer_for(tmp_path, keep_last=9)
    for step in (4, 8, 12):
        writer.save(step, tensors, {"mark": 1})
    data_file = next((tmp_path / "step_000012").glob("*.distcp"))
    data_file.write_bytes(data_file.read_bytes()[:-100])

    resumed = writer_for(tmp_path, keep_last=2, resumed_step=4)
    assert (tmp_path / "latest").read_text() == "step_000004"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_000004"]
    assert sorted(p.name for p in tmp_path.glob("*.superseded")) == [
        "step_000008.superseded",
        "step_000012.superseded",
    ]
    for step in (4, 8, 12):
        resumed.save(step, tensors, {"mark": 2})
    assert (tmp_path / "latest").read_text() == "step_000012"
    assert (mark(tmp_path, 8), mark(tmp_path, 12)) == (2, 2)
    assert find_checkpoint(tmp_path).name == "step_000012"


def test_a_kill_before_latest_was_written_is_mended_by_the_resume(tmp_path: Path) -> None:
    tensors = training_tensors(*state(0))
    writer = writer_for(tmp_path)
    writer.save(4, tensors, {})
    writer.save(8, tensors, {})
    (tmp_path / "latest").write_text("step_000004")
    resumed = writer_for(tmp_path, resumed_step=8)
    assert resumed.save(8, tensors, {}) is None
    assert find_checkpoint(tmp_path).name == "step_000008"


def test_an_unreported_failure_does_not_swallow_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = training_tensors(*state(0))
    writer = writer_for(tmp_path, async_save=True)
    with monkeypatch.context() as broken:
        broken.setattr("parallel.checkpoint._write_synced", full_disk)
        assert writer.save(2, tensors, {}) is None
        assert writer._pending is not None
        assert isinstance(writer._pending.exception(timeout=60), CheckpointError)
    failure = writer.save(4, tensors, {})
    assert "could not save step 2" in str(failure)
    writer.close()
    assert find_checkpoint(tmp_path).name == "step_000004"


def full_disk(*_args: object) -> None:
    raise OSError(28, "No space left on device")


def save_four_times_and_fail_once(topology: Topology, folder: str) -> list[str | None]:
    """Publishing step 2 fails on rank 0, the only one that publishes."""
    import parallel.checkpoint as module

    publish = module.CheckpointWriter._publish

    def fail_once(self: CheckpointWriter, step: int, *args: object) -> None:
        if step == 2:
            full_disk()
        publish(self, step, *args)

    module.CheckpointWriter._publish = fail_once
    writer = CheckpointWriter(Path(folder), topology, keep_last=9, async_save=True)
    tensors = training_tensors(*state(5))
    tensors[f"rng.rank_{topology.rank}.torch"] = torch.full((3,), topology.rank)
    failures = [writer.save(step, tensors, {"step": step}) for step in (2, 4, 6)]
    writer.close()
    return [failure and str(failure) for failure in failures]


def test_ranks_stay_in_step_after_a_save_that_failed_on_one(tmp_path: Path) -> None:
    for first, second, third in run_distributed(save_four_times_and_fail_once, 2, str(tmp_path)):
        assert (first, third) == (None, None)
        assert "could not save step 2" in second
        assert "No space left" in second
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_000004", "step_000006"]
    for step in (4, 6):
        info = read_checkpoint(tmp_path / f"step_{step:06d}")
        assert {"__0_0.distcp", "__1_0.distcp"} <= {p.name for p in info.path.iterdir()}
        tensors = training_tensors(*state(6))
        load_tensors(info, tensors, ALONE)
        assert_same(training_tensors(*state(5)), tensors)


def save_after_the_group_is_gone(topology: Topology, folder: str) -> str:
    """The main thread has failed and left the group while the background save was about to begin."""
    writer = CheckpointWriter(Path(folder), topology, keep_last=2, async_save=False)
    tensors = training_tensors(*state(5))
    tensors[f"rng.rank_{topology.rank}.torch"] = torch.full((3,), topology.rank)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.distributed, "is_initialized", lambda: False)
        with pytest.raises(CheckpointError) as caught:
            writer.save(4, tensors, {})
    return str(caught.value)


def test_a_save_that_outlives_its_run_publishes_nothing(tmp_path: Path) -> None:
    for message in run_distributed(save_after_the_group_is_gone, 2, str(tmp_path)):
        # Ranks that each take themselves for the only one also get into each other's way.
        assert "the run ended before all ranks had written" in message or "could not save step 4" in message
    assert not (tmp_path / "step_000004").exists()
    assert not (tmp_path / "latest").exists()


def save_to_own_folder(topology: Topology, folder: str) -> str:
    writer = CheckpointWriter(Path(folder) / f"node{topology.rank}", topology, keep_last=2, async_save=False)
    tensors = training_tensors(*state(5))
    tensors[f"rng.rank_{topology.rank}.torch"] = torch.full((3,), topology.rank)
    with pytest.raises(CheckpointError) as caught:
        writer.save(4, tensors, {})
    return str(caught.value)


def test_nodes_without_a_shared_folder_cannot_publish_half_a_checkpoint(tmp_path: Path) -> None:
    for message in run_distributed(save_to_own_folder, 2, str(tmp_path)):
        assert "__1_0.distcp, which another rank wrote, is not in" in message
        assert "shared file system" in message
    assert not list(tmp_path.glob("*/step_000004"))


def save_from(topology: Topology, folder: str) -> None:
    writer = CheckpointWriter(Path(folder), topology, keep_last=2, async_save=True)
    tensors = training_tensors(*state(5))
    tensors[f"rng.rank_{topology.rank}.torch"] = torch.full((3,), topology.rank)
    writer.save(4, tensors, {"step": 4})
    writer.close()


def load_into(topology: Topology, folder: str) -> dict[str, torch.Tensor]:
    info = read_checkpoint(find_checkpoint(Path(folder)))
    tensors = training_tensors(*state(6))
    load_tensors(info, tensors, topology)
    return {k: v.clone() for k, v in tensors.items()}


@pytest.mark.parametrize(("save_ranks", "load_ranks"), [(2, 1), (1, 3), (2, 2)])
def test_any_world_size_reads_what_any_other_wrote(tmp_path: Path, save_ranks: int, load_ranks: int) -> None:
    expected = training_tensors(*state(5))
    if save_ranks == 1:
        run_single(save_from, str(tmp_path))
    else:
        run_distributed(save_from, save_ranks, str(tmp_path))
    loaded = [run_single(load_into, str(tmp_path))] if load_ranks == 1 else None
    for result in loaded or run_distributed(load_into, load_ranks, str(tmp_path)):
        assert_same(expected, result)
