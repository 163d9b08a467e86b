"""Hash: a token's expert follows from its id alone, by a fixed table. Nothing is learned, and nothing can collapse.

Roller et al., "Hash Layers for Large Sparse Models", NeurIPS 2021 (arXiv:2106.04426). ``table: random`` hashes any id
(section 3.1, and with k above 1 k distinct experts); ``table: FILE`` looks ids up in a table that was built before, by
the builders below: balanced by token frequency, or clustered by token vectors, so that similar tokens share an expert
(or do not: dispersed hashing).

Shape suffixes: T tokens, E experts, K experts per token, V ids.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gates.base import Gate, GateConfig, GateInput, GateOutput
from gates.metrics import plan_metrics
from gates.plan import RoutingPlan
from gates.registry import register_gate

RANDOM = "random"


class HashConfig(GateConfig):
    """Options of hash routing."""

    name: Literal["hash"] = "hash"
    k: int = Field(1, ge=1, description="experts per token, each of weight 1/k")
    table: str = Field(
        RANDOM,
        description="random: any id, no table; else a file that torch.save wrote, (V, K) int64 experts of each id",
    )
    vocab_size: int | None = Field(None, ge=1, description="ids V of the table in the file; needed with one")
    seed: int = Field(0, ge=0, description="table=random: another number is another hash")

    def num_params(self, dim: int, num_experts: int) -> int:
        """None: the table is not trained."""
        return 0

    def experts_per_token(self, num_experts: int) -> float:
        """k."""
        return float(min(self.k, num_experts))

    def num_ids(self) -> int | None:
        """Rows of the table; a hash takes any id."""
        return self.vocab_size

    def files(self) -> dict[str, str]:
        """The table."""
        return {} if self.table == RANDOM else {"table": self.table}

    def check(self, num_experts: int) -> list[str]:
        """See :meth:`GateConfig.check`."""
        problems = []
        if self.k > num_experts:
            problems.append(f"k: {self.k} experts per token, but there are only {num_experts}")
        if self.table != RANDOM and self.vocab_size is None:
            problems.append("vocab_size: needed with a table from a file: the ids that it knows")
        if self.table == RANDOM and self.vocab_size is not None:
            problems.append("vocab_size: has no effect without a table from a file")
        return problems


@register_gate("hash")
class HashGate(Gate):
    """Looks token ids up. See the module. The table is a buffer, so a checkpoint does not need the file."""

    config_type = HashConfig
    config: HashConfig
    interchangeable_experts = False
    needs = frozenset({"ids"})
    weight_sum = "one"
    table_VK: Tensor | None

    def __init__(self, config: HashConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, dim, num_experts)
        rows = config.vocab_size
        empty = None if rows is None else torch.full((rows, config.k), -1, dtype=torch.int64)
        self.register_buffer("table_VK", empty)
        if config.table != RANDOM and Path(config.table).exists():
            self.reset_parameters()

    @property
    def max_k(self) -> int:
        return self.config.k

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Read the table.

        Raises:
            ValueError: the file is missing, is no such table, or names experts that are not there.
        """
        if self.table_VK is None:
            return
        config = self.config
        try:
            table_VK = torch.load(config.table, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
            raise ValueError(f"gate.table: cannot read {config.table}: {error}") from error
        if not isinstance(table_VK, Tensor) or table_VK.shape != self.table_VK.shape or table_VK.dtype != torch.int64:
            found = (
                f"{table_VK.dtype} {tuple(table_VK.shape)}" if isinstance(table_VK, Tensor) else type(table_VK).__name__
            )
            wanted = tuple(self.table_VK.shape)
            raise ValueError(
                f"gate.table: {config.table} must hold an int64 tensor (vocab_size, k) {wanted}, not {found}"
            )
        if bool((table_VK < 0).any()) or bool((table_VK >= self.num_experts).any()):
            raise ValueError(f"gate.table: {config.table} names experts that are not among 0 to {self.num_experts - 1}")
        if bool((table_VK.sort(1).values.diff(dim=1) == 0).any()):
            raise ValueError(f"gate.table: {config.table} sends an id to the same expert twice")
        self.table_VK.copy_(table_VK)

    def route(self, inp: GateInput) -> GateOutput:
        """See :meth:`Gate.route`; ValueError if an id is not in the table."""
        assert inp.ids_T is not None
        ids_T, k = inp.ids_T, self.config.k
        if inp.replay is not None:
            plan = inp.replay
        elif self.table_VK is None:
            plan = RoutingPlan.from_topk(
                hash_experts(ids_T, self.num_experts, k, self.config.seed), inp.x_TD.new_ones(1), self.num_experts
            )
        else:
            if ids_T.numel() and (int(ids_T.min()) < 0 or int(ids_T.max()) >= self.table_VK.shape[0]):
                raise ValueError(
                    f"gate 'hash': the table knows ids 0 to {self.table_VK.shape[0] - 1}, got {int(ids_T.min())} to"
                    f" {int(ids_T.max())}"
                )
            plan = RoutingPlan.from_topk(self.table_VK[ids_T], inp.x_TD.new_ones(1), self.num_experts)
        plan = plan.with_weight(inp.x_TD.new_full((plan.num_pairs,), 1 / k))
        return GateOutput(plan, metrics=plan_metrics(plan) if inp.with_losses else {})


def hash_experts(ids_T: Tensor, num_experts: int, k: int = 1, seed: int = 0) -> Tensor:
    """(T, K) distinct experts of each id: the k smallest of E random numbers that only id, expert and seed decide."""
    expert_E = torch.arange(num_experts, device=ids_T.device)
    key_TE = mix_bits(mix_bits(ids_T + wrapped(seed * 0x9E3779B1)).unsqueeze(1) + expert_E)
    return torch.sort(key_TE, dim=1, stable=True).indices[:, :k]


def wrapped(value: int) -> int:
    """``value`` modulo 2^64, as int64 arithmetic would have it."""
    return (value + 2**63) % 2**64 - 2**63


def mix_bits(value: Tensor) -> Tensor:
    """A bijection of int64 that scatters neighbours: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = value + -0x61C8864680B583EB
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


# --- builders of tables -----------------------------------------------------------------------------------------------


def balanced_table(count_V: Tensor, num_experts: int) -> Tensor:
    """(V, 1) table with even loads: ids from most to least frequent, each to the expert with least load so far.

    Roller et al., section 3.2. Even as far as one id's count allows; ties go to the lower expert.

    Args:
        count_V: (V,) how often each id occurs.
    """
    load_E = [0.0] * num_experts
    ids_E = [0] * num_experts
    table_V = torch.empty(count_V.numel(), dtype=torch.int64)
    for token in torch.argsort(count_V, descending=True, stable=True).tolist():
        expert = min(range(num_experts), key=lambda e: (load_E[e], ids_E[e], e))
        table_V[token] = expert
        load_E[expert] += float(count_V[token])
        ids_E[expert] += 1
    return table_V.unsqueeze(1)


def clustered_table(vector_VD: Tensor, num_experts: int, *, dispersed: bool = False, iterations: int = 50) -> Tensor:
    """(V, 1) table by k-means over token vectors (embeddings): one cluster an expert.

    Args:
        dispersed: spread each cluster over all experts instead, so that tokens within an expert differ (section 3.4).
        iterations: of Lloyd's algorithm, at most.
    """
    vector_VD = vector_VD.double()
    # k-means++ without chance: each next centre is the vector farthest from those before.
    centres = [vector_VD[0]]
    distance_V = torch.full_like(vector_VD[:, 0], torch.inf)
    for _ in range(1, num_experts):
        distance_V = torch.minimum(distance_V, torch.linalg.vector_norm(vector_VD - centres[-1], dim=1))
        centres.append(vector_VD[distance_V.argmax()])
    centre_ED = torch.stack(centres)
    cluster_V = torch.cdist(vector_VD, centre_ED).argmin(1)
    for _ in range(iterations):
        size_E = torch.bincount(cluster_V, minlength=num_experts)
        sum_ED = torch.zeros_like(centre_ED).index_add(0, cluster_V, vector_VD)
        centre_ED = torch.where(size_E.unsqueeze(1) > 0, sum_ED / size_E.clamp_min(1).unsqueeze(1), centre_ED)
        before, cluster_V = cluster_V, torch.cdist(vector_VD, centre_ED).argmin(1)
        if torch.equal(before, cluster_V):
            break
    if not dispersed:
        return cluster_V.unsqueeze(1)
    order_V = torch.argsort(cluster_V, stable=True)
    table_V = torch.empty_like(cluster_V)
    table_V[order_V] = torch.arange(cluster_V.numel()) % num_experts
    return table_V.unsqueeze(1)
