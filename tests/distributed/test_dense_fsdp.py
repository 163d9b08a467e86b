"""Dense parameters in slices: the same training as one process that has them whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from gates import Mode
from launch.config import OptimConfig, TrainConfig
from launch.nan_watch import first_bad_gradient
from launch.optim import build_optimizer
from moe import Transformer
from moe.config import ModelConfig
from moe.errors import ConfigError
from moe.transformer import ForwardContext, next_token_loss
from parallel.checkpoint import CheckpointWriter, load_tensors, read_checkpoint, training_tensors
from parallel.config import ParallelConfig
from parallel.dense_fsdp import ShardedDense
from parallel.engine import ExpertEngine
from parallel.model import ParallelModel
from parallel.topology import Topology
from tests.expert_training import LENGTH, ROWS, VOCAB, Case, Trained, batch, build, together, train, worst_error
from tests.harness import run_distributed, run_single

pytestmark = pytest.mark.distributed


@dataclass
class Spread:
    """A model that is spread over ranks, and its optimizer."""

    model: Transformer
    parallel: ParallelModel
    optimizer: torch.optim.Optimizer


def spread(topology: Topology, case: Case, dense: str = "fsdp") -> Spread:
    model = build(case)
    config = ParallelConfig(mode=case.mode, dense=dense, **{"link_mbit": 1000, **case.options})
    experts = None if case.mode == "local" else ExpertEngine(model, topology, config)
    parallel = ParallelModel(model, topology, config, experts)
    return Spread(model, parallel, build_optimizer(model, OptimConfig(lr=1e-2)))


def step(
    topology: Topology, case: Case, it: Spread, index: int, compute_dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """One optimizer step; loss over all ranks and gradient norm."""
    rows = ROWS // topology.world_size
    ids = batch(index)[topology.rank * rows : (topology.rank + 1) * rows]
    it.parallel.begin_step()
    total = torch.zeros((), dtype=torch.float64)
    load_LE = torch.zeros(len(it.model.moe_layers()), case.num_experts, dtype=torch.int64)
    for first in range(0, rows, min(rows, case.micro)):
        last = first + case.micro >= rows
        part = ids[first : first + case.micro]
        it.parallel.forward_begins(last)
        output = it.model(
            part[:, :-1], context=ForwardContext(step=index, mode=Mode.TRAIN, compute_dtype=compute_dtype)
        )
        nats, tokens = next_token_loss(output.logits_BTV, part[:, 1:])
        it.parallel.backward((nats + output.aux_loss() * int(tokens)) / (ROWS * LENGTH), last)
        total += nats.detach()
        for load_E, layer in zip(load_LE, output.routing, strict=True):
            load_E += layer.output.plan.load_E
    it.parallel.finish()
    norm = it.parallel.grad_norm()
    it.parallel.clip_(norm, case.clip_norm)
    it.optimizer.step()
    it.parallel.end_step(topology.sum_(load_LE), it.optimizer)
    return float(topology.sum_(total)), float(norm)


def whole_tensors(it: Spread) -> dict[str, Tensor]:
    tensors = training_tensors(it.model, it.optimizer)
    return {k: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for k, t in tensors.items()}


def train_sliced(topology: Topology, cases: list[Case]) -> list[Trained]:
    """All ``cases`` one after another; new memory is filled with NaN first."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    outcomes = []
    for case in cases:
        it = spread(topology, case)
        curve = [step(topology, case, it, index) for index in range(case.steps)]
        outcomes.append(Trained(curve, whole_tensors(it), Counter(), []))
        it.parallel.close()
    return outcomes


def agree(outcomes: list[Trained], reference: Trained, tolerance: float) -> None:
    assert worst_error(together(outcomes), reference.tensors) < tolerance
    for outcome in outcomes:
        assert len(outcome.curve) == len(reference.curve)
        for got, wanted in zip(outcome.curve, reference.curve, strict=True):
            assert got == pytest.approx(wanted, rel=tolerance)


@pytest.fixture(scope="module")
def plain() -> Trained:
    return run_single(train, Case(None))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sliced_dense_parameters_train_as_one_process_in_every_mode(world: int, plain: Trained) -> None:
    """Loss, norm, clipping, weights and optimizer state in fp64, with and without accumulation; 16 rows on 3 ranks."""
    assert plain.curve[0][1] > Case(None).clip_norm, "nothing would be clipped"
    moving = {"reshard_interval": 1}
    cases = [Case("ep", ROWS // world), Case("fsdp", 2), Case("fssdp-keep", 2, options=moving), Case("fssdp-rm", 1)]
    by_rank = run_distributed(train_sliced, world, cases)
    for index in range(len(cases)):
        agree([outcomes[index] for outcomes in by_rank], plain, 1e-10)


def test_recomputed_blocks_gather_their_slices_again(plain: Trained) -> None:
    cases = [Case(mode, micro, recompute="block") for mode, micro in (("ep", 2), ("fsdp", 6), ("fssdp-rm", 2))]
    by_rank = run_distributed(train_sliced, 2, cases)
    for index in range(len(cases)):
        agree([outcomes[index] for outcomes in by_rank], plain, 1e-10)


def test_gradients_are_sums_in_fp32_too() -> None:
    """FSDP2 divides fp32 gradients in another place than fp64 ones. AdamW would not notice a factor; the norm does."""
    reference = run_single(train, Case(None, dtype=torch.float32))
    for outcome in run_distributed(train_sliced, 3, [Case("ep", 2, dtype=torch.float32)]):
        for got, wanted in zip(outcome[0].curve, reference.curve, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)


class CountCollectives(TorchDispatchMode):
    """How often each operation of torch.distributed runs, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(topology: Topology, case: Case) -> list[tuple[int, int]]:
    """(all-gathers, reduce-scatters) of each step."""
    it, seen = spread(topology, case), []
    for index in range(case.steps):
        with CountCollectives() as mode:
            step(topology, case, it, index)
        seen.append((mode.counts["_allgather_base_"], mode.counts["_reduce_scatter_base_"]))
    it.parallel.close()
    return seen


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_travel_once_a_step_whatever_the_accumulation(micro_batches: int) -> None:
    """Three blocks and the rest; blocks are gathered twice, the rest stays from forward to backward."""
    case = Case("ep", ROWS // 2 // micro_batches, steps=2)
    for seen in run_distributed(count_collectives, 2, case):
        assert seen == [((4 + 3) * micro_batches, 4)] * 2


def bf16_curves(topology: Topology, recompute: str) -> list[list[tuple[float, float]]]:
    """Two steps with bf16 activations, whole and sliced."""
    curves = []
    for dense in ("ddp", "fsdp"):
        case = Case("ep", 3, steps=2, dtype=torch.float32, recompute=recompute)
        it = spread(topology, case, dense)
        curves.append([step(topology, case, it, index, torch.bfloat16) for index in range(case.steps)])
        it.parallel.close()
    return curves


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_bf16_compute_from_slices_is_that_from_whole_parameters(recompute: str) -> None:
    for whole, sliced in run_distributed(bf16_curves, 2, recompute):
        assert sliced[0][0] == whole[0][0]
        for got, wanted in zip(sliced, whole, strict=True):
            assert got == pytest.approx(wanted, rel=1e-5)


def held_numbers(topology: Topology) -> dict[str, int]:
    """How many numbers of each dense tensor of the training state this rank holds after a step."""
    case = Case("ep", steps=1)
    it = spread(topology, case)
    step(topology, case, it, 0)
    with it.parallel.inference():
        it.model(batch(0)[:1, :-1])
    it.parallel.close()
    tensors = training_tensors(it.model, it.optimizer)
    grads = {f"grad.{name}": param.grad for name, param in it.model.named_parameters() if isinstance(param, DTensor)}
    return {k: t.to_local().numel() for k, t in (tensors | grads).items() if isinstance(t, DTensor)}


def test_every_rank_holds_its_slice_of_weights_gradients_and_optimizer_state() -> None:
    """After an evaluation too, which leaves nothing gathered. 31 rows of the embedding over 3 ranks are 11, 11, 9."""
    by_rank = run_distributed(held_numbers, 3)
    names = [name for name, _ in build(Case(None)).named_parameters() if ".experts." not in name]
    kinds = ("model.{}", "grad.{}", "optim.{}.exp_avg", "optim.{}.exp_avg_sq")
    assert set(by_rank[0]) == {kind.format(name) for kind in kinds for name in names}
    numel = {name: param.numel() for name, param in build(Case(None)).named_parameters()}
    for name in names:
        for kind in kinds:
            assert sum(held[kind.format(name)] for held in by_rank) == numel[name]
    assert [held["optim.embed.weight.exp_avg"] for held in by_rank] == [11 * 16, 11 * 16, 9 * 16]


class Net(nn.Module):
    """Two used layers and one that the loss never touches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.unused = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor, second: bool = True) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden) if second else hidden


def train_net(topology: Topology) -> dict[str, Tensor]:
    """Gradients of a step in which rank 1 does not use the second layer and rank 2 has no rows."""
    net = Net().double()
    dense = ShardedDense(net, topology)
    dense.zero()
    dense.expect(last=True)
    rows = (4, 3, 0)[topology.rank]
    x = torch.ones(rows, 6, dtype=torch.float64) * (topology.rank + 1)
    net(x, second=topology.rank != 1).square().sum().backward()
    dense.finish()
    return {name: param.grad.full_tensor() for name, param in net.named_parameters()} | {"norm": dense.grad_norm()}


def test_parameters_that_some_or_all_ranks_do_not_use_have_gradients() -> None:
    net = Net().double()
    (
        net(torch.ones(4, 6).double()).square().sum() + net(torch.ones(3, 6).double() * 2, False).square().sum()
    ).backward()
    wanted = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
    wanted["norm"] = torch.cat([grad.flatten() for grad in wanted.values()]).norm()
    for got in run_distributed(train_net, 3):
        assert got.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(got[name], grad, rtol=1e-12, atol=1e-12)


def save(topology: Topology, folder: Path, dense: str, mode: str) -> dict[str, Tensor]:
    """Two steps, a background save, and a third step that must not reach the file; the state that was saved."""
    case = Case(mode, 4)
    it = spread(topology, case, dense)
    for index in range(2):
        step(topology, case, it, index)
    saved = whole_tensors(it)
    writer = CheckpointWriter(folder, topology, keep_last=1, async_save=True)
    writer.save(2, training_tensors(it.model, it.optimizer), {})
    with torch.no_grad():
        for param in it.model.parameters():
            param.zero_()
    writer.close()
    it.parallel.close()
    return saved


def load(topology: Topology, folder: Path, dense: str, mode: str) -> Trained:
    """The state as loaded, and the next step from it."""
    case = Case(mode, 4)
    it = spread(topology, case, dense)
    load_tensors(read_checkpoint(folder / "step_000002"), training_tensors(it.model, it.optimizer), topology)
    outcome = Trained([], whole_tensors(it), Counter(), [])
    outcome.curve.append(step(topology, case, it, 2))
    it.parallel.close()
    return outcome


@pytest.mark.parametrize(
    ("saver", "loader"),
    [((2, "ddp", "ep"), (3, "fsdp", "ep")), ((3, "fsdp", "fssdp-rm"), (1, "ddp", "local"))],
)
def test_pain_5_a_checkpoint_knows_nothing_of_slices(
    tmp_path: Path, plain: Trained, saver: tuple[int, str, str], loader: tuple[int, str, str]
) -> None:
    saved: dict[str, Tensor] = {}
    for part in run_distributed(save, saver[0], tmp_path, *saver[1:]):
        saved |= part
    loaded = run_distributed(load, loader[0], tmp_path, *loader[1:])
    whole = together(loaded)
    assert whole.keys() == saved.keys() == plain.tensors.keys()
    for key, tensor in saved.items():
        assert torch.equal(whole[key], tensor), key
        assert tensor.shape == plain.tensors[key].shape
    for outcome in loaded:
        assert outcome.curve[0] == pytest.approx(plain.curve[2], rel=1e-10)


def sample_and_train(topology: Topology) -> tuple[list[Tensor], Trained]:
    """The first rank alone runs forward passes, three of them, between two steps."""
    case = Case("ep", 4, steps=2)
    it = spread(topology, case)
    outcome, logits = Trained([], {}, Counter(), []), []
    nothing = torch.zeros(0, 1, dtype=torch.int64)
    for index in range(2):
        outcome.curve.append(step(topology, case, it, index))
        with it.parallel.first_rank_computes(lambda: it.model(nothing)) as computes, torch.no_grad():
            for length in (2, 5, 3) if computes else ():
                logits.append(it.model(batch(9)[:1, :length]).logits_BTV)
        assert all(isinstance(param, DTensor) or "chunks" in name for name, param in it.model.named_parameters())
    assert it.parallel.in_lockstep
    it.parallel.close()
    return logits, outcome


def test_the_first_rank_can_compute_alone_and_training_goes_on(plain: Trained) -> None:
    alone = run_single(sample_whole)
    by_rank = run_distributed(sample_and_train, 2)
    assert [len(logits) for logits, _ in by_rank] == [6, 0]
    for got, wanted in zip(by_rank[0][0], alone, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    for _, outcome in by_rank:
        for got, wanted in zip(outcome.curve, plain.curve[:2], strict=True):
            assert got == pytest.approx(wanted, rel=1e-10)


def sample_whole(topology: Topology) -> list[Tensor]:
    """What :func:`sample_and_train` computes, in one process that has everything."""
    case = Case("local", steps=2)
    it, logits = spread(topology, case, "ddp"), []
    for index in range(2):
        step(topology, case, it, index)
        with torch.no_grad():
            logits += [it.model(batch(9)[:1, :length]).logits_BTV for length in (2, 5, 3)]
    return logits


def poison_one_slice(topology: Topology) -> tuple[str | None, float]:
    case = Case("ep", steps=1, clip_norm=0)
    it = spread(topology, case)
    step(topology, case, it, 0)
    if topology.rank == 1:
        grad = it.model.blocks[1].attn.wo.weight.grad
        assert isinstance(grad, DTensor)
        grad.to_local()[-1, -1] = torch.inf
    found, norm = first_bad_gradient(it.model), float(it.parallel.grad_norm())
    it.parallel.close()
    return found, norm


def test_a_bad_gradient_is_named_by_the_rank_that_holds_it_and_counts_everywhere() -> None:
    (first, norm), (second, other_norm) = run_distributed(poison_one_slice, 2)
    assert first is None
    assert second is not None
    assert "the gradient of blocks.1.attn.wo.weight is the first" in second
    assert norm == other_norm == float("inf")


def train_without_experts(topology: Topology, dense: str) -> list[tuple[float, float]]:
    """A dense model: nothing is sharded but by FSDP2."""
    config = ModelConfig(vocab_size=VOCAB, dim=16, num_layers=2, num_dense_layers=2, num_heads=2, max_seq_len=32)
    model = Transformer(config).double()
    model.init_weights(0)
    parallel = ParallelModel(model, topology, ParallelConfig(dense=dense))
    assert parallel.in_lockstep == (dense == "fsdp")
    it = Spread(model, parallel, build_optimizer(model, OptimConfig(lr=1e-2)))
    return [step(topology, Case("local", 3), it, index) for index in range(2)]


def test_a_model_without_experts_is_sliced_whole() -> None:
    alone = run_single(train_without_experts, "ddp")
    for curve in run_distributed(train_without_experts, 2, "fsdp"):
        for got, wanted in zip(curve, alone, strict=True):
            assert got == pytest.approx(wanted, rel=1e-10)


def test_what_cannot_be_sliced_is_refused() -> None:
    (problem,) = TrainConfig.model_validate({"parallel": {"dense": "fsdp"}}).check()
    assert problem.startswith("parallel.dense: fsdp needs experts that are spread over ranks")
    assert TrainConfig.model_validate({"parallel": {"dense": "fsdp", "mode": "fsdp"}}).check() == []
    temperature = nn.Module()
    temperature.register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(ConfigError, match="cannot slice temperature, which has no dimension"):
        run_single(lambda topology: ShardedDense(temperature, topology))
    with pytest.raises(ValueError, match=r"blocks\.0\.moe\.experts: experts are on every rank"):
        run_single(spread, Case("local"))
