"""GradientReducer: gradients of W ranks equal those of one process, whatever the split."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parallel.dense import GradientReducer, check_in_sync
from parallel.topology import Topology
from tests.harness import run_distributed, run_single

pytestmark = pytest.mark.distributed


class Net(nn.Module):
    """Two used layers and one that the loss never touches (an expert without tokens)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def train(topology: Topology, accumulate: int, bucket_bytes: int, steps: int = 3) -> dict:
    """Train on a fixed global batch of 12 rows; returns final weights, gradient norms and reduced bytes."""
    net = Net().double()
    check_in_sync(net, topology)
    reducer = GradientReducer(net.parameters(), topology, bucket_bytes)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    data = torch.randn(steps, 12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = 12 // topology.world_size
    micro = rows // accumulate
    norms = []
    for step in range(steps):
        reducer.zero()
        begin = topology.rank * rows
        for first in range(begin, begin + rows, micro):
            loss = net(data[step, first : first + micro]).square().sum() / 12
            reducer.expect(last=first + micro >= begin + rows)
            loss.backward()
        reducer.finish()
        norm = reducer.grad_norm()
        norms.append(float(norm))
        reducer.clip_(norm, 0.7)
        optimizer.step()
    return {
        "weights": {name: p.detach() for name, p in net.named_parameters()},
        "norms": norms,
        "bytes": reducer.bytes_reduced,
    }


@pytest.mark.parametrize(("world_size", "accumulate", "bucket_bytes"), [(2, 1, 1), (2, 3, 300), (3, 2, 10**6)])
def test_ranks_and_accumulation_give_the_single_process_result(
    world_size: int, accumulate: int, bucket_bytes: int
) -> None:
    alone = run_single(train, 1, 10**6)
    for result in run_distributed(train, world_size, accumulate, bucket_bytes):
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-12, atol=1e-13)
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-12)
        numel = sum(p.numel() for p in Net().parameters())
        assert result["bytes"] == 3 * 8 * numel, "every gradient travels once per step, not once per micro-batch"


def test_single_process_norm_and_clip_equal_torch() -> None:
    net, other = Net(), Net()
    reducer = GradientReducer(net.parameters(), Topology(0, 1, 0, 1, torch.device("cpu"), "", None), 64)
    x = torch.randn(5, 6)
    reducer.zero()
    reducer.expect(last=True)
    net(x).square().sum().backward()
    reducer.finish()
    other(x).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    norm = reducer.grad_norm()
    reducer.clip_(norm, 0.1)
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_bucket_holds_several_parameters_and_keeps_dtypes_apart() -> None:
    params = [
        nn.Parameter(torch.zeros(10)),
        nn.Parameter(torch.zeros(4, dtype=torch.float64)),
        nn.Parameter(torch.ones(2)),
    ]
    topology = Topology(0, 1, 0, 1, torch.device("cpu"), "", None)
    reducer = GradientReducer(params, topology, bucket_bytes=10**6)
    assert [bucket.flat.dtype for bucket in reducer._buckets] == [torch.float32, torch.float64, torch.float32]
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in params)


def different_weights(topology: Topology) -> str:
    net = Net()
    if topology.rank == 1:
        with torch.no_grad():
            net.first.weight[0, 0] += 1e-7
    try:
        check_in_sync(net, topology)
    except RuntimeError as error:
        return str(error)
    return "not noticed"


def test_ranks_that_start_apart_are_noticed() -> None:
    assert run_distributed(different_weights, 2) == ["rank 1 holds other initial parameters than rank 0"] * 2


def skip_a_backward_pass(topology: Topology) -> list[float]:
    """Rank 1 gets no loss in the second step, as when its gate refuses scores that are NaN."""
    net = Net().double()
    reducer = GradientReducer(net.parameters(), topology, 1)
    x = torch.ones(2, 6, dtype=torch.float64)
    norms = []
    for step in range(3):
        reducer.zero()
        if not (topology.rank == 1 and step == 1):
            reducer.expect(last=True)
            net(x).square().sum().backward()
        reducer.finish()
        norms.append(float(reducer.grad_norm()))
    return norms


def test_a_rank_without_a_backward_pass_still_meets_the_others() -> None:
    first, second = run_distributed(skip_a_backward_pass, 2)
    assert first == second
    assert first[1] == pytest.approx(first[0] / 2)
    assert first[2] == first[0]


def compare_unlike_tensors(topology: Topology) -> str:
    """A 0-d parameter, a buffer, and weights that differ only in their order."""
    module = nn.Linear(2, 1, bias=False)
    module.temperature = nn.Parameter(torch.tensor(0.5))
    module.register_buffer("load", torch.zeros(3, dtype=torch.int64))
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
    check_in_sync(module, topology)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]] if topology.rank == 0 else [[2.0, 1.0]]))
    with pytest.raises(RuntimeError) as caught:
        check_in_sync(module, topology)
    return str(caught.value)


def test_the_comparison_of_ranks_sees_scalars_buffers_and_order() -> None:
    for message in run_distributed(compare_unlike_tensors, 2):
        assert "rank 1 holds other initial parameters" in message
