"""Which device a rank computes on."""

from __future__ import annotations

import pytest
import torch

from moe.errors import ConfigError
from parallel.topology import check_one_kind_of_device, choose_device

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("gpus", "ranks", "kinds"),
    [(0, 2, ["cpu", "cpu"]), (1, 1, ["cuda"]), (1, 2, ["cpu", "cpu"]), (2, 2, ["cuda", "cuda"]), (8, 2, ["cuda"] * 2)],
)
def test_a_node_computes_on_one_kind_of_device(
    gpus: int, ranks: int, kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen = [choose_device(rank, ranks) for rank in range(ranks)]
    assert [device.type for device, _ in chosen] == kinds
    if gpus == 1 and ranks == 2:
        assert chosen[0][1] == "1 CUDA device(s) for 2 ranks on this node"
    if "cuda" in kinds:
        assert [device.index for device, _ in chosen] == list(range(ranks))


def test_ranks_on_different_kinds_of_device_are_refused() -> None:
    check_one_kind_of_device(["cuda", "cuda"])
    with pytest.raises(ConfigError, match=r"rank 2 on cpu, rank 0 on cuda.*nproc-per-node"):
        check_one_kind_of_device(["cuda", "cuda", "cpu", "cpu"])
